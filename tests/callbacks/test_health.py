"""Health along a stream: the quantities against their definitions, the states, and what follows from them."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from tiny_runs import editor_of

from cakeflow import EditDataModule
from cakeflow.callbacks import OutcomeCheck, PeriodicCallback, Policy, PolicyGuard, StreamHealth
from cakeflow.callbacks.health import LIMITS, judge
from cakeflow.data import builtin_facts
from cakeflow.errors import ConfigError, PolicyError, SideEffectWarning
from cakeflow.evaluation.scoring import score_records
from cakeflow.journal import Journal
from cakeflow.models import Site
from cakeflow.report import RunFolder, render_page

from .conftest import FACTS, fit

OPEN = {"taken": (0.0, -1.0), "retention": (0.0, -1.0)}
"""Limits that no share is beyond: tiny models take few facts."""
RUINED = {"growth": (0.5, 0.6)}
"""Limits that every weight is beyond."""


def test_the_quantities(tiny, quiet):
    """Shares by score_records; change and growth from the weights by the sums of their definitions."""
    before = tiny.oriented(Site(1, "mlp_out")).clone()
    watcher = StreamHealth(OPEN, first=2, every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SideEffectWarning)
        module = fit(tiny, quiet, [watcher], batch_size=2)
    assert [row["health/edits"] for row in watcher.rows] == [0, 4, 5]
    first, last = watcher.rows[0], watcher.rows[-1]
    assert {"health/taken", "health/retention"}.isdisjoint(first)
    assert (first["health/kl"], first["health/layer1/change"], first["health/layer1/growth"]) == (0, 0, 1)
    correct = score_records(tiny, [replace(fact, probes=()) for fact in FACTS]).correct.double()
    assert last["health/retention"] == pytest.approx(float(correct[:2].mean()))
    assert last["health/taken"] == float(correct[4])
    after = tiny.oriented(Site(1, "mlp_out"))
    moment = module.covariances[1].moment

    def energy(matrix):
        return float(torch.trace(matrix.double() @ moment @ matrix.double().T))

    assert last["health/layer1/change"] == pytest.approx(energy(after - before) / energy(before), rel=1e-12)
    assert last["health/layer1/change"] > 1e-6
    assert last["health/layer1/growth"] == pytest.approx(float(after.norm() / before.norm()), rel=1e-12)
    assert last["health/kl"] > 1e-7


def test_half_precision(tiny, quiet):
    """By the float32 master, which has what bfloat16 rounds away."""
    tiny.model.bfloat16()
    name, watcher = tiny.weight_name(Site(1, "mlp_out")), StreamHealth({**OPEN, "change": (1e8, 1e9)}, every=None)
    before = tiny.weight(name).detach().clone().float()
    fit(tiny, quiet, [watcher])
    assert (watcher.rows[0]["health/layer1/change"], watcher.rows[0]["health/layer1/growth"]) == (0, 1)
    growth = float(tiny.masters[name].norm() / before.norm())
    assert watcher.rows[-1]["health/layer1/growth"] == pytest.approx(growth, rel=1e-6) != 1


def test_a_method_without_second_moments(tiny, quiet):
    """It has answers and divergence alone."""
    module = SimpleNamespace(lm=tiny, journal=Journal(tiny), max_bytes=None)
    watcher = StreamHealth()
    watcher.on_fit_start(None, module)
    assert watcher.measure(module) == {"kl": 0.0, "state": 0.0}


def test_a_fact_counts_with_its_last_target(tiny, quiet):
    """Edited a second time, it is one of the first facts, with the new target; undone, it is none."""
    again = replace(FACTS[0], target_new="Oslo", probes=())
    module = fit(tiny, quiet, [], batch_size=1)
    trainer = L.Trainer(**quiet, callbacks=[watcher := StreamHealth(OPEN, first=1)])
    trainer.fit(module, datamodule=EditDataModule([again], 1))
    assert watcher.rows[-1]["health/retention"] == float(score_records(tiny, [again]).correct[0])
    module.journal.rollback()
    watcher._text.on_fit_start(trainer, module)
    assert "retention" not in watcher.measure(module)


@pytest.mark.parametrize(
    ("numbers", "state", "reasons"),
    [
        ({}, 0, []),
        ({name: pair[0] for name, pair in LIMITS.items()}, 0, []),
        ({"taken": 0.79}, 1, ["taken is 0.79, must be at least 0.8"]),
        ({name: min(pair[1], 9.0) for name, pair in LIMITS.items()}, 1, [*LIMITS]),
        ({"retention": 0.79, "kl": 0.5}, 2, ["retention is 0.79, must be at least 0.8"]),
        ({"kl": math.nan}, 2, ["kl is nan, must be at most 1"]),
        ({"taken": math.nan}, 2, ["taken is nan, must be at least 0.6"]),
        ({"layer1/growth": 9.0, "layer2/growth": 1.0}, 1, ["growth is 9, must be at most 1.5"]),
        ({"layer1/change": math.nan, "layer2/change": 0.0}, 2, ["change is nan"]),
        ({"layer1/change": 0.0, "layer2/change": math.inf}, 2, ["change is inf"]),
        ({"perplexity": 1e9}, 0, []),
    ],
)
def test_states(numbers, state, reasons):
    got = judge(numbers)
    assert got[0] == state
    assert len(got[1]) == len(reasons)
    assert all(reason in text for reason, text in zip(reasons, got[1], strict=True))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: StreamHealth({"retentio": (0.5, 0.2)}), "no quantity 'retentio'.*did you mean 'retention'"),
        (
            lambda: StreamHealth({"kl": (0.5, 0.2)}),
            r"limits.kl must be two numbers, that of fine smaller .*\(0.5, 0.2\)",
        ),
        (lambda: StreamHealth({"taken": (0.5, 0.8)}), "limits.taken .* larger"),
        (lambda: StreamHealth({"kl": (0.5, math.nan)}), "limits.kl"),
        (lambda: StreamHealth({"kl": 0.5}), "limits.kl"),
        (lambda: StreamHealth(first=0), "first must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_settings(build, words):
    with pytest.raises(ConfigError, match=words):
        build()


def test_a_worse_state_is_said_once(lm, quiet):
    with pytest.warns(
        SideEffectWarning, match="after 0 edits the model is broken: growth is 1, must be at most 0.6"
    ) as said:
        fit(lm, quiet, [StreamHealth({**OPEN, **RUINED})])
    assert len([each for each in said if issubclass(each.category, SideEffectWarning)]) == 1


@pytest.mark.filterwarnings("ignore::cakeflow.errors.NotTakenWarning")
@pytest.mark.filterwarnings("ignore::cakeflow.errors.SideEffectWarning")
def test_facts_that_are_edited_again_are_not_the_last_batch(lm, monkeypatch):
    """The share that took is that of the facts that came last."""
    facts, asked = [replace(fact, probes=()) for fact in FACTS], []

    def watched(lm, records, **options):
        asked[:] = records
        return score_records(lm, records, **options)

    monkeypatch.setattr("cakeflow.callbacks.health.score_records", watched)
    editor = editor_of(lm, {"logger": False, "callbacks": [StreamHealth(OPEN, first=1)]})
    for batch in (facts[:2], facts[2:], facts[:1]):
        editor.fit(batch, evaluate=False)
    assert asked == [*facts[2:], facts[0]]


@pytest.mark.filterwarnings("ignore::cakeflow.errors.SideEffectWarning")
def test_a_broken_stream_ends(lm, quiet):
    """After the first batch that is measured; its edits stay."""
    watcher = StreamHealth({**OPEN, "growth": (1 + 1e-9, 1 + 2e-9), "kl": (1e3, 1e4)}, every=2, stop=True)
    module = fit(lm, quiet, [watcher])
    assert [row["health/state"] for row in watcher.rows] == [0, 2]
    assert module.journal.edits == 2
    assert not module.complete
    module = fit(lm, quiet, [StreamHealth(OPEN, stop=True)])
    assert module.journal.edits == 5


@pytest.mark.filterwarnings("ignore::cakeflow.errors.SideEffectWarning")
def test_a_rule_takes_back_a_run_that_ends_broken(lm, requests, tmp_path):
    before, rule = lm.fingerprint(), Policy(maximum={"health/state": 1})
    editor = editor_of(lm, {"callbacks": [StreamHealth({**OPEN, **RUINED}, stop=True), PolicyGuard(rule)]})
    with pytest.raises(PolicyError, match="health/state is 2, must be at most 1"):
        editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    assert lm.fingerprint() == before
    editor = editor_of(lm, {"callbacks": [StreamHealth({**OPEN, "growth": (0.5, 9.0)}), PolicyGuard(rule)]})
    run = editor.fit(requests[:4], 2, run_dir=tmp_path / "other")
    assert run.logged["health/state"] == 1
    assert len(editor.journal) == 2


@pytest.mark.filterwarnings("ignore::cakeflow.errors.SideEffectWarning")
def test_the_page_and_the_verdict_say_it(lm, requests, tmp_path):
    """A broken state is beyond the default budget; the page has it on top, and the quantities along the edits."""
    checks = [OutcomeCheck(familiar=0, neighbors=0), StreamHealth({**OPEN, **RUINED})]
    run = editor_of(lm, {"callbacks": checks}).fit(requests[:2], 1, run_dir=tmp_path / "run")
    assert run.outcome.side_effects == ["health/state is 2, must be at most 1"]
    page = render_page(RunFolder.read(tmp_path / "run"))
    assert "Health after 2 edits: broken (" in page
    assert "health growth" in page
    assert "health/state is 2" in page


class Efficacy(PeriodicCallback):
    """Share of all facts so far whose new target is more likely than the true one."""

    name = "efficacy"

    def measure(self, module):
        facts = [replace(request, probes=()) for step in module.journal for request in step.requests]
        scores = score_records(module.lm, facts) if facts else None
        return {"all": 1.0 if scores is None else float((scores.expected > scores.rival).double().mean())}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::cakeflow.errors.SideEffectWarning", "ignore::cakeflow.errors.NotTakenWarning")
@pytest.mark.filterwarnings("ignore::cakeflow.errors.RequestWarning")  # the model states a few of them already
def test_a_broken_stream_of_the_real_model_is_called_so_in_time(real_editor, tmp_path):
    """No history, next to no second moments and far targets break it; ``memit_seq`` stays fine on the same facts."""
    facts, watchers = builtin_facts()[:60], (StreamHealth(), Efficacy())
    statistics = {"source": str(tmp_path / "references.txt"), "tokens": 2048, "cov_weight": 1e-3}
    targets = {"steps": 6, "lr": 10.0, "clamp": 40.0}
    editor = real_editor("memit", {"callbacks": list(watchers)}, statistics=statistics, targets=targets)
    editor.fit(facts, 10, evaluate=False)
    editor.rollback()
    states = [row["health/state"] for row in watchers[0].rows]
    efficacy = [row["efficacy/all"] for row in watchers[1].rows]
    assert states[0] == 0
    assert min(efficacy) < 0.9, efficacy
    assert min(efficacy[: states.index(2) + 1]) >= 0.9, (states, efficacy)
    healthy = StreamHealth(every=None)
    editor = real_editor("memit_seq", {"callbacks": [healthy]}, targets={"steps": 15})
    editor.fit(facts[:20], 10, evaluate=False)
    editor.rollback()
    assert [row["health/state"] for row in healthy.rows] == [0, 0], healthy.rows
