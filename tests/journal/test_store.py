"""A batch is done whole or not at all, in memory and on disk, wherever it is stopped."""

import copy
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from bodies import forge, raw
from cakeflow_restrain import Prune, Rect
from stops import STOPS
from tiny_runs import LAYERS, content, editor_of, name_of, state
from toy_changes import Scaled

from cakeflow import LeastSquares
from cakeflow.errors import LedgerError, NumericalError, ResumeError, RunFolderError
from cakeflow.journal.audit import verify
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import BatchBody, RunBody
from cakeflow.journal.store import JournalStore
from cakeflow.models import Site
from cakeflow.solvers import Solver
from cakeflow.storage import file_hash, read_tensors, write_tensors

RUN = RunBody(model="tiny", settings={}, edits=0, batch_size=1, data="", who="", versions={}, threads=1)
ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError, OSError]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def editor(tiny, request):
    tiny.model.to(request.param)
    return editor_of(tiny)


def one_batch(editor, requests):
    """A batch through the journal, as a training step makes one, without a Trainer."""
    journal = editor.journal
    with journal.batch(requests) as step:
        for layer in LAYERS:
            weight = editor.module.lm.oriented(Site(layer, "mlp_out")).double()
            keys = torch.randn(len(requests), weight.shape[1], dtype=torch.float64)
            residual = torch.randn(len(requests), weight.shape[0], dtype=torch.float64) / 10
            problem = editor.module.problem(Site(layer, "mlp_out"), None, keys, residual, keys)
            change = WeightChange(name_of(editor.module.lm, layer), LeastSquares(1.0).solve(problem), keys)
            journal.apply(step, change, {})


def begun(lm, requests, folder, earlier):
    """An editor whose journal has a folder, after so many batches."""
    editor = editor_of(lm)
    editor.journal.open(editor.journal.store_at(folder / "journal"), RUN)
    for number in range(earlier):
        one_batch(editor, requests[2 * number : 2 * number + 2])
    return editor


@pytest.mark.parametrize(("earlier", "least"), [(0, 18), (2, 12)])
def test_every_moment_of_a_batch_is_a_place_to_fail(editor, requests, tmp_path, earlier, least):
    """The moments are counted by a batch that goes through; then one batch fails at each of them, in each way."""
    lm = editor.module.lm
    with STOPS.at(-1, None):
        one_batch(counted := begun(copy.deepcopy(lm), requests, tmp_path / "count", earlier), requests[4:6])
    first = max(place for place, moment in enumerate(STOPS.seen[:-1]) if moment[1:] == (f"change {name_of(lm, 1)}",))
    moments = STOPS.seen[first:]
    assert len(moments) == least
    assert len(counted.journal) == earlier + 1
    unedited = copy.deepcopy(lm)
    editor = begun(lm, requests, tmp_path / "run", earlier)
    before, files = state(lm, editor.module), content(tmp_path / "run")
    for place in range(len(moments) - 1):
        for error in ERRORS:
            with pytest.raises(error), STOPS.at(place, error):
                one_batch(editor, requests[4:6])
            assert [moment[:2] for moment in STOPS.seen][: place + 1] == [moment[:2] for moment in moments][: place + 1]
            assert state(lm, editor.module) == before, moments[place]
            assert content(tmp_path / "run") == files, moments[place]
            assert len(editor.journal) == earlier
    assert moments[-1][1] == "committed"
    with pytest.raises(RuntimeError), STOPS.at(len(moments) - 1, RuntimeError):  # too late: it is on disk
        one_batch(editor, requests[4:6])
    one_batch(editor, requests[:2])
    assert [step.number for step in editor.journal] == list(range(earlier + 2))
    assert verify(tmp_path / "run").faults == []
    fresh = editor_of(unedited)
    fresh.load(tmp_path / "run")
    assert state(unedited, fresh.module) == state(lm, editor.module)


def test_every_moment_of_a_rollback_is_a_place_to_fail(editor, requests, tmp_path):
    """As many times over as there are moments: edit, fail to take back, take back."""
    lm, expected, places = editor.module.lm, None, [-1, 0]
    for number, place in enumerate(places):
        fresh = editor_of(lm)
        fresh.fit(requests[:6], 2, evaluate=False, run_dir=tmp_path / f"run-{number}")
        before, files = state(lm, fresh.module), content(tmp_path / f"run-{number}")
        if place >= 0:
            with pytest.raises(RuntimeError), STOPS.at(place, RuntimeError):
                fresh.rollback(batch=1)
            assert state(lm, fresh.module) == before
            assert content(tmp_path / f"run-{number}") == files
        with STOPS.at(-1, None):
            fresh.rollback(batch=1)
        places += range(1, len(STOPS.seen)) if number == 0 else []
        expected = expected or state(lm, fresh.module)
        assert state(lm, fresh.module) == expected != before
        fresh.journal.rollback()
    assert len(places) >= 4


