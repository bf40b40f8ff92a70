"""A run folder of cakeflow 0.1 (format 1) is read, checked, replayed and rolled back by every later version."""

import shutil
from pathlib import Path

import pytest

from cakeflow import Editor, LocateThenEdit
from cakeflow.cli import run_command
from cakeflow.journal.audit import replay, verify
from cakeflow.journal.ledger import read_entries
from cakeflow.journal.schema import BatchBody, RollbackBody
from cakeflow.models.loading import load_model
from cakeflow.report.folder import RunFolder
from cakeflow.report.page import render_page

FIXTURE = Path(__file__).parent / "fixtures" / "format1"
HEAD = "aa78c01437d9d5822f921adb1bc1b9ecafdc842ea523c69a4ec45365b753db3c"
AFTER = {
    "transformer.h.0.mlp.c_proj.weight": "44001632cae5a8fdc3f2231270b12d8333a139b35cc47c7d36ac8a15a930c9ec",
    "transformer.h.1.mlp.c_proj.weight": "f1a11531493517bd77acd6350e1349182909c5ecc511d9a9ddae2ca41d9475ba",
}
"""Hashes of the edited weights after the rollback that 0.1 did, as 0.1 printed them."""


@pytest.fixture
def run(tmp_path):
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    return tmp_path / "run"


def test_it_is_sound():
    audit = verify(FIXTURE / "run", HEAD)
    assert (audit.faults, audit.unknown, audit.head) == ([], [], HEAD)
    kinds = ["model", "run", "evaluation", "batch", "batch", "evaluation", "end", "rollback"]
    assert [entry.kind for entry in audit.entries] == kinds


def test_a_flipped_byte_is_noticed(run):
    path = run / "journal" / "batch-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    assert any("batch-00001.safetensors was changed" in fault for fault in verify(run).faults)


def test_its_edits_lead_to_the_weights_of_then():
    journal = replay(FIXTURE / "run", str(FIXTURE / "model"))
    assert {place: journal.places.hash(place) for place in journal.places.originals} == AFTER
    assert [step.number for step in journal] == [1]
    assert [request.subject for request in journal[0].requests] == ["Cleo", "Dan"]
    assert len(journal.history("transformer.h.0.mlp.c_proj.weight")) == 2
    assert journal[0].values[1].shape == (2, 16)
    assert journal[0].targets[0].steps == 3


def test_it_goes_on_in_format_2(run, capsys):
    run_command(["rollback", str(run), "--model", str(FIXTURE / "model")])
    assert "batch 1 taken back, 0 remain" in capsys.readouterr().out
    assert verify(run).faults == []
    last = list(read_entries(run / "journal" / "ledger.jsonl"))[-1].body
    assert isinstance(last, RollbackBody)
    assert set(last.places) == set(AFTER)
    assert len(replay(run, str(FIXTURE / "model"))) == 0


def test_an_editor_loads_it_and_edits_on(run, tmp_path):
    lm = load_model(FIXTURE / "model", dtype="float32")
    editor = Editor(LocateThenEdit(lm, [0, 1]))
    editor.load(run)
    editor.export(tmp_path / "delta", "delta")
    editor.rollback()
    assert lm.fingerprint() == editor.journal.base.fingerprint


def test_it_is_reported():
    folder = RunFolder.read(FIXTURE / "run")
    assert len(folder.before) == len(folder.after) == 4
    assert folder.before[0].prompts[0].expected == "Rome"
    assert [(edit.subject, edit.batch) for edit in folder.edits] == [("Ann", 0), ("Bob", 0), ("Cleo", 1), ("Dan", 1)]
    assert [edit.rollback is not None for edit in folder.edits] == [True, True, False, False]
    page = render_page(folder)
    assert "Cleo" in page
    assert page == render_page(folder)


def test_its_batches_name_weights():
    place = "layer {}".format
    bodies = [entry.body for entry in read_entries(FIXTURE / "run" / "journal" / "ledger.jsonl", place)]
    changes = [change for body in bodies if isinstance(body, BatchBody) for change in body.changes]
    assert [change.place for change in changes] == ["layer 0", "layer 1"] * 2
