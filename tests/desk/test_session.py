"""A session: what is looked at changes nothing, what is applied lasts, what is taken back is gone bit for bit."""

import warnings

import pytest
from tiny_runs import content, editor_of, state

from cakeflow.callbacks import PolicyGuard
from cakeflow.desk.session import collecting
from cakeflow.errors import (
    ConfigError,
    LedgerError,
    LockedError,
    PolicyError,
    RequestError,
    RequestWarning,
    ResumeError,
    RunFolderError,
)
from cakeflow.journal import Policy, read_entries, replay, verify
from cakeflow.journal.provenance import circumstances
from cakeflow.report import RunFolder, render_page
from cakeflow.storage.locks import locked

from .conftest import FACT, OTHER


def kinds(folder):
    return [entry.kind for entry in read_entries(folder / "journal" / "ledger.jsonl")]


def test_looking_changes_nothing_and_says_what_would_be(opened, tmp_path):
    with opened() as session:
        before, files = state(session.module.lm, session.module), content(tmp_path / "run")
        view = session.look(*FACT)
        assert state(session.module.lm, session.module) == before
        assert content(tmp_path / "run") == files
    fact = view["fact"]
    assert fact["text"][fact["start"] : fact["end"]] == fact["subject"] == "LeBron James"
    assert {check["kind"] for check in fact["checks"]} == {"paraphrase", "neighborhood"}
    assert view["answers"]["completion"] == session.editor.ask(FACT[0])
    assert "".join(token["text"] for token in view["tokens"] if not token["special"]) == FACT[0]
    assert "".join(token["text"] for token in view["tokens"] if token["subject"]).strip() == "LeBron James"
    (written,) = [place for place, token in enumerate(view["tokens"]) if token["written"]]
    last = max(place for place, token in enumerate(view["tokens"]) if token["subject"])
    assert (written == last) or view["tokens"][last]["blocked"]
    assert (view["refusals"], view["earlier"]) == ([], [])


@pytest.mark.checks
def test_a_try_leaves_model_folder_and_numbers_as_they_were(opened, tmp_path):
    with opened() as session:
        session.apply(*FACT)
        before, files = state(session.module.lm, session.module), content(tmp_path / "run")
        view = session.preview(*OTHER)
        assert state(session.module.lm, session.module) == before
        assert content(tmp_path / "run") == files
        assert {row["topic"] for row in view["outcome"]["rows"]} >= {"fact"}
        session.apply(*OTHER)
        assert [step.number for step in session.journal] == [0, 1]


@pytest.mark.checks
def test_what_is_applied_is_a_run_that_every_command_reads(opened, tmp_path):
    folder = tmp_path / "run"
    with opened() as session:
        session.module.lm.model.save_pretrained(tmp_path / "model")
        session.module.lm.tokenizer.save_pretrained(tmp_path / "model")
        view = session.apply(*FACT)
        session.apply(*OTHER)
        after = session.journal.state()
        rows = session.state()["journal"]
    assert "facts learned" in view["outcome"]["verdict"]
    assert [row["text"] for row in rows] == [OTHER[0], FACT[0]]
    assert all(row["before"] is not None and row["can_undo"] for row in rows)
    assert kinds(folder) == ["model", "run", *["evaluation", "batch", "evaluation"] * 2]
    assert verify(folder).faults == []
    again = replay(folder, str(tmp_path / "model")).state()
    assert all(bool((again[name] == each).all()) for name, each in after.items())
    run = RunFolder.read(folder)
    assert {each.prompt for each in run.answers if each.topic == "fact"} == {FACT[0], OTHER[0]}
    assert FACT[0] in render_page(run)


