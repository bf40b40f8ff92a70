"""Single facts are taken back: they answer as before, and everything else as after."""

import copy
import json
from dataclasses import replace

import lightning as L
import pytest
import torch
from cakeflow_restrain import Prune
from tiny_runs import content, editor_of, finished_run, state

from cakeflow import EditDataModule, GradientSearch, LeastSquares
from cakeflow.cli.command_line import run_command as main
from cakeflow.data import builtin_facts
from cakeflow.errors import ConfigError, ResumeError, SharedKeyWarning
from cakeflow.evaluation.scoring import score_records
from cakeflow.journal import Journal, verify
from cakeflow.journal.ledger import read_entries, requests_in_force
from cakeflow.models import Site
from cakeflow.models.language import LanguageModel
from cakeflow.report import RunFolder
from cakeflow.solvers import Descent, FromScratch


def bare(requests):
    return [replace(request, probes=()) for request in requests]


def strong_editor(lm):
    """An editor whose edits arrive whole: second moments hold hardly anything back."""
    moment = 1e-9 * torch.eye(lm.key_width(Site(0, "mlp_out")), dtype=torch.float64)
    targets = GradientSearch(steps=12, lr=0.5)
    return editor_of(lm, moments=dict.fromkeys([1, 3], moment), targets=targets, solver=LeastSquares(1e-9))


def values(editor, facts):
    """The facts' values at the last value site."""
    module = editor.module
    return module.targets.measure(module.lm, module.encode(facts), 3).initial


def test_a_fact_is_where_it_would_be_without_its_batch_and_the_others_stay(tiny):
    """Two batches; the second fact of the first one is taken back."""
    facts = bare(builtin_facts()[:6])
    editor = strong_editor(tiny)
    before = values(editor, facts)
    editor.fit(facts, 3, evaluate=False)
    edited = values(editor, facts)
    with editor.journal.reverted(editor.journal.steps[1:]):
        without = values(editor, facts)
    (row,) = editor.undo(facts[1].subject)
    after = values(editor, facts)
    assert (after[1] - without[1]).norm() < 0.05 * (edited[1] - without[1]).norm()
    moved = (after - edited).norm(dim=1) / (edited - before).norm(dim=1)
    assert moved[[0, 2]].max() < 1e-3  # its batch is held
    assert moved[3:].max() < 0.25  # as by any other edit: these random models have keys that are much alike
    assert row["prompt"] == facts[1].text
    assert row["after"] == editor.ask(facts[1].text)
    assert editor.journal.edits == 5
    assert len(editor.journal) == 3


def test_what_was_taken_back_comes_back(lm):
    editor = strong_editor(lm)
    editor.fit(bare(builtin_facts()[:3]), evaluate=False)
    before = state(lm, editor.module)
    editor.undo(builtin_facts()[0].subject)
    assert state(lm, editor.module) != before
    editor.rollback(1)
    assert state(lm, editor.module) == before
    assert editor.journal.edits == 3
    editor.undo(builtin_facts()[0].subject)
    editor.rollback(batch=0)  # what was taken back from it goes with it
    assert len(editor.journal) == 0


def test_of_a_fact_that_was_edited_twice_the_last_edit_goes_first(lm):
    facts = bare(builtin_facts()[:2])
    editor = strong_editor(lm)
    before = values(editor, facts)
    editor.fit(facts, evaluate=False)
    once = values(editor, facts)
    editor.fit(facts[:1], evaluate=False)
    editor.undo(facts[0].text)  # both of its edits, the last one first
    assert [step.undone for step in editor.journal[2:]] == [editor.journal[1].hashes] * 2
    after = values(editor, facts)
    assert (after[0] - before[0]).norm() < 0.1 * (once[0] - before[0]).norm()
    assert (after[1] - once[1]).norm() < 0.1 * (once[1] - before[1]).norm()
    assert editor.journal.edits == 1


