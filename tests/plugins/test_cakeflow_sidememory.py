"""Modules that edits put in place go through the same doors as weight updates: stored, resumed, undone, exported."""

import copy
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from cakeflow_sidememory import LearningRule, Margin, ShardChange, ShardedProjection, SideMemory
from cakeflow_sidememory.shards import ShardSettings, plain_weight
from stops import STOPS

from cakeflow import Contexts, Editor, EditRequest
from cakeflow.callbacks import Policy, PolicyGuard
from cakeflow.core import SafeCheckpointIO, build_module
from cakeflow.errors import ConfigError, EditError, ExportError, LedgerError, NumericalError, PolicyError, ResumeError
from cakeflow.evaluation import score_targets
from cakeflow.export import apply_memory
from cakeflow.journal import Journal, WeightChange, kind_of, replay, verify
from cakeflow.models import Site, load_model
from cakeflow.solvers import Update
from cakeflow.storage import tensor_hash

SITE = Site(3, "mlp_out")
FACTS = [
    EditRequest("The first letter of {}", subject, new, true)
    for subject, new, true in (
        ("Lund", "a", "the"), ("Australia", "the", "a"), ("Old Malmö", "of", "in"), ("Rome", "in", "of"),
    )
]  # fmt: skip
"""Two batches; the subject comes last, since a random model attends to nothing in particular."""
RULE = LearningRule(lr=4.0, steps=30, margin=Margin(0.5, 4.0, 2.0), clamp=None)
UNRELATED = ["She walked along the river", "In music, a violin has four strings", "of the"]
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def memory_of(lm, **settings):
    plain = {"rule": RULE, "density": 0.5, "contexts": Contexts(), "irrelevant": UNRELATED[:2]}
    return SideMemory(lm, SITE.layer, **{**plain, **settings})


def editor_of(lm, **trainer):
    return Editor(memory_of(lm), {**QUIET, **trainer})


def place(lm):
    return lm.architecture.path(SITE)


def hashes(lm):
    return {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}


def base_hashes(lm):
    """Hashes of the tensors that the unedited model has, by the names that they have there."""
    path = place(lm)
    own = [name for name in hashes(lm) if name.startswith(f"{path}.") and ".base." not in name]
    memory = set(own) if f"{path}.least" in own else set()
    return {name.replace(f"{path}.base.", f"{path}."): each for name, each in hashes(lm).items() if name not in memory}


def tree(lm):
    return [(name, id(module)) for name, module in lm.model.named_modules()]