def test_opened_again_it_goes_on_where_it_was(opened, tmp_path):
    with opened() as session:
        session.apply(*FACT)
        before, view = state(session.module.lm, session.module), session.state()
    with opened() as session:
        assert state(session.module.lm, session.module) == before
        assert session.state() == view
        session.apply(*OTHER)
        assert [row["text"] for row in session.state()["journal"]] == [OTHER[0], FACT[0]]
    assert kinds(tmp_path / "run").count("run") == 1
    with opened(seed=7) as session:  # other settings are put on record
        assert session.journal.edits == 2
    assert kinds(tmp_path / "run").count("run") == 2
    assert verify(tmp_path / "run").faults == []


def test_a_fact_alone_in_its_batch_goes_bit_for_bit_and_the_later_one_stays(opened, tmp_path):
    with opened() as session:
        empty = state(session.module.lm, session.module)
        session.apply(*FACT)
        first = state(session.module.lm, session.module)
        session.apply(*OTHER)
        view = session.undo(1, 0)
        assert view["rows"][0]["prompt"] == OTHER[0]
        assert state(session.module.lm, session.module) == first
        session.undo(0, 0)
        assert state(session.module.lm, session.module) == empty
        rows = session.state()["journal"]
        assert [(row["state"], row["can_undo"]) for row in rows] == [("taken back", False)] * 2
        assert all(row["undone"] for row in rows)
        with pytest.raises(ConfigError, match="batch 0 has no fact 0"):
            session.undo(0, 0)
    assert verify(tmp_path / "run").faults == []


@pytest.mark.filterwarnings("ignore::cakeflow.errors.SharedKeyWarning")
@pytest.mark.parametrize("texts", [True, False])
def test_a_fact_that_was_replaced_cannot_be_taken_back_before_the_one_in_its_place(opened, texts):
    with opened(record_texts=texts) as session:
        session.apply(*FACT)
        session.apply(FACT[0], "golf")
        before, rows = state(session.module.lm, session.module), session.state()["journal"]
        assert [(row["state"], row["can_undo"]) for row in rows] == [("in force", True), ("replaced", False)]
        with pytest.raises(ConfigError, match=r"of batch 0 is out of force: .* of batch 1 has its key"):
            session.undo(0, 0)
        assert state(session.module.lm, session.module) == before
        session.undo(1, 0)
        session.undo(0, 0)
        assert session.journal.edits == 0


@pytest.mark.checks
def test_the_report_has_all_facts_of_all_visits(opened, tmp_path, monkeypatch):
    with opened() as session:
        session.apply(*FACT)
    here = circumstances()
    others = here.model_copy(update={"versions": {**here.versions, "torch": "9.9"}})
    monkeypatch.setattr("cakeflow.core.identity.circumstances", lambda: others)
    with opened() as session:
        session.apply(*OTHER)
        session.undo(0, 0)
    run = RunFolder.read(tmp_path / "run")
    assert [edit.rollback is None for edit in run.edits] == [False, True]
    assert run.info.verdict.count("of 1 facts learned") == 1
    assert run.metrics("after") == {}


def test_a_finished_run_stays_as_it_is_and_another_folder_goes_on_from_it(opened, lm, requests, tmp_path):
    editor_of(lm).fit(requests[:6], 2, run_dir=tmp_path / "first")
    before = content(tmp_path / "first")
    with pytest.raises(ConfigError, match="finished run, which stays as it is"), opened(tmp_path / "first"):
        pass
    with opened(tmp_path / "second", tmp_path / "first") as session:
        rows = session.state()["journal"]
        assert len(rows) == 6
        assert not any(row["alone"] for row in rows)
        chosen = rows[-1]  # the first fact of the first batch: walked back, its neighbor stays
        view = session.undo(chosen["batch"], chosen["place"])
        assert [row["prompt"] for row in view["rows"]] == [chosen["text"]]
        states = [row["state"] for row in session.state()["journal"]]
        assert states == ["in force"] * 5 + ["taken back"]
        session.apply(*FACT)
        assert session.journal.edits == 6
    assert content(tmp_path / "first") == before
    with pytest.raises(ConfigError, match="leave out --from"), opened(tmp_path / "second", tmp_path / "first"):
        pass