def test_a_fact_that_another_replaced_is_not_there_to_be_taken_back(lm):
    """Its key has the other's value, which stays; without the other, it is in force again and can be."""
    first = bare(builtin_facts()[:2])
    other = replace(first[0], prompt="{} is known for", target_new="chess")
    editor = strong_editor(lm)
    editor.fit(first, evaluate=False)
    with pytest.warns(SharedKeyWarning):
        editor.fit([other], evaluate=False)
    before = lm.fingerprint()
    with pytest.raises(
        ConfigError, match=r"of batch 0 is out of force: 'LeBron James is known for' of batch 1 has its"
    ):
        editor.undo(first[0].text)
    assert (lm.fingerprint(), editor.journal.edits) == (before, 2)
    editor.undo(other.text)
    assert editor.journal.edits == 2
    editor.undo(first[0].text)
    assert editor.journal.edits == 1


def test_it_is_on_record_and_repeated_bit_for_bit(lm, requests, tmp_path):
    editor = finished_run(lm, tmp_path, requests)
    editor.undo(requests[2].subject.upper())
    after = state(lm, editor.module)
    assert verify(tmp_path / "run").faults == []
    editor.rollback()
    journal = Journal(LanguageModel.wrap(lm.model, lm.tokenizer))
    journal.load(tmp_path / "run" / "journal")
    assert journal.edits == 0  # the rollback is on record too
    lines = (tmp_path / "run" / "journal" / "ledger.jsonl").read_text().splitlines()
    (tmp_path / "copy").mkdir()
    for path in (tmp_path / "run" / "journal").iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    kept = [line for line in lines if json.loads(line)["kind"] != "rollback"]
    (tmp_path / "copy" / "ledger.jsonl").write_text("".join(f"{line}\n" for line in kept))
    again = editor_of(lm)
    again.journal.load(tmp_path / "copy")
    assert state(lm, again.module) == after
    assert again.journal.edits == 5


def test_a_name_is_a_text(lm):
    for name in (3, None):
        with pytest.raises(ConfigError, match=f"name must be a subject.*got {name}"):
            editor_of(lm).undo(name)


@pytest.mark.parametrize("name", ["Nobody", "", "\ud800"])
def test_a_name_that_is_not_there(lm, name):
    editor = editor_of(lm)
    editor.fit(bare(builtin_facts()[:2]), evaluate=False)
    before = lm.fingerprint()
    with pytest.raises(ConfigError, match=r"no fact in force is about .*; there are facts about LeBron James, Lyon"):
        editor.undo(name)
    editor.undo("LeBron James")
    with pytest.raises(ConfigError, match="there are facts about Lyon"):
        editor.undo("LeBron James")
    editor.rollback(1)
    assert lm.fingerprint() == before


def test_the_command(lm, requests, tmp_path, capsys):
    finished_run(lm, tmp_path, requests)
    (tmp_path / "method.yaml").write_text(
        "model:\n  statistics: {tokens: 1024, window: 32, batch_tokens: 1024}\n  contexts: {groups: [['{}']]}\n"
    )
    before = content(tmp_path / "run")
    words = ["--model", str(tmp_path / "model"), "--method", str(tmp_path / "method.yaml"), "--layers", "[1, 3]"]
    main(["undo", str(tmp_path / "run"), requests[1].subject, *words])
    printed = capsys.readouterr().out
    assert requests[1].subject in printed
    assert "1 fact taken back, 5 remain" in printed
    after = content(tmp_path / "run")
    assert {name for name in before if before[name] != after[name]} == {"journal/ledger.jsonl"}
    assert verify(tmp_path / "run").faults == []
    edits = RunFolder.read(tmp_path / "run").edits
    assert [each.subject for each in edits if each.rollback] == [requests[1].subject]
    ledger = list(read_entries(tmp_path / "run/journal/ledger.jsonl"))
    assert [each["subject"] for each in requests_in_force(ledger)] == [r.subject for r in [requests[0], *requests[2:6]]]
    capsys.readouterr()
    main(["log", str(tmp_path / "run")])
    assert "batch 3, 1" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.real
