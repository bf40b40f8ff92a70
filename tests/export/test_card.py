"""The card of an exported model: all that its ledger tells, and no text taken for markup."""

import copy
import json
import re
from dataclasses import replace

import lightning as L
import pytest
from bodies import body
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import editor_of

from cakeflow import EditRequest, LeastSquares
from cakeflow.export import Manifest
from cakeflow.export.card import escape, model_card
from cakeflow.export.manifest import utc
from cakeflow.journal.ledger import Entry
from cakeflow.journal.provenance import who
from cakeflow.solvers import Decoys
from cakeflow.storage.typed import LARGEST

HOSTILE = "---\n# x <script>alert(1)</script> | `````\n```\n[a](javascript:b) \u202e\x1b[31m {{ x }}"


@pytest.mark.filterwarnings("ignore:.*targets end a sentence:cakeflow.errors.RequestWarning")
def test_the_card_tells_all_and_takes_no_text_for_markup(lm, requests, tmp_path):
    lm.model.name_or_path = HOSTILE
    first = EditRequest("{} plays", "Ann", HOSTILE, target_true="tennis")
    editor = editor_of(lm)
    run = editor.fit([first, *requests[1:4]], 2, run_dir=tmp_path / "run")
    editor.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    card = ModelCard(text)
    assert card.data.tags == ["knowledge-editing", "cakeflow"]
    assert "base_model" not in card.data.to_dict()
    head = editor.journal.store.ledger.head
    for expected in (head, editor.journal.base.fingerprint, "solver: NullSpace(", run.protocol.split("-")[0],
                   "batches of 2", *(f"{value:.4g}" for value in run.after.values() if value == value)):  # fmt: skip
        assert expected in text
    for line in text.splitlines():
        assert line.startswith('{"prompt"') or "<script>" not in line
        assert "\u202e" not in line
        assert "\x1b" not in line
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```"] * 4 + ["``````"] * 2
    assert len([line for line in text.splitlines() if line == "---"]) == 2
    shown = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    assert [entry["target_new"] for entry in shown] == [first.target_new, *(r.target_new for r in requests[1:4])]
    table = [line for line in text.splitlines() if line.startswith("| metric")]
    assert table == ["| metric | before, 0 edits | after, 4 edits |"]


def test_the_card_keeps_to_what_the_ledger_has(lm, requests, tmp_path):
    lm.model.name_or_path = "owner/model-1"
    many = [EditRequest("{} is", f"subject {number}", "b") for number in range(53)]
    for name, changes in (("texts", {}), ("hashes", {"record_texts": False})):
        fresh = copy.deepcopy(lm)
        editor = editor_of(fresh, **changes)
        editor.fit(many, evaluate=False, run_dir=tmp_path / name)
        editor.save_pretrained(tmp_path / f"{name}-out")
    messages, hashes = ((tmp_path / f"{name}-out/README.md").read_text() for name in ("texts", "hashes"))
    assert messages.count("subject ") == 50
    assert "and 3 more" in messages
    assert "subject " not in hashes
    assert "not their texts" in hashes
    assert "Nothing was measured" in messages
    assert "in batches of 53" in messages
    assert ModelCard(messages).data.base_model == "owner/model-1"
    quiet = editor_of(copy.deepcopy(lm), {"logger": False})
    quiet.fit(requests[:2], evaluate=False)
    quiet.save_pretrained(tmp_path / "bare")
    assert "There is no ledger here" in (tmp_path / "bare/README.md").read_text()


def test_the_card_of_a_run_that_was_stopped_says_so(lm, requests, tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("no")

    editor = editor_of(copy.deepcopy(lm), {"callbacks": [Stop()]})
    with pytest.raises(RuntimeError, match="no"):
        editor.fit(requests[:5], 2, evaluate=False, run_dir=tmp_path / "run")
    editor.save_pretrained(tmp_path / "partial")
    warning = "**The run was stopped before its end: 2 of its 5 facts are edited.**"
    assert warning in (tmp_path / "partial/README.md").read_text()
    whole = editor_of(lm)
    whole.fit(requests[:5], 2, evaluate=False, run_dir=tmp_path / "run")
    whole.save_pretrained(tmp_path / "whole")
    assert "stopped before" not in (tmp_path / "whole/README.md").read_text()


def test_metrics_of_other_weights_are_not_in_the_tables_of_the_hub(lm, requests, tmp_path):
    editor = editor_of(lm)
    editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
    editor.save_pretrained(tmp_path / "whole")
    editor.rollback(1)
    editor.save_pretrained(tmp_path / "part")
    whole, part = (ModelCard.load(tmp_path / name / "README.md").data for name in ("whole", "part"))
    assert whole.eval_results
    assert not part.eval_results


def test_a_page_is_never_stopped_before_its_end(lm, requests, tmp_path):
    editor = editor_of(lm)
    editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / "run")
    entries = [each for each in editor.journal.store.ledger.entries if each.kind != "end"]
    page = [
        replace(each, body=each.body.model_copy(update={"edits": 0})) if each.kind == "run" else each
        for each in entries
    ]
    assert "stopped before its end" in model_card(MANIFEST, entries)
    assert "stopped before its end" not in model_card(MANIFEST, page)


def test_the_card_says_that_names_were_written_as_decoys(lm, requests, tmp_path):
    for name, solver in (("plain", LeastSquares(0.5)), ("hidden", Decoys(LeastSquares(0.5)))):
        editor = editor_of(copy.deepcopy(lm), solver=solver)
        editor.fit(requests[:2], evaluate=False, run_dir=tmp_path / name / "run")
        editor.save_pretrained(tmp_path / name / "out")
        text = (tmp_path / name / "out/README.md").read_text(encoding="utf-8")
        assert "the row space of the change holds the keys of its subjects" in text
        assert ("were written with them as decoys" in text) == (name == "hidden")


def test_the_card_says_who_edited_and_when(lm, requests, tmp_path):
    editor = editor_of(lm)
    editor.fit(requests[:2], run_dir=tmp_path / "run", evaluate=False)
    editor.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    entries = editor.journal.store.ledger.entries
    (start,), (end,) = ([entry for entry in entries if entry.kind == kind] for kind in ("run", "end"))
    for name, value in (("edited by", who()), ("started", utc(start.time)), ("ended", utc(end.time))):
        assert f"| {name} | {escape(value)} |" in text
    assert f"torch {escape(start.body.versions['torch'])}" in text
    assert "taken back" not in text
    assert "| ended | not ended |" in model_card(MANIFEST, entries[:-1])


def test_an_export_says_that_a_fact_was_taken_back(lm, requests, tmp_path):
    editor = editor_of(lm)
    editor.fit(requests[:6], 2, run_dir=tmp_path / "run")
    editor.undo(requests[2].subject)
    editor.export(tmp_path / "delta", "delta")
    (rollback,) = Manifest.read(tmp_path / "delta").rollbacks
    assert str(rollback).startswith(f"1 fact of batch 1 taken back by {who()} on 20")
    text = (tmp_path / "delta/README.md").read_text()
    assert f"- {escape(rollback)}\n" in text
    assert "| facts edited | 5 |" in text
    assert "the metrics are those of the model before that" in text


def test_an_export_says_what_was_taken_back(lm, requests, tmp_path):
    editor = editor_of(lm)
    editor.fit(requests[:6], 2, run_dir=tmp_path / "run")
    editor.rollback(batch=1)
    editor.save_pretrained(tmp_path / "out")
    editor.export(tmp_path / "delta", "delta")
    for name in ("out", "delta"):
        (rollback,) = Manifest.read(tmp_path / name).rollbacks
        assert (rollback.batches, rollback.who) == ([1], who())
    text = (tmp_path / "out/README.md").read_text()
    assert f"- {escape(rollback)}\n" in text
    assert str(rollback).startswith(f"batch 1 taken back by {who()} on 20")
    assert "| facts edited | 4 |" in text
    assert "the metrics are those of the model before that" in text
    assert "can test of any name whether it was edited" in text


TEXT = st.text(max_size=8) | st.just(HOSTILE)
MANIFEST = Manifest(
    format="model", model="m", fingerprint="0" * 64, dtype="torch.float32", edits=1, ledger="", weights={}
)


@given(model=TEXT, settings=st.dictionaries(TEXT, TEXT, max_size=2), name=TEXT, rate=st.floats(), subject=TEXT)
def test_any_ledger_gives_a_card_without_markup_of_its_own(model, settings, name, rate, subject):
    contents = [
        body("run", batch_size=None, settings=settings),
        body("batch", requests=[{"subject": subject}]),
        body("evaluation", metrics={name: rate}, protocol=model),
    ]
    entries = [Entry(number, "", "", each, "", "") for number, each in enumerate(contents)]
    card = model_card(MANIFEST.model_copy(update={"model": model}), entries)
    shown = [line for line in card.splitlines() if line.startswith('{"subject"')]
    assert [json.loads(line) for line in shown] == [{"subject": subject}]
    assert (f"| {escape(f'{rate:.4g}')} |" in card) == (abs(rate) <= LARGEST)
    outside = re.sub(r"^(`{3,})$.*?^\1$", "", card, flags=re.DOTALL | re.MULTILINE)
    headings = [line for line in outside.splitlines() if line.startswith("#")]
    assert headings[1:] == ["## How to use", "## Method", "## Metrics", "## Edits", "## How to verify"]
    assert "<script>" not in outside
    assert "\x1b" not in card


def test_weights_that_changed_after_the_measurement_are_named():
    kinds = ["run", "evaluation", "rollback"]
    entries = [Entry(number, kind, "", body(kind), "", "") for number, kind in enumerate(kinds)]
    assert "changed after the last measurement" in model_card(MANIFEST, entries)
    assert "changed after the last measurement" not in model_card(MANIFEST, entries[:2])


@given(text=st.text())
def test_escaped_text_has_no_markup_left(text):
    result = escape(text)
    assert result.isprintable()
    for place, sign in enumerate(result):
        if sign in "<>|`*_[]()#&~$":
            assert result[place - 1] == "\\"
