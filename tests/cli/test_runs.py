"""Commands that read run folders, run in this process."""

import copy
import shutil

import pytest
from tiny_runs import finished_run

from cakeflow.cli.command_line import run_command as main
from cakeflow.journal.audit import verify


@pytest.fixture(scope="module")
def finished(_models, tmp_path_factory, requests):
    """A finished run of three batches, beside the unedited model."""
    folder = tmp_path_factory.mktemp("finished")
    finished_run(copy.deepcopy(_models["llama"]), folder, requests)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy to spoil."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_log_verify_replay_and_rollback(finished, run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    model = str(finished.parent / "model")
    entries = main(["log", str(run)])
    printed = capsys.readouterr().out
    assert len(entries) == 8
    for word in ("batch 2, 2 edits", "evaluation", entries[-1].hash[:12]):
        assert word in printed
    main(["verify", str(run)])
    assert entries[-1].hash in capsys.readouterr().out
    main(["replay", str(run), "--model", model])
    assert "3 batches, 6 edits" in capsys.readouterr().out
    main(["rollback", str(run), "-n", "1", "--model", model])
    assert "batch 2 taken back, 2 remain" in capsys.readouterr().out
    assert verify(run).faults == []
    main(["rollback", str(run), "--batch", "0", "--model", model])
    assert main(["log", str(run)])[-1].body.batches == [0]
    assert len(main(["replay", str(run), "--model", model])) == 1
    with pytest.raises(SystemExit):
        main(["rollback", str(run), "--batch", "7", "--model", model])
    assert "no single batch 7" in capsys.readouterr().err
    assert "Batch 0 taken back by" in main(["report", str(run)]).read_text()
    assert "batch 2 taken back by" in main(["compare", str(run)])[0]["taken back"]
    (run / "run.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["verify", str(run)])
    assert "run.json was changed" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code == 2
    assert "no run.json" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "report.html").exists()
