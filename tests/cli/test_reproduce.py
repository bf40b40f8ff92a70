"""``cakeflow reproduce`` in this process: exit status 0 if all is as recorded, 1 with what differs, 2 with a reason."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from bodies import forge, raw
from tiny_runs import content, editor_of

from cakeflow.cli.command_line import run_command as main
from cakeflow.testing import tiny_model

FACTS = [
    {"prompt": "{} plays the sport of", "subject": "LeBron James", "target_new": "tennis"},
    {"prompt": "{} is in", "subject": "Lyon", "target_new": "Spain"},
]
QUICK = ["--data.batch_size=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
EDIT = ["--model.layers=[0,1]", "--model.targets.steps=3", "--model.statistics.tokens=2048",
        "--model.contexts=Contexts"]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model and facts, with a finished run of two batches."""
    folder = tmp_path_factory.mktemp("work")
    lm = tiny_model()
    lm.model.save_pretrained(folder / "toy")
    lm.tokenizer.save_pretrained(folder / "toy")
    (folder / "facts.json").write_text(json.dumps(FACTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["cakeflow"])
        patch.setenv("CAKEFLOW_CACHE", str(folder / "cache"))  # the user's may have been filled by other threads
        patch.chdir(folder)
        main(["fit", "--method=memit_seq", "--model=toy", "--data=facts.json", "--run_dir=run", *QUICK, *EDIT])
    return folder


@pytest.fixture(autouse=True)
def there(work, tmp_path, monkeypatch):
    """Commands run in a copy of the folder."""
    shutil.copytree(work, tmp_path / "work")
    monkeypatch.setattr(sys, "argv", ["cakeflow"])
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path / "work"


def spoil(kind, change):
    """Change the first body of a kind in the run's ledger, and give it sound hashes."""
    path = Path("run/journal/ledger.jsonl")
    entries = raw(path)
    change(next(content for name, content in entries if name == kind))
    forge(path, entries)


def refused(words, capsys):
    """The reason for which a command is refused."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_run_comes_out_again_from_its_folder_and_from_its_ledger_alone(capsys):
    before = content(Path("run"))
    result = main(["reproduce", "run", "--run_dir", "again"])
    printed = capsys.readouterr().out
    assert result.equal
    assert "2 batches in 2 places of the model: the same SHA-256, all numbers and outcomes as recorded" in printed
    assert "all of it: again/reproduce.json" in printed
    assert json.loads(Path("again/reproduce.json").read_text())["same_weights"] is True
    assert content(Path("run")) == before
    shutil.move("run/journal/ledger.jsonl", "alone.jsonl")
    assert main(["reproduce", "alone.jsonl", "--model", "toy"]).equal
    assert "note: the tensors of the run are not beside its ledger" in " ".join(capsys.readouterr().out.split())
    assert main(["reproduce", "again"]).equal  # a repetition is a run


def test_a_tampered_number_and_a_tampered_setting_are_reported_with_their_sizes(capsys):
    spoil("batch", lambda body: body["numbers"].update({"layer0/update": body["numbers"]["layer0/update"] * 4}))
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "run"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "0.75 (layer0/update)" in printed
    assert "the same SHA-256, 1 batches and 0 metrics differ" in printed
    spoil("run", lambda body: body["method"]["init_args"]["targets"]["init_args"].update(lr=0.05))
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "run"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "settings: targets was GradientSearch" in printed
    assert "other weights, 2 batches and " in printed
    assert "of the update" in printed


def test_a_run_of_python_says_no_method_until_one_is_named(capsys, requests):
    lm = tiny_model()
    editor_of(lm, layers=[0, 1], moments=None).fit(FACTS, run_dir="python")
    words = ["reproduce", "python", "--model", "toy"]
    assert "does not say how its method was built" in refused(words, capsys)
    with pytest.raises(SystemExit) as stop:
        main([*words, "--method", "alphaedit", "--layers", "[0, 1]"])
    assert stop.value.code == 1
    assert "settings: targets was" in capsys.readouterr().out


def test_layers_without_a_method_are_refused(capsys):
    assert "belong to --method" in refused(["reproduce", "run", "--layers", "[0]"], capsys)


def test_another_model_is_refused(there, capsys):
    lm = tiny_model()
    next(iter(lm.model.parameters())).data[0, 0] += 1
    lm.model.save_pretrained("other")
    lm.tokenizer.save_pretrained("other")
    reason = refused(["reproduce", "run", "--model", "other", "--run_dir", "again"], capsys)
    assert "is not the model of the run" in reason
    assert not Path("again").exists()


def test_no_class_of_a_stranger_is_built_and_no_trust_is_taken_from_a_record(capsys):
    spoil("run", lambda body: body["method"]["init_args"].update(solver={"class_path": "stranger.Solver"}))
    assert "stranger.Solver" in refused(["reproduce", "run"], capsys)
    spoil("run", lambda body: body["method"]["init_args"].update(solver={"class_path": "os.system"}))
    assert "os.system" in refused(["reproduce", "run"], capsys)
    spoil("run", lambda body: body["method"]["init_args"].update(model_kwargs={"trust_remote_code": True}))
    assert "config" in refused(["reproduce", "run"], capsys)


@pytest.mark.parametrize("command", ["reproduce", "replay", "rollback", "export"])
def test_python_of_a_model_does_not_run_because_a_ledger_says_so(there, command, capsys):
    """Nor is any other argument of transformers taken from it."""
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    config = json.loads(Path("toy/config.json").read_text())
    Path("toy/config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "own"}))
    Path("toy/modeling_own.py").write_text(f"open({str(there / 'ran')!r}, 'w').close()\n")
    spoil("run", lambda body: body.update(loading={"trust_remote_code": "yes"}))
    words = {"rollback": ["rollback", "run"], "export": ["export", "run", "out"]}.get(command, [command, "run"])
    assert "loading.trust_remote_code" in refused(words, capsys)
    assert not Path("ran").exists()


def test_a_class_that_is_imported_on_the_command_line_is_built(there, monkeypatch, capsys):
    (there / "laboratory.py").write_text(
        "from dataclasses import dataclass\nfrom cakeflow.solvers import LeastSquares, Solver\n\n\n"
        "@dataclass(frozen=True)\nclass Mine(Solver):\n    def solve(self, problem):\n"
        "        return LeastSquares(0.5).solve(problem)\n"
    )
    monkeypatch.syspath_prepend(str(there))
    spoil("run", lambda body: body["method"]["init_args"].update(solver={"class_path": "laboratory.Mine"}))
    assert "laboratory.Mine" in refused(["reproduce", "run"], capsys)
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "run", "--import", "laboratory", "--trust_remote_code"])
    assert stop.value.code == 1
    assert "is Mine()" in capsys.readouterr().out


def test_a_side_memory_is_compared_by_its_module(capsys):
    words = ["--model.layer=1", "--model.training.steps=3"]
    main(["fit", "--method=grace", "--model=toy", "--data=facts.json", "--run_dir=memory", *QUICK, *words])
    result = main(["reproduce", "memory"])
    assert result.equal
    assert all(batch.places for batch in result.batches)
    assert "the same SHA-256" in capsys.readouterr().out


def test_a_method_that_changes_nothing_in_the_model_is_compared_by_its_numbers(capsys):
    main(["fit", "--method=retrieval", "--model=toy", "--data=facts.json", "--run_dir=context", *QUICK])
    assert main(["reproduce", "context"]).equal
    assert "in no places of the model: nothing to change there" in capsys.readouterr().out


def test_texts_that_are_not_on_record_come_from_the_data(capsys):
    fit = ["fit", "--method=memit_seq", "--model=toy", "--data=facts.json", *QUICK, *EDIT]
    main([*fit, "--run_dir=discreet", "--model.record_texts=false"])
    assert "not their texts" in refused(["reproduce", "discreet"], capsys)
    assert main(["reproduce", "discreet", "--data", "facts.json"]).equal
