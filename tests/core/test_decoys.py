"""Decoys of a batch: who they are, and that a run with them is resumed, replayed and reproduced like any other."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import LAYERS, StopAfter, editor_of, name_of

from cakeflow import Contexts, EditRequest, LeastSquares
from cakeflow.core import choose_decoys
from cakeflow.core.decoys import decoy_keys
from cakeflow.data import builtin_facts
from cakeflow.errors import ConfigError, ResumeError
from cakeflow.forward.fact_tokens import choose_tokens
from cakeflow.forward.keys import read_keys
from cakeflow.forward.tokens import encode_batch
from cakeflow.models import Site
from cakeflow.report import RunFolder
from cakeflow.solvers import Decoys

FACTS = [EditRequest("{} plays", name, "golf") for name in ("Ann", "Bob", "Cleo")]
NAMES = tuple(f"{first}{last}" for first in ("Mia", "Leo", "Ida", "Tom") for last in ("", "r", "n", "s"))


@given(count=st.integers(1, 3), each=st.integers(1, 3), seed=st.integers(0, 50))
def test_decoys_are_others_in_the_prompts_of_the_facts(count, each, seed):
    facts = FACTS[:count]
    decoys = choose_decoys(facts, ("Ann", "bob", *NAMES, "Mia"), each, seed, leave_out=["Leo"])
    names = [decoy.subject for decoy in decoys]
    assert len({*names}) == len(names) == count * each
    assert {*names} <= {*NAMES, "bob", "Ann"} - {"Leo"} - {fact.subject for fact in facts}
    assert [decoy.prompt for decoy in decoys] == [fact.prompt for fact in facts for _ in range(each)]
    if count > 1:
        assert "bob" not in names  # the same name up to case
    assert decoys == choose_decoys(facts, ("Ann", "bob", *NAMES, "Mia"), each, seed, leave_out=["Leo"])


def test_other_facts_and_seeds_have_other_decoys():
    chosen = {tuple(each.subject for each in choose_decoys(FACTS, NAMES, 1, seed)) for seed in range(8)}
    assert len(chosen) > 4
    assert choose_decoys(FACTS[:1], NAMES)[0].subject != choose_decoys(FACTS[1:2], NAMES)[0].subject


def test_by_default_they_are_built_in():
    subjects = {fact.subject for fact in builtin_facts()}
    assert {decoy.subject for decoy in choose_decoys(FACTS)} <= subjects


def test_too_few_names():
    with pytest.raises(
        ConfigError, match="6 decoys for 3 facts need as many names that are not edited, and 2 are left"
    ):
        choose_decoys(FACTS, ("Ann", "Mia", "Leo", "Ida"), 2, leave_out=["ida"])


def editor(lm, **values):
    solver = Decoys(LeastSquares(0.5), **{"residual": 0.5, "names": NAMES, **values})
    return editor_of(lm, solver=solver)


def test_keys_are_read_in_the_model_as_it_is(lm):
    one = editor(lm)
    one.fit(FACTS, 3, evaluate=False)
    module, site = one.module, Site(LAYERS[1], "mlp_out")
    decoys = choose_decoys(FACTS, NAMES, 2, 7)
    texts = encode_batch(lm, decoys, Contexts())
    facts = choose_tokens(lm, texts, "auto", LAYERS[0])
    expected = read_keys(lm, facts.texts, [site])[site]
    torch.testing.assert_close(decoy_keys(module, site, FACTS, NAMES, 2, 7), expected)
    with pytest.raises(ConfigError, match="names of decoys: "):
        decoy_keys(module, site, FACTS, tuple("x" * (2000 + i) for i in range(4)), 1, 0)


def test_a_change_has_rows_for_its_decoys_and_says_so(lm, tmp_path):
    one = editor(lm, each=2)
    one.fit(FACTS, 3, evaluate=False, run_dir=tmp_path)
    (step,) = one.module.journal.steps
    for part in step.changes:
        assert part.change.update.right.shape[0] == 9
        assert len(part.change.keys) == 3  # later batches preserve those of the facts
        assert part.numbers["decoys"] == 6
    run = RunFolder.read(tmp_path)
    assert "Decoys(" in run.ledger[0].body.settings["solver"]


def run_of(lm, folder, *callbacks, **values):
    """Three facts one by one, on a copy of a model."""
    one = editor_of(copy.deepcopy(lm), {"callbacks": list(callbacks)}, solver=editor(lm, **values).module.solver)
    one.fit(FACTS, 1, evaluate=False, run_dir=folder)
    return one.module.lm


def weights(lm):
    return [lm.weight(name_of(lm, layer)) for layer in LAYERS]


def test_a_run_goes_on_with_the_same_decoys_or_not_at_all(lm, tmp_path):
    expected = weights(run_of(lm, tmp_path / "whole"))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_of(lm, tmp_path / "cut", StopAfter(2))
    for values in ({"seed": 1}, {"each": 2}, {"residual": 0.4}, {"names": NAMES[1:]}):
        with pytest.raises(ResumeError, match="solver"):
            run_of(lm, tmp_path / "cut", **values)
    assert all(map(torch.equal, weights(run_of(lm, tmp_path / "cut")), expected))
    assert not all(map(torch.equal, weights(run_of(lm, tmp_path / "other", seed=1)), expected))


def test_a_run_is_replayed_and_reproduced_bit_for_bit(lm, tmp_path):
    expected = weights(run_of(lm, tmp_path / "run"))
    again = editor(copy.deepcopy(lm))
    result = again.reproduce(tmp_path / "run", run_dir=tmp_path / "again")
    assert result.equal
    assert all(map(torch.equal, weights(again.module.lm), expected))
    other = editor(copy.deepcopy(lm), seed=1).reproduce(tmp_path / "run", run_dir=tmp_path / "other")
    assert not other.same_weights
    assert any("solver" in line for line in other.settings)
    loaded = editor(copy.deepcopy(lm))
    loaded.module.journal.load(tmp_path / "run" / "journal")
    assert all(map(torch.equal, weights(loaded.module.lm), expected))
    loaded.rollback(3)
    assert all(map(torch.equal, weights(loaded.module.lm), weights(lm)))


def test_without_texts_on_record_earlier_runs_do_not_matter(lm):
    """Whether their subjects are known depends on whether they were loaded, and decoys must not."""
    pool = ("Bob", *NAMES[:2])
    for record, texts in ((True, {"Bob"}), (False, set())):
        one = editor_of(copy.deepcopy(lm), solver=Decoys(LeastSquares(0.5), names=pool), record_texts=record)
        one.fit(FACTS[1:2], 1, evaluate=False)
        one.fit(FACTS[:1], 1, evaluate=False)
        site, module = Site(LAYERS[0], "mlp_out"), one.module
        if record:
            with pytest.raises(ConfigError, match="and 2 are left"):
                decoy_keys(module, site, FACTS[:1], pool, 3, 0)
        else:
            assert len(decoy_keys(module, site, FACTS[:1], pool, 3, 0)) == 3
        assert texts <= {request.subject for step in module.journal.steps for request in step.requests}
