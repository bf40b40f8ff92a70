"""A run writes into a new folder or one of ours, and what a finished run wrote stays as it is."""

import copy

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from tiny_runs import content, editor_of, finished_run, module_of

from cakeflow import EditDataModule
from cakeflow.cli import run_command
from cakeflow.core.folder import is_finished, require_run_folder
from cakeflow.errors import ConfigError
from cakeflow.journal.audit import verify

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


def test_the_commands_write_no_config_beside_or_over_anything(lm, requests, tmp_path, monkeypatch):
    finished_run(copy.deepcopy(lm), tmp_path, requests)
    monkeypatch.chdir(tmp_path)
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
