"""A run that stopped goes on as if it never had: the same weights, history, metrics and files, bit for bit."""

import copy
import json
import os
import shutil
from dataclasses import replace

import lightning as L
import pytest
import torch
from cakeflow_restrain import Prune, Rect
from tiny_runs import LAYERS, StopAfter, content, editor_of, module_of, state

from cakeflow import EditDataModule, Evaluation, GradientSearch, LeastSquares, LocateThenEdit, NullSpace
from cakeflow.callbacks import Retention
from cakeflow.core.callback import EditCallback
from cakeflow.errors import ConfigError, LedgerError, ResumeError
from cakeflow.journal import ledger
from cakeflow.journal.ledger import read_entries
from cakeflow.report import RunFolder

SOLVERS = {
    "null space": NullSpace(LeastSquares(0.5)),
    "primal": LeastSquares(0.5, form="primal"),
    "rect": Rect(LeastSquares(0.5)),
    "prune": Prune(LeastSquares(0.5)),
}


@pytest.fixture(autouse=True)
def _one_clock(monkeypatch):
    """Every moment is the same: what two runs write can then be compared byte by byte."""

    class Clock(ledger.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1, tzinfo=tz)

    monkeypatch.setattr(ledger, "datetime", Clock)


def fit(lm, requests, folder, *callbacks, solver="null space", **changes):
    """An experiment in batches of two, with evaluations between, as a command starts it."""
    trainer = {"callbacks": [Retention(every=2), *callbacks], "val_check_interval": 2}
    editor = editor_of(lm, trainer, solver=SOLVERS[solver], **changes)
    run = editor.fit(requests, 2, run_dir=folder)
    return editor, run


def kept(folder):
    """What a run left, but for what tells of seconds and bytes."""
    files = content(folder)
    return {name: files[name] for name in files if name not in ("run.json", "journal/ledger.jsonl")}


def entries_of(folder):
    """The ledger without hashes of files that tell of seconds."""
    return [(entry.kind, entry.body if entry.kind != "end" else sorted(entry.body.files))
            for entry in read_entries(folder / "journal/ledger.jsonl")]  # fmt: skip


