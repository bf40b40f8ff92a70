"""The card of an exported model: all that its ledger tells, and no text taken for markup."""

import copy
import json
from contextlib import suppress

from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON
from tiny_runs import editor_of

from cakeflow import EditRequest
from cakeflow.errors import LedgerError
from cakeflow.export import Manifest
from cakeflow.export.card import escape, model_card
from cakeflow.journal.ledger import Entry

HOSTILE = "---\n# x <script>alert(1)</script> | `````\n```\n[a](javascript:b) \u202e\x1b[31m {{ x }}"


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
    for wanted in (head, editor.journal.base["fingerprint"], "solver: NullSpace(", run.protocol.split("-")[0],
                   "batches of 2", *(f"{value:.4g}" for value in run.after.values() if value == value)):  # fmt: skip
        assert wanted in text
    for line in text.splitlines():
        assert line.startswith('{"prompt"') or "<script>" not in line
        assert "\u202e" not in line
        assert "\x1b" not in line
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```", "```", "``````", "``````"]
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
    told, hashes = ((tmp_path / f"{name}-out/README.md").read_text() for name in ("texts", "hashes"))
    assert told.count("subject ") == 50
    assert "and 3 more" in told
    assert "subject " not in hashes
    assert "not their texts" in hashes
    assert "Nothing was measured" in told
    assert "in batches of 53" in told
    assert ModelCard(told).data.base_model == "owner/model-1"
    quiet = editor_of(copy.deepcopy(lm), {"logger": False})
    quiet.fit(requests[:2], evaluate=False)
    quiet.save_pretrained(tmp_path / "bare")
    assert "No ledger is at hand" in (tmp_path / "bare/README.md").read_text()


@given(kind=st.sampled_from(["run", "evaluation", "batch"]), body=st.dictionaries(st.text(), JSON, max_size=3))
def test_a_ledger_of_another_form_gives_our_error(kind, body):
    manifest = Manifest("model", "base", "0" * 64, "torch.float32", 1, "", {})
    run = Entry(0, "run", "", {"versions": {}, "batch_size": None, "settings": {}}, "")
    assert "in one batch" in model_card(manifest, [run])
    with suppress(LedgerError):
        model_card(manifest, [run, Entry(1, kind, "", body, "")])
        assert kind == "batch"  # one without texts is sound


@given(text=st.text())
def test_escaped_text_has_no_markup_left(text):
    found = escape(text)
    assert found.isprintable()
    for place, sign in enumerate(found):
        if sign in "<>|`*_[]()#&~$":
            assert found[place - 1] == "\\"
