"""A batch is done whole or not at all, in memory and on disk, wherever it is stopped."""

import copy
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bodies import forge
from cakeflow_restrain import Prune, Rect
from stops import STOPS
from tiny_runs import LAYERS, content, editor_of, name_of, state

from cakeflow import LeastSquares
from cakeflow.errors import LedgerError, NumericalError
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.ledger import read_entries
from cakeflow.journal.schema import RunBody
from cakeflow.journal.store import JournalStore
from cakeflow.models import Site
from cakeflow.solvers import Solver

RUN = RunBody(model="tiny", settings={}, edits=0, batch_size=1, data="", who="", versions={}, threads=1)
ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError, OSError]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def editor(tiny, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    editor = begun(lm, requests, tmp_path / "run", earlier)
    before, files = state(lm, editor.module), content(tmp_path / "run")
    for place in range(len(moments)):
        for error in ERRORS:
            with pytest.raises(error), STOPS.at(place, error):
                one_batch(editor, requests[4:6])
            assert [moment[:2] for moment in STOPS.seen][: place + 1] == [moment[:2] for moment in moments][: place + 1]
            assert state(lm, editor.module) == before, moments[place]
            assert content(tmp_path / "run") == files, moments[place]
            assert len(editor.journal) == earlier
    one_batch(editor, requests[4:6])
    assert [step.number for step in editor.journal] == list(range(earlier + 1))


def test_every_moment_of_a_rollback_is_a_place_to_fail(editor, requests, tmp_path):
    """As many times over as there are moments: edit, fail to take back, take back."""
    lm, wanted, places = editor.module.lm, None, [-1, 0]
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
        wanted = wanted or state(lm, fresh.module)
        assert state(lm, fresh.module) == wanted != before
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