class Failing(LeastSquares):
    """A solver that fails in the second batch."""

    def solve(self, problem):
        if len(problem.history):
            raise torch.OutOfMemoryError("no memory left")
        return super().solve(problem)


@pytest.mark.parametrize("wrap", [lambda s: s, Rect, Prune], ids=["plain", "rect", "prune"])
def test_a_fit_that_fails_in_its_second_batch_keeps_the_first(lm, requests, tmp_path, wrap):
    editor = editor_of(lm, solver=wrap(Failing(0.5)))
    before = state(lm, editor.module)
    with pytest.raises(torch.OutOfMemoryError):
        editor.fit(requests[:5], 2, evaluate=False, run_dir=tmp_path / "run")
    assert [step.requests for step in editor.journal] == [tuple(requests[:2])]
    editor.rollback()
    assert state(lm, editor.module) == before


class LateError(Exception):
    pass


def raise_late(*_):
    raise LateError


@pytest.mark.parametrize("number", [signal.SIGALRM, signal.SIGTERM])
def test_what_a_signal_raises_does_not_fall_between_disk_and_memory(lm, requests, tmp_path, number):
    editor = begun(lm, requests, tmp_path / "run", 1)
    with STOPS.at(-1, None):
        one_batch(editor, requests[2:4])
    start = next(place for place, moment in enumerate(STOPS.seen) if moment[1] == "commit")
    places, usual = range(start, len(STOPS.seen)), signal.signal(number, raise_late)
    try:
        for count, place in enumerate(places, 3):
            with pytest.raises(LateError), STOPS.at(place, number):
                one_batch(editor, requests[4:6])
            assert len(editor.journal) == len(bodies(read_entries(tmp_path / "run/journal/ledger.jsonl"), BatchBody))
            assert len(editor.journal) == count
        with pytest.raises(LateError), STOPS.at(0, number):
            editor.rollback(2)
        assert len(editor.journal) == len(places)
    finally:
        signal.signal(number, usual)
    assert verify(tmp_path / "run").faults == []


@pytest.mark.parametrize("function", ["_note", "rollback"])
def test_an_exception_of_another_thread_leaves_memory_and_disk_agreeing(lm, requests, tmp_path, monkeypatch, function):
    """It comes out of nowhere, here once just behind the disk."""
    unedited, editor = copy.deepcopy(lm), begun(lm, requests, tmp_path / "run", 2)
    owner = editor.journal if function == "_note" else editor.journal.store
    usual = getattr(owner, function)

    def late(*arguments):
        monkeypatch.undo()
        if function == "rollback":
            usual(*arguments)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(LateError))

    monkeypatch.setattr(owner, function, late)
    with pytest.raises(LateError):
        one_batch(editor, requests[4:6]) if function == "_note" else editor.rollback(1)
    assert len(editor.journal) == (3 if function == "_note" else 1)
    one_batch(editor, requests[6:8])
    assert verify(tmp_path / "run").faults == []
    fresh = editor_of(unedited)
    fresh.load(tmp_path / "run")
    assert state(unedited, fresh.module) == state(lm, editor.module)


def test_a_batch_of_another_process_is_not_written_over(lm, requests, tmp_path):
    """Both go on from the same two batches: the second one to write is refused, and its model is as it was."""
    mine, other = copy.deepcopy(lm), copy.deepcopy(lm)
    begun(copy.deepcopy(lm), requests, tmp_path / "run", 2)
    editors = [editor_of(each) for each in (mine, other)]
    for editor in editors:
        editor.load(tmp_path / "run")
    one_batch(editors[1], requests[4:6])
    files, before = content(tmp_path / "run"), state(mine, editors[0].module)
    for act in (lambda: one_batch(editors[0], requests[6:8]), lambda: editors[0].rollback(1)):
        with pytest.raises(LedgerError, match="continued or changed by another process"):
            act()
        assert state(mine, editors[0].module) == before
        assert content(tmp_path / "run") == files
    assert verify(tmp_path / "run").faults == []


def test_a_change_may_have_a_tensor_named_as_target_values_are(lm, requests, tmp_path):
    journal = Journal(lm)
    journal.open(JournalStore(tmp_path), RUN)
    with journal.batch(requests[:1]) as step:
        journal.apply(step, Scaled("transformer.h.1.mlp", torch.tensor(2.0)), {})
    store = JournalStore(tmp_path)
    read = store.read_step(store.ledger.entries[-1])
    assert ([type(each.change) for each in read.changes], read.values) == ([Scaled], {})


def test_originals_are_on_disk_whatever_was_edited_before_without_a_folder(lm, requests, tmp_path):
    editor = editor_of(lm, {"logger": False})
    editor.fit(requests[:1], evaluate=False)
    editor.rollback()
    begun = editor.journal.store_at(tmp_path)
    editor.journal.open(begun, RUN)
    one_batch(editor, requests[:2])
    assert len(list(tmp_path.glob("original-*.safetensors"))) == len(LAYERS)