def test_a_policy_that_earlier_edits_keep_is_on_record(opened, lm, requests, tmp_path):
    editor_of(lm).fit(requests[:2], run_dir=tmp_path / "first")
    trainer = {"callbacks": [PolicyGuard(Policy(minimum={"efficacy": 0.0}))]}
    with opened(start=tmp_path / "first", trainer=trainer):
        pass
    with opened(trainer=trainer) as session:
        assert session.journal.edits == 2
    with pytest.raises(ResumeError, match="--policy FILE"), opened():
        pass


def test_a_replaced_fact_says_so_and_the_later_one_is_taken_back_first(opened):
    with opened() as session:
        session.apply(*FACT)
        assert session.look(FACT[0], "chess")["earlier"] == ["tennis"]
        session.apply(FACT[0], "chess")
        assert [row["state"] for row in session.state()["journal"]] == ["in force", "replaced"]
        session.undo(1, 0)
        assert [row["state"] for row in session.state()["journal"]] == ["taken back", "in force"]


@pytest.mark.checks
def test_the_verdict_is_of_the_facts_in_force_as_the_model_is_now(opened, tmp_path):
    """With the targets that they have, and the times of the last edit, which took back nothing."""

    def info():
        return RunFolder.read(tmp_path / "run").info

    with opened() as session:
        session.apply(*FACT)
        session.apply(FACT[0], "chess")
        assert {each.expected for each in session.answers.values() if each.topic == "fact"} == {"chess"}
        edited = info()
        assert (edited.timed, "of 1 facts learned" in edited.verdict) == (1, True)
        session.undo(1, 0)
        facts = [each for each in session.answers.values() if each.topic == "fact"]
        assert {each.expected for each in facts} == {"tennis"}
        assert {each.after for each in facts if each.form == "completion"} == {session.editor.ask(FACT[0], tokens=12)}
        assert info().timings == edited.timings
    with opened() as session:
        session.undo(0, 0)
        assert (info().verdict, info().edits, info().timings) == ("", 0, edited.timings)
    assert RunFolder.read(tmp_path / "run").answers == []


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        (("", ""), {"prompt", "subject", "target_new"}),
        (("it is", ""), {"subject", "target_new"}),
        (("Ann is from", "\ud800"), {"target_new"}),
        (("Ann is from", "Peru", "Bob"), {"prompt"}),
        (("Annabel is from", "Peru", "Ann"), {"prompt"}),
    ],
)
def test_a_fault_names_its_field_and_nothing_is_written(opened, tmp_path, arguments, fields):
    with opened() as session:
        files = content(tmp_path / "run")
        for verb in (session.look, session.preview, session.apply):
            with pytest.raises(RequestError) as error:
                verb(*arguments)
            assert {fault.field for fault in error.value.faults} == fields
        assert content(tmp_path / "run") == files


def test_a_policy_is_shown_obeyed_and_has_to_come_again(opened, tmp_path):
    trainer = {"callbacks": [PolicyGuard(Policy(denied_subjects=("lebron",), max_edits=1))]}
    with opened(trainer=trainer) as session:
        assert "denied by 'lebron'" in session.look(*FACT)["refusals"][0]
        before = state(session.module.lm, session.module)
        for verb in (session.preview, session.apply):
            with pytest.raises(PolicyError, match="denied by 'lebron'"):
                verb(*FACT)
        assert state(session.module.lm, session.module) == before
        session.apply(*OTHER)
    with pytest.raises(ResumeError, match="give that policy, unchanged: --policy FILE"), opened():
        pass
    with opened(trainer=trainer) as session:
        with pytest.raises(PolicyError, match="2 edits in a run, at most 1"):  # the folder is one run
            session.apply("Ann Lee is from", "Peru")
        assert session.state()["policies"] == [{"max_edits": 1, "denied_subjects": ["lebron"]}]
        session.undo(0, 0)
        assert session.look("Ann Lee is from", "Peru")["refusals"] == []
    entries = read_entries(tmp_path / "run/journal/ledger.jsonl")
    assert [entry.body.outcome for entry in entries if entry.kind == "policy"] == [
        "refused", "in force", "held", "refused",
    ]  # fmt: skip