def logits(lm, texts):
    ids = [torch.tensor([lm.tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        return [lm(input_ids=each).logits for each in ids]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def probabilities(lm, facts=FACTS):
    """Probability of each new target."""
    return score_targets(lm, [fact.text for fact in facts], [fact.target_new for fact in facts])[0].exp()


TEXTS = [fact.text for fact in FACTS] + UNRELATED


@pytest.fixture
def run(lm, tmp_path):
    """The tiny GPT-2 after two batches, and its run folder."""
    editor = editor_of(lm)
    editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    return editor, tmp_path / "run"


class Watch(L.Callback):
    """Hashes of the model's own weights while it is edited."""

    def __init__(self):
        self.hashes = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.hashes.append(base_hashes(pl_module.lm))


def test_edits_take_beside_the_weights(tiny, tmp_path):
    before, unedited, watch = hashes(tiny), logits(tiny, UNRELATED), Watch()
    chance, fact = probabilities(tiny, FACTS[:1]), FACTS[:1]
    editor = editor_of(tiny, callbacks=[watch])
    result = editor.fit(fact, run_dir=tmp_path / "run")
    assert (result.before["efficacy_exact"], result.after["efficacy_exact"]) == (0, 1)
    assert probabilities(tiny, fact) > 5 * chance
    assert equal(logits(tiny, UNRELATED), unedited)
    assert watch.hashes == [before]
    assert base_hashes(tiny) == before
    assert not verify(tmp_path / "run").faults
    assert set(editor.journal[0].inputs) == {"contexts", "irrelevant"}
    with editor.reverted():
        assert hashes(tiny) == before
        assert tiny.fingerprint() == editor.journal.base.fingerprint
    assert probabilities(tiny, fact) > 5 * chance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_of_weights(tiny, dtype):
    tiny.model.to(dtype)
    before, modules = hashes(tiny), tree(tiny)
    editor = editor_of(tiny, logger=False)
    editor.fit(FACTS, 2, evaluate=False)
    assert {each.dtype for each in tiny.module(SITE).shards} == {torch.float32}
    assert base_hashes(tiny) == before
    logits(tiny, [FACTS[3].text])
    assert tiny.module(SITE).decision.tolist() == [1]
    editor.rollback()
    assert (hashes(tiny), tree(tiny)) == (before, modules)


def test_rollback_gives_the_very_modules_back(tiny, tmp_path):
    before, modules, unedited = hashes(tiny), tree(tiny), logits(tiny, TEXTS)
    editor = editor_of(tiny)
    editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    edited, states = logits(tiny, TEXTS), hashes(tiny)
    editor.rollback(1)
    assert int(tiny.module(SITE).edits) == 2
    assert not equal(logits(tiny, TEXTS), edited)
    editor.rollback()
    assert (hashes(tiny), tree(tiny)) == (before, modules)
    assert equal(logits(tiny, TEXTS), unedited)
    assert tiny.scope is None
    assert not tiny.model._forward_pre_hooks
    assert not tiny.model._forward_hooks
    assert not verify(tmp_path / "run").faults
    other = editor_of(tiny, logger=False)  # once more, from the same state
    other.fit(FACTS, 2, evaluate=False)
    assert hashes(tiny) == states


def test_a_batch_below_a_later_one_does_not_come_back_alone(run, lm):
    editor, folder = run
    states = hashes(lm)
    with pytest.raises(
        ConfigError, match=r"batch 0 cannot be taken back alone: batches 1 went on learning where it ended"
    ):
        editor.rollback(batch=0)
    assert hashes(lm) == states
    editor.rollback(batch=1)
    assert int(lm.module(SITE).edits) == 2
    assert not verify(folder).faults


def test_a_run_is_replayed_and_goes_on_from_its_folder(workplace):
    editor = editor_of(load_model("model"))
    editor.fit(FACTS[:2], run_dir="run")
    states = hashes(editor.module.lm)
    journal = replay(Path("run"))
    assert hashes(journal.model) == states
    further = editor_of(load_model("model"))
    further.load("run")
    further.fit(FACTS[2:], run_dir="second")
    editor.fit(FACTS[2:], run_dir="third")
    assert hashes(further.module.lm) == hashes(editor.module.lm)
    assert hashes(replay(Path("second")).model) == hashes(editor.module.lm)
    assert not verify(Path("second")).faults


# ---- runs that stop ----


def moments(lm, folder):
    """The numbered moments of an undisturbed run's second batch, and the hashes at its end."""
    with STOPS.at(-1, None):
        editor_of(lm).fit(FACTS, 2, evaluate=False, run_dir=folder)
        seen = list(enumerate(STOPS.seen))
    first = next(number for number, moment in seen if moment[1] == "committed") + 1
    return seen[first:], hashes(lm)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_stops_in_its_second_batch_goes_on(lm, tmp_path, error, ctrl_c):
    seen, states = moments(copy.deepcopy(lm), tmp_path / "whole")
    stops = [(number, moment[1].split()[0]) for number, moment in seen if moment[0] == "cakeflow.journal"]
    assert [name for _, name in stops] == ["change", "changed", "commit", "remembered"]
    for stop, _ in stops:
        fresh, folder = copy.deepcopy(lm), tmp_path / str(stop)
        editor = editor_of(fresh)
        with pytest.raises((error, SystemExit)), STOPS.at(stop, error):
            editor.fit(FACTS, 2, evaluate=False, run_dir=folder)
        assert len(editor.journal) == 1
        assert int(fresh.module(SITE).edits) == 2
        with editor.reverted():
            assert hashes(fresh) == hashes(lm)
        fresh = copy.deepcopy(lm)
        editor_of(fresh).fit(FACTS, 2, evaluate=False, run_dir=folder)
        assert hashes(fresh) == states
        assert not verify(folder).faults


KILLED = """
import logging, signal, sys
from test_cakeflow_sidememory import FACTS, STOPS, editor_of, load_model

with STOPS.at(int(sys.argv[1]), signal.SIGKILL):
    editor_of(load_model("model")).fit(FACTS, 2, evaluate=False, run_dir="killed")
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(workplace):
    """Killed when the second batch's tensors are on disk and its line of the ledger is not."""
    seen, states = moments(load_model("model"), "whole")
    stop = next(number for number, moment in seen if moment[1:] == ("append", "ledger.jsonl"))
    tests = Path(__file__).parents[1]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests / "plugins"), *sys.path])}
    words = [sys.executable, "-c", KILLED, str(stop)]
    done = subprocess.run(words, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(replay(Path("killed"))) == 1
    lm = load_model("model")
    editor_of(lm).fit(FACTS, 2, evaluate=False, run_dir="killed")
    assert hashes(lm) == states
    assert not verify(Path("killed")).faults


def test_a_run_with_other_settings_does_not_go_on(lm, tmp_path):
    with pytest.raises(RuntimeError), STOPS.at(30, RuntimeError):
        editor_of(copy.deepcopy(lm)).fit(FACTS, 1, evaluate=False, run_dir=tmp_path)
    with pytest.raises(ResumeError, match=r"settings.density was 0.5, is 0.4"):
        Editor(memory_of(lm, density=0.4), QUIET).fit(FACTS, 1, evaluate=False, run_dir=tmp_path)


# ---- what leaves the process ----


def test_a_checkpoint_has_the_memory(lm, quiet, tmp_path):
    editor = Editor(memory_of(lm), L.Trainer(**quiet))
    editor.fit(FACTS, 2, evaluate=False)
    editor._trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert {name.removeprefix(f"model.{place(lm)}.") for name in state} == {
        "shards.0", "least", "edits", "joined", "base.weight", "base.bias",
    }  # fmt: skip
    assert all(torch.equal(each, lm.model.state_dict()[name.removeprefix("model.")]) for name, each in state.items())


@pytest.mark.parametrize("taken_back", [0, 1])
def test_an_export_gives_the_same_logits(workplace, taken_back):
    editor = editor_of(load_model("model"))
    editor.fit(FACTS, 2, evaluate=False, run_dir="run")
    editor.rollback(taken_back)
    editor.export("memory", "memory")
    fresh = load_model("model")
    manifest = apply_memory(fresh, "memory")
    assert [(change.place, change.kind) for change in manifest.changes] == [
        (place(fresh), "ShardChange")
    ] * (2 - taken_back)  # fmt: skip
    assert hashes(fresh) == hashes(editor.module.lm)
    assert equal(logits(fresh, TEXTS), logits(editor.module.lm, TEXTS))
    with pytest.raises(ExportError):
        apply_memory(fresh, "memory")  # it is another model now


@pytest.mark.parametrize("format", ["model", "delta", "lora"])
def test_formats_of_weights_are_refused(run, lm, tmp_path, format):
    with pytest.raises(ExportError, match=f"modules were put in place at {place(lm)}.*export as memory"):
        run[0].export(tmp_path / "export", format)
    assert not (tmp_path / "export").exists()


def test_weights_and_modules_together_are_refused(run, lm, tmp_path):
    """A folder with the modules alone would be another model."""
    editor, name = run[0], lm.weight_name(Site(1, "mlp_out"))
    rows = torch.zeros(1, lm.key_width(Site(1, "mlp_out")))
    with editor.journal.batch(FACTS[:1]) as step:
        editor.journal.apply(step, WeightChange(name, Update(torch.ones_like(lm.oriented(name))), rows), {})
    for format in ("model", "delta", "lora", "memory"):
        with pytest.raises(ExportError, match=f"'{format}'.*no format holds both"):
            editor.export(tmp_path / "export", format)
    editor.rollback(1)
    editor.export(tmp_path / "export", "memory")
    assert not verify(run[1]).faults


def test_a_policy_takes_it_back(lm, tmp_path):
    before, modules = hashes(lm), tree(lm)
    editor = editor_of(lm, callbacks=[PolicyGuard(Policy(minimum={"memory/loss": 100.0}))])
    with pytest.raises(PolicyError, match="memory/loss"):
        editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    assert (hashes(lm), tree(lm)) == (before, modules)
    assert not verify(tmp_path / "run").faults


# ---- settings and the parts alone ----


def test_a_config_names_it(workplace):
    path = Path("method.yaml")
    path.write_text(
        "model: {class_path: cakeflow_sidememory.SideMemory, init_args: {layer: 3, rule: {steps: 2}, base: model}}"
    )
    module = build_module([path], seed=7)
    assert isinstance(module, SideMemory)
    assert (module.settings()["layer"], module.settings()["rule"]["steps"], module.settings()["seed"]) == (3, 2, 7)
    Editor(module, QUIET).fit(FACTS, 2, evaluate=False, run_dir="run")
    assert int(module.lm.module(SITE).edits) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SideMemory("model", density=0), "density=0"),
        (lambda: SideMemory("model", irrelevant=[""]), "irrelevant has no text"),
        (lambda: LearningRule(lr=0), "lr=0"),
        (lambda: LearningRule(clamp=0), "clamp=0"),
        (lambda: Margin(alpha=-1), "alpha=-1"),
        (lambda: ShardSettings(ratio=0), "ratio=0"),
        (lambda: ShardSettings(save_every=3, join_every=4), "join_every=4 must be a multiple of save_every=3"),
        (lambda: ShardSettings(activation="sillu"), "sillu"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(EditError, match=re.escape(message)):
        make()


def test_only_drawn_entries_change(lm):
    editor = Editor(memory_of(lm, density=0.25), {**QUIET, "logger": False})
    editor.fit(FACTS, 2, evaluate=False)
    change = lm.module(SITE).shards[0] - plain_weight(lm.module(SITE).base)
    mask = editor.module.mask(lm.module(SITE), 0)
    assert (change[~mask] == 0).all()
    assert 0.2 < mask.double().mean() < 0.3
    assert (change[mask] != 0).double().mean() > 0.9


def test_a_memory_that_is_not_finite_is_undone(lm):
    before, modules = hashes(lm), tree(lm)
    journal, memory = Journal(lm), ShardedProjection.around(lm.module(SITE), ShardSettings(activation="gelu"))
    bad = ShardChange.of(place(lm), memory, torch.full_like(memory.shards[0], torch.nan), None, 1.0, 1)
    with (
        pytest.raises(NumericalError, match=r"shards\.0 of the new module is not finite"),
        journal.batch(FACTS[:1]) as step,
    ):
        journal.apply(step, bad, {})
    assert (hashes(lm), tree(lm)) == (before, modules)


def test_a_folder_names_the_kind_that_is_not_imported(run):
    """The remedy is to import the plugin, not to take the file from a copy."""
    code = "import sys, pathlib; from cakeflow.journal import verify; print(*verify(pathlib.Path(sys.argv[1])).faults)"
    done = subprocess.run([sys.executable, "-c", code, str(run[1])], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("a change of kind 'ShardChange': known are WeightChange; import the plugin that")
    assert "from a copy" not in done.stdout


def test_kinds_are_all_classes_that_can_be_made():
    class Wider(ShardChange):
        """A kind of a user's."""

    assert (kind_of("ShardChange"), kind_of("Wider")) == (ShardChange, Wider)
    with pytest.raises(LedgerError, match=r"'ModuleChange': known are .*ShardChange, .*WeightChange"):
        kind_of("ModuleChange")


def test_a_side_memory_with_other_settings_is_refused(run, lm):
    other = Editor(memory_of(lm, shards=ShardSettings(ratio=0.5)), QUIET)
    with pytest.raises(ConfigError, match=r"the side memory there has the settings .*ratio=0\.88.*not .*ratio=0\.5"):
        other.fit(FACTS[:1], evaluate=False)


def test_undo_of_one_fact_is_refused_with_the_reason(run):
    with pytest.raises(ConfigError, match="takes back whole batches only"):
        run[0].undo(FACTS[0].subject)