def test_a_run_that_is_refused_leaves_the_model_as_it_was(lm, requests, tmp_path):
    first, other = (copy.deepcopy(lm) for _ in range(2))
    earlier = editor_of(first)
    one_batch(earlier, requests[:2])
    earlier.journal.open(earlier.journal.store_at(tmp_path), RUN)
    before, again = state(other, editor_of(other).module), editor_of(other)
    with pytest.raises(ResumeError, match="edits"):
        again.journal.open(again.journal.store_at(tmp_path), RUN.model_copy(update={"edits": 7}))
    assert (len(again.journal), state(other, again.module)) == (0, before)
    again.journal.open(again.journal.store_at(tmp_path), RUN)
    assert len(again.journal) == 1


def test_files_that_links_lead_to_are_not_read(lm, requests, tmp_path):
    begun(lm, requests, tmp_path / "run", 1)
    name = "batch-00000.safetensors"
    (tmp_path / "run/journal" / name).rename(tmp_path / name)
    (tmp_path / "run/journal" / name).symlink_to(tmp_path / name)
    store = JournalStore(tmp_path / "run/journal")
    with pytest.raises(RunFolderError, match="leads out of"):
        store.read_step(store.ledger.entries[-1])
    assert any("is a link" in fault for fault in verify(tmp_path / "run").faults)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_waits_until_a_commit_is_through(lm, requests, tmp_path):
    """A real signal in the middle of it: the batch is committed, then the interrupt is raised."""
    editor = editor_of(lm)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    with STOPS.at(-1, None):
        one_batch(editor, requests[2:4])
    start = next(place for place, moment in enumerate(STOPS.seen) if moment[1] == "commit")
    for number, place in enumerate(range(start, len(STOPS.seen)), 3):
        with pytest.raises(KeyboardInterrupt), STOPS.at(place, signal.SIGINT):
            one_batch(editor, requests[4:6])
        assert len(editor.journal) == number
        entries = read_entries(tmp_path / "run/journal/ledger.jsonl")
        assert sum(entry.kind == "batch" for entry in entries) == number
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_weight_that_is_not_finite_leaves_nothing(lm, requests, tmp_path):
    class Wild(Solver):
        def solve(self, problem):
            update = LeastSquares(0.5).solve(problem)
            return type(update)(update.right, update.left * float("inf"))

    editor = editor_of(lm)
    before = state(lm, editor.module)
    editor.module.solver = Wild()
    with pytest.raises(NumericalError):
        editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    assert state(lm, editor.module) == before
    assert [entry.kind for entry in read_entries(tmp_path / "run/journal/ledger.jsonl")] == ["model", "run"]


def test_killed_processes_lose_nothing_that_was_acknowledged(tmp_path):
    """The short form of ``python tests/crash.py --kills 200``."""
    words = [sys.executable, str(Path(__file__).parents[1] / "crash.py"), "--kills", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "20 kills" in done.stdout


def test_files_that_change_under_an_open_run_change_nothing_in_it(lm, requests, tmp_path):
    unedited = copy.deepcopy(lm)
    editor = editor_of(lm)
    editor.fit(requests[:6], 2, evaluate=False, run_dir=tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    other = editor_of(unedited)
    other.load(tmp_path / "copy")
    for path in (tmp_path / "copy/journal").glob("*.safetensors"):
        os.truncate(path, 9)
    for each in (editor, other):
        each.rollback(batch=1)
    assert state(unedited, other.module) == state(lm, editor.module)
    other.rollback()
    with pytest.raises(LedgerError, match=r"batch-00000\.safetensors was changed after it was written"):
        other.load(tmp_path / "copy")


@pytest.mark.parametrize("earlier", ["two", None, [2]])
def test_a_forged_number_of_earlier_batches_is_named(tmp_path, earlier):
    forge(
        tmp_path / "ledger.jsonl", [("model", {"fingerprint": "0" * 64, "dtype": "torch.float32", "earlier": earlier})]
    )
    with pytest.raises(LedgerError, match=r"entry 0, earlier"):
        _ = JournalStore(tmp_path).earlier


@pytest.mark.parametrize("content", [torch.full((2, 3), float("nan")), torch.ones(3), torch.ones(2, 3).long()])
@pytest.mark.parametrize("name", ["target/3", "importance/3"])
def test_forged_target_values_and_importance_are_named(lm, requests, tmp_path, name, content):
    begun(lm, requests, tmp_path, 1)
    ledger, file = tmp_path / "journal" / "ledger.jsonl", tmp_path / "journal" / "batch-00000.safetensors"
    tensors = read_tensors(file, str(file), LedgerError, "").tensors
    file.unlink()
    write_tensors(file, {**tensors, name: content})
    entries = raw(ledger)
    entries[-1][1]["files"][file.name] = file_hash(file)
    forge(ledger, entries)
    store = JournalStore(tmp_path / "journal")
    with pytest.raises(LedgerError, match="batch 0: target values or importance are not finite matrices"):
        store.read_step(store.ledger.entries[-1])
