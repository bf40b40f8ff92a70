"""A run folder belongs to one run, and one process at a time writes it."""

import copy
import json
import os
import threading

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import content, editor_of, module_of

from cakeflow import EditDataModule
from cakeflow.core.folder import RunLogger, run_folder, writing
from cakeflow.errors import LockedError, RunFolderError
from cakeflow.journal.audit import verify
from cakeflow.journal.ledger import read_entries
from cakeflow.journal.store import LEDGER
from cakeflow.storage.locks import locked


def kinds(folder):
    return [entry.kind for entry in read_entries(folder / "journal" / LEDGER)]


def test_a_number_is_claimed_when_it_is_first_asked_for(tmp_path):
    first, second, named = RunLogger(tmp_path, "x"), RunLogger(tmp_path, "x"), RunLogger(tmp_path, "", version="run")
    assert list(tmp_path.iterdir()) == []
    assert (first.version, second.version, first.version) == (0, 1, 0)
    assert first.log_dir == str(tmp_path / "x" / "version_0")
    assert named.log_dir == str(tmp_path / "run")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x"]


def test_two_runs_without_a_name_do_not_meet(lm, requests, tmp_path, monkeypatch):
    """The second one begins when the first one knows its folder and has written nothing."""
    monkeypatch.chdir(tmp_path)
    other, runs = copy.deepcopy(lm), []

    class Meanwhile(L.Callback):
        def setup(self, trainer, pl_module, stage):
            if len(runs) == 0:
                runs.append(None)
                runs[0] = editor_of(other).fit(requests[2:4], 1, evaluate=False)

    first = editor_of(lm, {"callbacks": [Meanwhile()]}).fit(requests[:2], 1, evaluate=False)
    folders = [first.folder, runs[0].folder]
    assert [each.name for each in folders] == ["version_0", "version_1"]
    for folder in folders:
        assert verify(folder).faults == []
        assert kinds(folder) == ["model", "run", "batch", "batch", "end"]


class Rival(L.Callback):
    """After the first batch, another thread tries to write the same run; so would another process."""

    def __init__(self, act):
        self.act, self.errors = act, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        def attempt():
            try:
                self.act()
            except LockedError as error:
                self.errors.append(str(error))

        if batch_idx == 0:
            thread = threading.Thread(target=attempt)
            thread.start()
            thread.join()


@pytest.mark.parametrize("way", ["editor", "trainer"])
def test_a_run_is_written_by_one_process_while_it_goes_on(lm, requests, tmp_path, way):
    folder, other = tmp_path / "run", copy.deepcopy(lm)
    rival = Rival(lambda: editor_of(other).fit(requests[:3], 1, evaluate=False, run_dir=folder))
    if way == "editor":
        editor_of(lm, {"callbacks": [rival]}).fit(requests[:3], 1, evaluate=False, run_dir=folder)
    else:
        trainer = L.Trainer(max_epochs=1, logger=CSVLogger(tmp_path, name="", version="run"), log_every_n_steps=1,
                            callbacks=[rival], enable_progress_bar=False, enable_checkpointing=False)  # fmt: skip
        trainer.fit(module_of(lm), datamodule=EditDataModule(requests[:3], 1))
    (error,) = rival.errors
    assert f"process {os.getpid()}, since" in error
    assert kinds(folder)[:5] == ["model", "run", "batch", "batch", "batch"]
    assert verify(folder).faults == []
    with locked(folder / "journal" / LEDGER):  # free again
        pass


def test_a_run_that_failed_is_free_again(lm, requests, tmp_path):
    class Failing(L.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("no")

    for run in (1, 2):
        with pytest.raises(RuntimeError, match="no"):
            editor_of(copy.deepcopy(lm), {"callbacks": [Failing()]}).fit(
                requests[:3], 1, evaluate=False, run_dir=tmp_path / "run"
            )
        assert kinds(tmp_path / "run") == ["model", "run", "batch"], run
    editor_of(lm).fit(requests[:3], 1, evaluate=False, run_dir=tmp_path / "run")
    assert kinds(tmp_path / "run") == ["model", "run", "batch", "batch", "batch", "end"]


@pytest.mark.parametrize("name", ["metrics.csv", "hparams.yaml", "journal"])
def test_nothing_is_written_through_a_link_in_a_run_folder(lm, requests, tmp_path, name):
    (tmp_path / "run").mkdir()
    target = tmp_path / "of somebody else"
    target.mkdir() if name == "journal" else target.write_text(json.dumps("precious"))
    (tmp_path / "run" / name).symlink_to(target)
    before = content(tmp_path)
    with pytest.raises(RunFolderError, match="leads out of"):
        editor_of(lm).fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    assert content(tmp_path) == before
    assert not list(target.iterdir()) if name == "journal" else True


def test_a_trainer_without_a_folder_needs_no_lock():
    trainer = L.Trainer(logger=False, enable_checkpointing=False)
    assert run_folder(trainer) is None
    with writing(trainer) as folder:
        assert folder is None