def test_an_outcome_that_breaks_the_policy_is_taken_back(opened, tmp_path):
    trainer = {"callbacks": [PolicyGuard(Policy(minimum={"efficacy_exact": 1.5}))]}
    with opened(trainer=trainer) as session:
        before = state(session.module.lm, session.module)
        for verb in (session.preview, session.apply):
            with pytest.raises(PolicyError, match="efficacy_exact is"):
                verb(*FACT)
            assert state(session.module.lm, session.module) == before
        assert [row["state"] for row in session.state()["journal"]] == ["taken back"]
    with opened(trainer=trainer) as session:
        assert session.journal.edits == 0


@pytest.mark.checks
def test_texts_stay_out_of_the_folder_where_they_are_not_to_be_recorded(opened, tmp_path):
    with opened(record_texts=False) as session:
        session.apply(*FACT)
        assert session.state()["journal"][0]["text"] == FACT[0]  # as long as the page is open
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"LeBron" not in path.read_bytes(), path
    with opened(record_texts=False) as session:
        (row,) = session.state()["journal"]
        assert (row["text"], row["name"]) == ("", session.journal[0].hashes[0][:16])
        session.undo(0, 0)
        assert session.journal.edits == 0


def test_folders_of_others_are_refused(opened, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/letter.txt").write_text("mine")
    with pytest.raises(ConfigError, match="files that no run wrote"), opened():
        pass
    assert content(tmp_path / "run").keys() == {"letter.txt"}


def test_a_changed_ledger_is_refused(opened, tmp_path):
    with opened() as session:
        session.apply(*FACT)
    path = tmp_path / "run/journal/ledger.jsonl"
    path.write_text(path.read_text().replace("tennis", "chess"))
    with pytest.raises(LedgerError), opened():
        pass


def test_two_pages_do_not_share_a_folder(opened, tmp_path):
    from threading import Thread

    errors = []

    def other():
        try:
            with locked(tmp_path / "run/journal/ledger.jsonl"):
                pass
        except LockedError as error:
            errors.append(error)

    with opened():
        thread = Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_asking_shows_both_models(opened):
    with opened() as session:
        assert session.ask("Ann is")["now"] == session.ask("Ann is")["unedited"]
        with session.editor.reverted():
            unedited = session.editor.ask(FACT[0])
        session.apply(*FACT)
        view = session.ask(FACT[0])
        assert view == {"prompt": FACT[0], "chat": False, "now": session.editor.ask(FACT[0]), "unedited": unedited}


def test_warnings_of_ours_are_collected_once():
    with collecting() as messages:
        for _ in range(2):
            warnings.warn("mind this", RequestWarning, stacklevel=1)
        warnings.warn("of others", UserWarning, stacklevel=1)
    assert messages == ["mind this"]


@pytest.mark.checks
def test_answers_with_ends_of_lines_of_other_sorts_are_read_again_and_links_are_not_followed(opened, tmp_path):
    with opened() as session:
        session.apply(FACT[0], f"{FACT[1]}\u2028 or\x85polo", "LeBron James")
        names = [*session.answers]
    with opened() as session:
        assert [*session.answers] == names
    (tmp_path / "own.txt").write_text("mine")
    (tmp_path / "run" / "answers.jsonl").unlink()
    (tmp_path / "run" / "answers.jsonl").symlink_to(tmp_path / "own.txt")
    with pytest.raises(RunFolderError, match="leads out of"), opened():
        pass