@pytest.mark.slow
def test_one_of_twelve_facts_of_the_real_model(real_editor):
    """The others still take, and the old answer is back."""
    facts = bare(builtin_facts()[:12])
    editor = real_editor("memit", layers=[6, 7, 8], targets={"steps": 15})
    prompts = [fact.text for fact in facts]
    before = editor.ask(prompts)
    editor.fit(facts, evaluate=False)
    correct = score_records(editor.module.lm, facts).correct
    assert correct.sum() >= 11
    chosen = next(i for i in range(12) if correct[i])
    (row,) = editor.undo(prompts[chosen])
    assert row["after"].split()[0] == before[chosen].split()[0]
    now = score_records(editor.module.lm, facts).correct
    assert not now[chosen]
    others = torch.arange(12) != chosen
    assert torch.equal(now[others], correct[others])


def test_a_solver_that_descends_to_the_targets_takes_back_whole_batches_only(lm, requests):
    editor = editor_of(lm, {"logger": False}, solver=Descent(steps=2))
    editor.fit(bare(requests[:2]), evaluate=False)
    before = state(lm, editor.module)
    with pytest.raises(ConfigError, match=r"Descent takes back whole batches only: rollback\(batch=0\)"):
        editor.undo(requests[0].subject)
    assert state(lm, editor.module) == before
    assert len(editor.journal) == 1


def test_a_fact_of_the_only_batch_goes_where_all_facts_are_solved_from_scratch(lm, requests):
    moment = 1e-9 * torch.eye(lm.key_width(Site(0, "mlp_out")), dtype=torch.float64)
    parts = {"targets": GradientSearch(steps=12, lr=0.5), "moments": dict.fromkeys([1, 3], moment)}
    editor = editor_of(lm, {"logger": False}, solver=FromScratch(LeastSquares(1e-9)), **parts)
    facts = bare(requests[:2])
    editor.fit(facts, evaluate=False)
    both = values(editor, facts)
    editor.undo(requests[0].subject)
    with editor.reverted():
        unedited = values(editor, facts)
    now = values(editor, facts)
    assert (now[0] - unedited[0]).norm() < 0.1 * (both[0] - unedited[0]).norm()
    assert (now[1] - both[1]).norm() < 0.1 * (both[1] - unedited[1]).norm()
    editor.undo(requests[1].subject)
    editor.fit(bare(requests[2:3]), evaluate=False)
    assert editor.journal.edits == 1


@pytest.mark.filterwarnings("ignore:the run was stopped")
def test_an_interrupted_run_of_which_a_fact_was_taken_back_does_not_go_on(lm, requests, tmp_path):
    fresh, facts = copy.deepcopy(lm), bare(requests[:4])

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    editor = editor_of(lm, {"callbacks": [Stop()]})
    editor.fit(facts, 2, evaluate=False, run_dir=tmp_path / "run")
    editor.undo(requests[0].subject)
    with pytest.raises(ResumeError, match="holds a rolled-back run"):
        editor_of(fresh).fit(facts, 2, evaluate=False, run_dir=tmp_path / "run")


@pytest.mark.filterwarnings("ignore:the run was stopped")
def test_taking_a_fact_back_does_not_complete_a_run_that_was_stopped(lm, requests, tmp_path):
    """A solver's last word, such as PRUNE's damping, is that of a run whose batches are all there."""

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    editor, facts = editor_of(lm, {"callbacks": [Stop()]}, solver=Prune(LeastSquares(0.5))), bare(requests[:4])
    editor.fit(facts, 2, evaluate=False, run_dir=tmp_path / "run")
    editor.undo(requests[0].subject)
    editor.undo(requests[1].subject)
    assert [step.completes for step in editor.journal] == [False] * 3


@pytest.mark.filterwarnings("ignore:the run was stopped")
def test_a_stopped_run_without_a_folder_is_completed_behind_one_that_had_a_folder(lm, requests, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    editor, facts = editor_of(lm, solver=Prune(LeastSquares(0.5))), bare(requests[:6])
    editor.fit(facts[:2], evaluate=False, run_dir=tmp_path / "run")
    trainer = L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[Stop()], max_epochs=1
    )
    trainer.fit(editor.module, datamodule=EditDataModule(facts[2:], 2))
    assert [step.completes for step in editor.journal][-1]
