"""A run writes into a new folder or one of ours, alone, and what a finished run wrote stays as it is."""

import copy
import json
import os
import threading

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import content, editor_of, finished_run, module_of

from cakeflow import EditDataModule
from cakeflow.cli import run_command
from cakeflow.core.folder import RunLogger, is_finished, require_run_folder, run_folder, writing
from cakeflow.errors import ConfigError, LockedError, RunFolderError
from cakeflow.journal.audit import verify
from cakeflow.journal.ledger import read_entries
from cakeflow.journal.store import LEDGER
from cakeflow.storage.locks import locked

MINE = {
    "metrics.csv": "my,own\n1,2\n", "run.json": "{}", "before.jsonl": "mine\n", "config.yaml": "a: 1\n",
    "now.jsonl": "mine\n", "notes.txt": "mine", ".hidden": "", "sub/deep/file": "mine", "journal/ledger.txt": "mine",
}  # fmt: skip


@pytest.fixture(params=MINE)
def folder(request, tmp_path):
    """A folder with a file of the user's."""
    path = tmp_path / "mine" / request.param
    path.parent.mkdir(parents=True)
    path.write_text(MINE[request.param])
    return tmp_path / "mine"


def logger_at(folder):
    return CSVLogger(folder.parent, name="", version=folder.name)


def test_nothing_of_the_users_is_written_over(lm, requests, folder):
    files, weights = content(folder), lm.fingerprint()
    ways = [
        lambda: editor_of(lm).fit(requests[:2], run_dir=folder),
        lambda: editor_of(lm, {"logger": logger_at(folder)}).evaluate(requests[:2]),
        lambda: L.Trainer(
            max_epochs=1, logger=logger_at(folder), enable_checkpointing=False, enable_progress_bar=False
        ).fit(module_of(lm), datamodule=EditDataModule(requests[:2])),
    ]
    for way in ways:
        with pytest.raises(ConfigError, match=r"holds files that no run wrote \(.*\); choose a new folder"):
            way()
        assert content(folder) == files
    assert lm.fingerprint() == weights


def test_empty_folders_and_those_of_evaluations_are_taken(lm, requests, tmp_path):
    (tmp_path / "run" / "journal").mkdir(parents=True)
    require_run_folder(tmp_path / "run")
    editor = editor_of(lm, {"logger": logger_at(tmp_path / "run")})
    editor.evaluate(requests[:2])
    editor.evaluate(requests[:2])
    assert editor.fit(requests[:2]).folder == tmp_path / "run"
    assert verify(tmp_path / "run").faults == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is a file; choose another one"):
        require_run_folder(tmp_path / "file")


def test_an_evaluation_leaves_a_finished_run_as_it_is(lm, requests, tmp_path):
    editor = editor_of(lm, {"logger": logger_at(tmp_path / "run")})
    editor.fit(requests[:2])
    assert is_finished(tmp_path / "run")
    files = content(tmp_path / "run")
    with pytest.warns(UserWarning, match="run holds a finished run, which stays as it is: nothing is logged there"):
        result = editor.evaluate(requests[:2])
    assert len(result.requests) == 2
    trainer = L.Trainer(logger=logger_at(tmp_path / "run"), enable_progress_bar=False, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="finished run"):
        trainer.validate(editor.module, datamodule=EditDataModule(requests[:2]), verbose=False)
    assert content(tmp_path / "run") == files
    assert verify(tmp_path / "run").faults == []


def test_the_commands_write_no_config_beside_or_over_anything(lm, requests, tmp_path):
    finished_run(copy.deepcopy(lm), tmp_path, requests)
    (tmp_path / "config.yaml").write_text("mine: 1")
    files = content(tmp_path)
    words = ["evaluate", "--model", str(tmp_path / "model"), "--model.layers=[1]", "--data", "builtin",
             "--data.limit=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
    with pytest.warns(UserWarning, match="finished run"):
        run_command([*words, "--run_dir=run"])
    run_command([*words, "--trainer.logger=false"])
    assert content(tmp_path) == files
    run_command([*words, "--run_dir=other"])
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["config.yaml", "metrics.csv", "now.jsonl"]


# ---- one process at a time ----


def kinds(folder):
    return [entry.kind for entry in read_entries(folder / "journal" / LEDGER)]


def test_a_number_is_claimed_when_it_is_first_asked_for(tmp_path):
    first, second, named = RunLogger(tmp_path, "x"), RunLogger(tmp_path, "x"), RunLogger(tmp_path, "", version="run")
    assert list(tmp_path.iterdir()) == []
    assert (first.version, second.version, first.version) == (0, 1, 0)
    assert first.log_dir == str(tmp_path / "x" / "version_0")
    assert named.log_dir == str(tmp_path / "run")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x"]


def test_two_runs_without_a_name_do_not_meet(lm, requests):
    """The second one begins when the first one knows its folder and has written nothing."""
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
