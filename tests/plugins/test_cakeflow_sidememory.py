"""Modules that edits put in place go through the same doors as weight updates: stored, resumed, undone, exported."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from cakeflow_sidememory import RoutedProjection, SideMemory, SideMemoryChange
from stops import STOPS

from cakeflow import Editor, EditRequest
from cakeflow.callbacks import Policy, PolicyGuard
from cakeflow.core import SafeCheckpointIO, build_module
from cakeflow.errors import ConfigError, ExportError, LedgerError, NumericalError, PolicyError, ResumeError
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
UNRELATED = ["She walked along the river", "In music, a violin has four strings", "of the"]
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


def editor_of(lm, **trainer):
    return Editor(SideMemory(lm, SITE.layer), {**QUIET, **trainer})


def place(lm):
    return lm.architecture.path(SITE)


def hashes(lm):
    return {name: tensor_hash(tensor) for name, tensor in lm.model.state_dict().items()}


def base_hashes(lm):
    """Hashes of the tensors that the unedited model has, by the names that they have there."""
    path = place(lm)
    memory = {f"{path}.{name}" for name in ("weight", "keys", "radius")} if f"{path}.keys" in hashes(lm) else set()
    return {name.replace(f"{path}.base.", f"{path}."): each for name, each in hashes(lm).items() if name not in memory}


def tree(lm):
    return [(name, id(module)) for name, module in lm.model.named_modules()]


def logits(lm, texts):
    ids = [torch.tensor([lm.tokenizer(text)["input_ids"]]) for text in texts]
    with torch.no_grad():
        return [lm(input_ids=each).logits for each in ids]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def hits(lm, facts=FACTS):
    """Whether each new target is the most likely of all tokens."""
    return score_targets(lm, [fact.text for fact in facts], [fact.target_new for fact in facts])[1].tolist()


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
    editor = editor_of(tiny, callbacks=[watch])
    result = editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    assert (result.before["efficacy_exact"], result.after["efficacy_exact"]) == (0, 1)
    assert hits(tiny) == [1] * 4
    assert equal(logits(tiny, UNRELATED), unedited)
    assert watch.hashes == [before, before]
    assert base_hashes(tiny) == before
    assert not verify(tmp_path / "run").faults
    with editor.reverted():
        assert hashes(tiny) == before
        assert tiny.fingerprint() == editor.journal.base.fingerprint
    assert hits(tiny) == [1] * 4


def test_tokens_are_routed_one_by_one(tiny):
    """A prompt is answered alike alone, beside others, and behind padding."""
    editor_of(tiny, logger=False).fit(FACTS, 2, evaluate=False)
    memory = tiny.module(SITE)
    assert memory.routes(memory.keys).all()
    assert not memory.routes(memory.keys + 1.01 * memory.radius.max() * torch.eye(len(memory.keys[0]))[:1]).any()
    ids = tiny.tokenizer(FACTS[0].text, return_tensors="pt")["input_ids"]
    wide = torch.cat([torch.nn.functional.pad(ids, (0, 5)), torch.ones(1, ids.shape[1] + 5, dtype=torch.long)])
    with torch.no_grad():
        alone, beside = tiny(input_ids=ids).logits[0], tiny(input_ids=wide).logits[0, : ids.shape[1]]
    torch.testing.assert_close(alone, beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_of_weights(tiny, dtype):
    tiny.model.to(dtype)
    before, modules = hashes(tiny), tree(tiny)
    editor = editor_of(tiny, logger=False)
    editor.fit(FACTS, 2, evaluate=False)
    assert {tensor.dtype for tensor in tiny.module(SITE).state_dict().values()} == {dtype}
    assert base_hashes(tiny) == before
    assert sum(hits(tiny)) >= 3
    editor.rollback()
    assert (hashes(tiny), tree(tiny)) == (before, modules)


def test_rollback_gives_the_very_modules_back(tiny, tmp_path):
    before, modules, unedited = hashes(tiny), tree(tiny), logits(tiny, TEXTS)
    editor = editor_of(tiny)
    editor.fit(FACTS, 2, run_dir=tmp_path / "run")
    edited, states = logits(tiny, TEXTS), hashes(tiny)
    editor.rollback(1)
    assert len(tiny.module(SITE).keys) == 2
    assert hits(tiny, FACTS[:2]) == [1, 1]
    assert not equal(logits(tiny, TEXTS), edited)
    editor.rollback()
    assert (hashes(tiny), tree(tiny)) == (before, modules)
    assert equal(logits(tiny, TEXTS), unedited)
    assert not any(isinstance(module, RoutedProjection) for module in tiny.model.modules())
    assert not verify(tmp_path / "run").faults
    other = editor_of(tiny, logger=False)  # once more, from the same state
    other.fit(FACTS, 2, evaluate=False)
    assert hashes(tiny) == states


def test_rollback_below_a_later_batch(run, lm):
    editor, folder = run
    later, unedited = editor.journal[1].changes[0].change, logits(editor.module.lm, [FACTS[0].text])
    with editor.reverted():
        original, base = logits(lm, TEXTS), hashes(lm)
    editor.rollback(batch=0)
    memory = editor.module.lm.module(SITE)
    assert torch.equal(memory.keys, later.keys.to(memory.keys))
    changed = logits(lm, TEXTS)
    assert equal(changed[:2], original[:2])
    assert not equal(changed[2:4], original[2:4])
    assert not equal(unedited, original[:1])
    assert base_hashes(lm) == base
    assert not verify(folder).faults
    assert {name: tensor_hash(each) for name, each in replayed(lm, folder).state().items()} == {
        name: tensor_hash(each) for name, each in editor.journal.state().items()
    }
    editor.rollback()
    assert hashes(lm) == base


def replayed(lm, folder):
    """The journal of a run on an unedited copy of its model."""
    fresh = copy.deepcopy(lm)
    for name, module in list(fresh.model.named_modules()):
        if isinstance(module, RoutedProjection):
            fresh.model.set_submodule(name, module.base)
    editor = editor_of(fresh)
    editor.load(folder)
    return editor.journal


def test_a_run_is_replayed_and_goes_on_from_its_folder(workplace):
    editor = editor_of(load_model("model"))
    editor.fit(FACTS[:2], run_dir="run")
    states = hashes(editor.module.lm)
    journal = replay(Path("run"))
    assert hashes(journal.model) == states
    assert torch.equal(journal.history(place(journal.model)).keys, editor.journal[0].changes[0].change.keys)
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
    assert [name for _, name in stops] == ["change", "changed"] * 2 + ["commit", "remembered"]
    for stop, _ in stops:
        fresh, folder = copy.deepcopy(lm), tmp_path / str(stop)
        editor = editor_of(fresh)
        with pytest.raises((error, SystemExit)), STOPS.at(stop, error):
            editor.fit(FACTS, 2, evaluate=False, run_dir=folder)
        assert len(editor.journal) == 1
        assert len(fresh.module(SITE).keys) == 2
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
    with pytest.raises(ResumeError, match=r"settings.lr was 0.05, is 0.1"):
        Editor(SideMemory(lm, SITE.layer, lr=0.1), QUIET).fit(FACTS, 1, evaluate=False, run_dir=tmp_path)


# ---- what leaves the process ----


def test_a_checkpoint_has_the_memory(lm, quiet, tmp_path):
    editor = Editor(SideMemory(lm, SITE.layer), L.Trainer(**quiet))
    editor.fit(FACTS, 2, evaluate=False)
    editor._trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert {name.removeprefix(f"model.{place(lm)}.") for name in state} == {
        "weight", "keys", "radius", "base.weight", "base.bias",
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
        (place(fresh), "SideMemoryChange")
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
    rows = torch.zeros(1, lm.key_width(SITE))
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
    path.write_text("model: {class_path: cakeflow_sidememory.SideMemory, init_args: {layer: 3, steps: 2, base: model}}")
    module = build_module([path], seed=7)
    assert isinstance(module, SideMemory)
    assert {name: module.settings()[name] for name in ("layer", "steps", "seed")} == {"layer": 3, "steps": 2, "seed": 7}
    Editor(module, QUIET).fit(FACTS, 2, evaluate=False, run_dir="run")
    assert len(module.lm.module(SITE).keys) == 4


@pytest.mark.parametrize(
    "setting", [{"layer": -1}, {"steps": 0}, {"lr": 0.0}, {"density": 0.0}, {"density": 1.5}, {"reach": 1.0}], ids=str
)
def test_bad_settings(setting):
    with pytest.raises(ConfigError, match="{}={}".format(*next(iter(setting.items())))):
        SideMemory("model", **{"layer": 1, **setting})


def test_only_drawn_outputs_change(lm):
    editor = Editor(SideMemory(lm, SITE.layer, density=0.25), {**QUIET, "logger": False})
    editor.fit(FACTS, 2, evaluate=False)
    updates = [step.changes[0].change.update for step in editor.journal]
    rows = [update.abs().sum(1) > 0 for update in updates]
    assert all(0 < int(each.sum()) < len(each) / 2 for each in rows)
    assert not torch.equal(*rows)  # each batch draws its own
    earlier = editor.journal[0].changes[0].change.keys
    assert (updates[1] @ earlier.T).norm() < 1e-5 * updates[1].norm() * earlier.norm()


def test_a_memory_that_is_not_finite_is_undone(lm):
    before, modules, width = hashes(lm), tree(lm), lm.module(SITE).weight.T.shape
    journal, rows = Journal(lm), torch.ones(1, width[1])
    bad = SideMemoryChange(place(lm), torch.full(width, torch.nan), rows, torch.ones(1))
    with pytest.raises(NumericalError, match=place(lm)), journal.batch(FACTS[:1]) as step:
        journal.apply(step, bad, {})
    assert (hashes(lm), tree(lm), len(journal)) == (before, modules, 0)


@pytest.mark.slow
def test_a_folder_names_the_kind_that_is_not_imported(run):
    """The remedy is to import the plugin, not to take the file from a copy."""
    code = "import sys, pathlib; from cakeflow.journal import verify; print(*verify(pathlib.Path(sys.argv[1])).faults)"
    done = subprocess.run([sys.executable, "-c", code, str(run[1])], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("a change of kind 'SideMemoryChange': known are WeightChange; import the plugin that")
    assert "from a copy" not in done.stdout


def test_kinds_are_all_classes_that_can_be_made():
    class Wider(SideMemoryChange):
        """A kind that builds on another one, which stays known."""

    assert (kind_of("SideMemoryChange"), kind_of("Wider")) == (SideMemoryChange, Wider)
    with pytest.raises(LedgerError, match=r"'ModuleChange': known are .*SideMemoryChange, WeightChange"):
        kind_of("ModuleChange")


def test_a_change_comes_back_from_its_tensors():
    change = SideMemoryChange("block.projection", torch.randn(2, 3), torch.randn(1, 3), torch.ones(1))
    again = kind_of("SideMemoryChange").from_tensors("block.projection", change.tensors())
    assert type(again) is SideMemoryChange
    assert vars(again) == vars(change)