@pytest.fixture(scope="module")
def model_of(_models):
    """Architecture -> a fresh copy of its tiny model."""
    return lambda arch: copy.deepcopy(_models[arch])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(solver, type, architecture) -> folder, state and metrics of a run without interruption."""
    known = {}

    def find(lm, requests, solver, dtype):
        key = solver, dtype, lm.model.config.model_type
        if key not in known:
            lm, folder = copy.deepcopy(lm), tmp_path_factory.mktemp("whole") / "run"
            editor, run = fit(lm, requests, folder, solver=solver)
            known[key] = folder, state(lm, editor.module), run.before, run.after
        return known[key]

    return find


CASES = [
    ("gpt2", "null space", torch.float32, 0),
    ("gpt2", "null space", torch.float32, 1),
    ("gpt2", "null space", torch.float32, 3),
    ("llama", "null space", torch.float32, 2),
    ("llama", "null space", torch.bfloat16, 2),
    ("gpt2", "primal", torch.float32, 2),
    ("gpt2", "rect", torch.float32, 2),
    ("gpt2", "prune", torch.float32, 2),
    ("llama", "prune", torch.bfloat16, 3),
]


@pytest.mark.parametrize(("arch", "solver", "dtype", "stop"), CASES, ids=str)
def test_resumed_equals_uninterrupted(model_of, requests, tmp_path, whole, arch, solver, dtype, stop):
    tiny = model_of(arch)
    tiny.model.to(dtype)
    folder, expected, before, after = whole(tiny, requests[:7], solver, dtype)
    first = copy.deepcopy(tiny)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(first, requests[:7], tmp_path / "run", StopAfter(stop), solver=solver)
    editor, run = fit(tiny, requests[:7], tmp_path / "run", solver=solver)
    assert state(tiny, editor.module) == expected
    assert repr((run.before, run.after)) == repr((before, after))
    assert entries_of(tmp_path / "run") == entries_of(folder)
    assert set(kept(tmp_path / "run")) == set(kept(folder))
    assert {name for name, result in kept(tmp_path / "run").items() if result != kept(folder)[name]} <= {"metrics.csv"}
    editor.rollback()
    assert state(tiny, editor.module) != expected


@pytest.mark.parametrize("solver", ["null space", "prune"])
def test_the_last_evaluation_is_recorded_once(lm, requests, tmp_path, whole, solver):
    """A run that was stopped between it and its end."""

    class StopAtEnd(L.Callback):
        def on_train_end(self, trainer, module):
            raise KeyboardInterrupt

    folder, *_ = whole(lm, requests[:7], solver, lm.dtype)
    for _ in range(2):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAtEnd(), solver=solver)
    fit(lm, requests[:7], tmp_path / "run", solver=solver)
    assert entries_of(tmp_path / "run") == entries_of(folder)


def test_a_run_that_resumes_without_evaluation_ends_too(lm, requests, tmp_path):
    class StopAtEnd(L.Callback):
        def on_train_end(self, trainer, module):
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        editor_of(copy.deepcopy(lm), {"callbacks": [StopAtEnd()]}).fit(requests[:2], 1, run_dir=tmp_path / "run")
    editor_of(lm).fit(requests[:2], 1, evaluate=False, run_dir=tmp_path / "run")
    kinds = [entry.kind for entry in read_entries(tmp_path / "run/journal/ledger.jsonl")]
    assert kinds == ["model", "run", "evaluation", "batch", "batch", "evaluation", "end"]


def test_a_run_that_was_refused_gets_no_entry(lm, requests, tmp_path):
    """Neither at once, nor by what the editor does later."""
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAfter(2))
    files, editor = content(tmp_path / "run"), editor_of(lm)
    with pytest.raises(ResumeError, match="edits was 7, is 4"):
        editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    editor.evaluate(requests[:2])
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "other")
    editor.rollback()
    assert content(tmp_path / "run") == files


def test_resumed_again_and_again(lm, requests, tmp_path, whole):
    folder, expected, *_ = whole(lm, requests[:7], "null space", lm.dtype)
    for stop in (1, 1, 3):
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAfter(stop))
    editor, _ = fit(lm, requests[:7], tmp_path / "run")
    assert state(lm, editor.module) == expected
    assert entries_of(tmp_path / "run") == entries_of(folder)


def test_the_search_is_not_done_again(lm, requests, tmp_path):
    class Counted(GradientSearch):
        def search(self, lm, batch, layer, **options):
            searched.append(len(batch))
            return super().search(lm, batch, layer, **options)

    searched, targets = [], Counted(steps=3, lr=0.3)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAfter(2), targets=targets)
    assert searched == [2, 2]
    fit(lm, requests[:7], tmp_path / "run", targets=targets)
    assert searched == [2, 2, 2, 1]


def test_what_callbacks_logged_of_a_batch_is_logged_again(lm, requests, tmp_path):
    class Watcher(EditCallback):
        def on_batch_edited(self, module, left):
            module.log("watched", left.norm())

    tables = []
    for name, stops in (("whole", []), ("resumed", [2])):
        for stop in stops:
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                fit(copy.deepcopy(lm), requests[:7], tmp_path / name, Watcher(), StopAfter(stop))
        fit(copy.deepcopy(lm), requests[:7], tmp_path / name, Watcher())
        lines = [line.split(",") for line in (tmp_path / name / "metrics.csv").read_text().splitlines()]
        machine = lines[0].index("memory/peak")
        tables.append([[cell for place, cell in enumerate(line) if place != machine] for line in lines])
    assert tables[0] == tables[1]
    assert "watched" in tables[0][0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": "rect"}, "settings.solver was"),
        ({"targets": GradientSearch(steps=4, lr=0.3)}, "settings.targets was"),
        ({"layers": [1, 4]}, "settings.layers was"),
        ({"seed": 5}, "settings.seed was 0, is 5"),
        ({"evaluation": Evaluation(protocol="official")}, "settings.evaluation was"),
        ({"max_relative_update": 5.0}, "settings.max_relative_update was 10.0, is 5.0"),
        ({"memory_budget": 5.0}, "settings.memory_budget was None, is 5.0"),
    ],
    ids=str,
)
def test_another_config_is_refused_saying_what_differs(lm, requests, tmp_path, changes, words):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAfter(2))
    before, files = state(lm, module_of(lm)), content(tmp_path / "run")
    with pytest.raises(ResumeError, match=words):
        fit(lm, requests[:7], tmp_path / "run", **changes)
    assert state(lm, module_of(lm)) == before
    assert content(tmp_path / "run") == files


def test_the_space_of_a_request_is_part_of_its_run(lm, requests, tmp_path):
    facts = [replace(request, space=False) for request in requests[:4]]
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(copy.deepcopy(lm), facts, tmp_path / "run", StopAfter(1))
    with pytest.raises(ResumeError, match="data was"):
        fit(copy.deepcopy(lm), requests[:4], tmp_path / "run")
    fit(copy.deepcopy(lm), facts, tmp_path / "run")
    run, editor = RunFolder.read(tmp_path / "run"), editor_of(lm)
    assert run.after is not None
    assert [record.space for record in [*run.after, *run.edits]] == [False] * 8
    editor.load(tmp_path / "run")
    assert [request for step in editor.journal for request in step.requests] == facts


def test_another_model_tokenizer_or_data_is_refused(lm, requests, tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAfter(2))
    other = copy.deepcopy(lm)
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-3
    with pytest.raises(ResumeError, match="fingerprint was"):
        fit(other, requests[:7], tmp_path / "run")
    other = copy.deepcopy(lm)
    other.tokenizer.add_tokens(["a new token"])
    with pytest.raises(ResumeError, match="fingerprint was"):
        fit(other, requests[:7], tmp_path / "run")
    half = copy.deepcopy(lm)
    half.model.to(torch.bfloat16)
    with pytest.raises(ResumeError, match=r"dtype was torch\.float"):
        fit(half, requests[:7], tmp_path / "run")
    with pytest.raises(ResumeError, match=r"edits was 7, is 6; data was "):
        fit(lm, requests[:6], tmp_path / "run")
    with pytest.raises(ResumeError, match="batch_size was 2, is 3"):
        editor_of(lm).fit(requests[:7], 3, run_dir=tmp_path / "run")


def test_a_finished_or_rolled_back_run_is_not_started_again(lm, requests, tmp_path):
    editor, run = fit(lm, requests[:4], tmp_path / "run")
    assert run.folder == tmp_path / "run"
    files = content(tmp_path / "run")
    with pytest.raises(ResumeError, match="finished run"):
        editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    editor.journal.store = None
    editor.rollback()
    with pytest.raises(ResumeError, match="finished run"):
        fit(lm, requests[:4], tmp_path / "run")
    assert content(tmp_path / "run") == files


def test_a_second_run_has_the_first_ones_batches_and_goes_on_too(lm, requests, tmp_path):
    unedited = copy.deepcopy(lm)
    editor = editor_of(lm)
    editor.fit(requests[:4], 2, run_dir=tmp_path / "first")
    editor.fit(requests[4:8], 2, run_dir=tmp_path / "second")
    expected = state(lm, editor.module)
    lines = (tmp_path / "second/journal/ledger.jsonl").read_bytes().splitlines(keepends=True)
    for copied in (1, 2):  # model, and one of the two earlier batches
        shutil.copytree(tmp_path / "second", tmp_path / f"torn-{copied}")
        (tmp_path / f"torn-{copied}/journal/ledger.jsonl").write_bytes(b"".join(lines[:copied]))
        torn = editor_of(copy.deepcopy(unedited))
        with pytest.raises(ResumeError, match=f"2 earlier batches and has {copied - 1}"):
            torn.fit(requests[4:8], 2, run_dir=tmp_path / f"torn-{copied}")
        assert len(torn.journal) == 0  # what was repeated is taken back
        assert torn.module.lm.fingerprint() == unedited.fingerprint()
    batches = [place for place, line in enumerate(lines) if b'"kind":"batch"' in line]
    assert len(batches) == 4
    (tmp_path / "second/journal/ledger.jsonl").write_bytes(b"".join(lines[: batches[2] + 1]))
    fresh = editor_of(unedited)
    run = fresh.fit(requests[4:8], 2, run_dir=tmp_path / "second")
    assert state(unedited, fresh.module) == expected
    assert [step.number for step in run.journal] == [0, 1, 2, 3]


def test_a_plain_trainer_keeps_and_resumes_too(lm, requests, tmp_path):
    def train(lm, *callbacks):
        module = module_of(lm)
        logger = L.pytorch.loggers.CSVLogger(tmp_path, name="", version="run")
        trainer = L.Trainer(max_epochs=1, logger=logger, log_every_n_steps=1, callbacks=list(callbacks),
                            enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
        trainer.fit(module, datamodule=EditDataModule(requests[:4], 2))
        return module

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(copy.deepcopy(lm), StopAfter(1))
    with pytest.warns(UserWarning, match="Experiment logs directory"):
        module = train(lm)
    entries = [entry.kind for entry in read_entries(tmp_path / "run/journal/ledger.jsonl")]
    assert entries == ["model", "run", "batch", "batch", "evaluation"]
    assert len(module.journal) == 2


def test_texts_can_be_left_out_and_the_run_resumed_all_the_same(lm, requests, tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAfter(2), record_texts=False)
    editor, _ = fit(lm, requests[:7], tmp_path / "run", record_texts=False)
    text = (tmp_path / "run/journal/ledger.jsonl").read_text()
    assert not any(json.dumps(request.subject) in text for request in requests)
    assert editor.journal.edits == 7


def test_a_file_that_was_changed_meanwhile_is_noticed(lm, requests, tmp_path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(copy.deepcopy(lm), requests[:7], tmp_path / "run", StopAfter(2))
    path = tmp_path / "run/journal/batch-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(LedgerError, match=r"batch-00001.safetensors was changed"):
        fit(lm, requests[:7], tmp_path / "run")


def test_settings_are_those_that_were_given(lm):
    """What a run measures before its first edit must not look like another experiment when it is resumed."""
    assert LocateThenEdit(lm, LAYERS).settings() == LocateThenEdit(lm, LAYERS).settings()
    assert " at 0x" not in json.dumps(LocateThenEdit(lm, LAYERS, solver=type("Own", (LeastSquares,), {})()).settings())


def test_an_evaluation_keeps_to_the_memory_budget(lm, requests):
    editor = editor_of(lm, {"logger": False})
    free = editor.evaluate(requests[:4]).metrics
    editor.module.max_bytes = 2e7
    assert editor.evaluate(requests[:4]).metrics == pytest.approx(free, nan_ok=True)
    editor.module.max_bytes = 1000
    with pytest.raises(ConfigError, match="scoring a text of"):
        editor.fit(requests[:2])
    assert len(editor.journal) == 0


def modes(folder):
    """Rights of everything in a folder."""
    return {path: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_run_folder_is_its_owners_unless_asked_and_an_export_follows_the_umask(
    lm, requests, tmp_path, umask, prepared
):
    fresh, run = copy.deepcopy(lm), tmp_path / "some" / "run"
    if prepared:
        run.mkdir(parents=True)
    editor = editor_of(lm)
    editor.fit(requests[:2], run_dir=run)
    assert {mode for path, mode in modes(run).items() if path.is_dir()} == {0o700}
    assert {mode for path, mode in modes(run).items() if path.is_file()} == {0o600}
    assert (tmp_path / "some").stat().st_mode & 0o777 == 0o755
    for format in ("delta", "model", "lora"):
        result = modes(editor.export(tmp_path / format, format))
        assert {mode for path, mode in result.items() if path.is_dir()} == {0o755}
        assert {mode for path, mode in result.items() if path.is_file()} == {0o644}
    editor_of(fresh, private=False).fit(requests[:2], run_dir=tmp_path / "shared")
    assert {mode for path, mode in modes(tmp_path / "shared").items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes(tmp_path / "shared").items() if path.is_file()} == {0o644}


def test_a_folder_with_content_keeps_its_rights(lm, requests, tmp_path, umask):
    fresh, run = copy.deepcopy(lm), tmp_path / "run"
    with pytest.raises(RuntimeError):
        fit(lm, requests[:4], run, StopAfter(1, RuntimeError()))
    run.chmod(0o755)
    fit(fresh, requests[:4], run)
    assert run.stat().st_mode & 0o777 == 0o755
    assert (run / "journal").stat().st_mode & 0o777 == 0o700


def test_a_stopped_run_is_private_too(lm, requests, tmp_path, umask):
    with pytest.raises(RuntimeError):
        fit(lm, requests[:4], tmp_path / "run", StopAfter(1, RuntimeError()))
    result = modes(tmp_path / "run")
    assert {mode for path, mode in result.items() if path.is_dir()} == {0o700}
