"""Anyone can check what a run did: no byte changes unnoticed, and the weights come out again."""

import copy
import shutil

import pytest
import torch
from bodies import EXAMPLES, forge, raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import JSON
from tiny_runs import content, editor_of, finished_run, state

from cakeflow.errors import ConfigError, EditError, LedgerError, ResumeError, RunFolderError
from cakeflow.journal.audit import replay, verify
from cakeflow.journal.journal import Journal
from cakeflow.journal.store import JournalStore


@pytest.fixture(scope="module")
def finished(_models, tmp_path_factory, requests):
    """A finished run of three batches: its folder, the unedited model and the state after it."""
    folder = tmp_path_factory.mktemp("finished")
    lm = copy.deepcopy(_models["llama"])
    unedited = copy.deepcopy(lm)
    unedited.model.float()
    editor = finished_run(lm, folder, requests)
    return folder / "run", unedited, state(lm, editor.module)


def test_a_model_that_is_not_where_it_was_is_asked_for(finished, monkeypatch, tmp_path):
    folder, *_ = finished
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"(?s)no tokenizer .*run was started with that name; .*: --model NAME$"):
        replay(folder)
    with pytest.raises(ConfigError, match="is neither") as caught:
        replay(folder, "elsewhere")
    assert "--model" not in str(caught.value)


@pytest.fixture
def run(finished, tmp_path):
    """A copy to spoil."""
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_sound_run_has_no_faults(run):
    result = verify(run)
    assert result.faults == []
    assert [entry.kind for entry in result.entries] == [
        "model", "run", "evaluation", "batch", "batch", "batch", "evaluation", "end",
    ]  # fmt: skip
    assert result.unknown == []
    assert verify(run, result.head).faults == []
    (run / "report.html").write_text("later")
    assert verify(run).unknown == ["report.html"]


def test_a_flipped_byte_of_any_file_is_noticed_and_its_entry_named(run):
    files = sorted(path for path in run.rglob("*") if path.is_file())
    assert len(files) >= 9
    entries = verify(run).entries
    messages = {name: entry.number for entry in entries for name in getattr(entry.body, "files", ())}
    for path in files:
        whole = path.read_bytes()
        for place in {0, len(whole) // 3, len(whole) - 1}:
            data = bytearray(whole)
            data[place] ^= 4
            path.write_bytes(bytes(data))
            faults = verify(run).faults
            assert faults, (path, place)
            if path.name in messages:
                assert any(f"entry {messages[path.name]}" in fault and path.name in fault for fault in faults)
            else:
                assert "entry" in faults[0]
        path.write_bytes(whole)
    assert verify(run).faults == []


def test_missing_files_and_missing_last_entries(run):
    head = verify(run).head
    (run / "journal/batch-00001.safetensors").rename(run / "elsewhere")
    assert any("batch-00001.safetensors is missing" in fault for fault in verify(run).faults)
    (run / "elsewhere").rename(run / "journal/batch-00001.safetensors")
    path = run / "journal/ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    assert verify(run).faults == []  # a ledger cut at an entry is sound by itself
    assert "entries are missing" in verify(run, head).faults[0]
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:50])
    assert f"entry {len(lines) - 1}: cut off" in verify(run).faults[0]


def test_a_forged_ledger_with_sound_hashes_does_not_fit_its_weights(run):
    """Whoever rewrites the whole chain still has to make the tensors agree."""
    path = run / "journal/ledger.jsonl"
    forge(path, [(kind, body) for kind, body in raw(path) if body.get("batch") != 1])
    assert any("does not begin where it ended" in fault for fault in verify(run).faults)


def test_paths_that_lead_out_of_the_folder_are_refused(run):
    path = run / "journal/ledger.jsonl"
    entries = raw(path)[:4]
    entries[3][1]["files"] = {f"../../{name}": messages for name, messages in entries[3][1]["files"].items()}
    forge(path, entries)
    assert any("is not a file name" in fault for fault in verify(run).faults)
    record = JournalStore(run / "journal")
    with pytest.raises(LedgerError, match="may not name files outside"):
        record.read(record.ledger.entries[3], "../run.json")


def test_replay_reproduces_every_weight(finished, run):
    folder, unedited, expected = finished
    journal = replay(folder, str(folder.parent / "model"))
    assert {n: h for n, h in state(journal.model, _Holder(journal)).items() if "history" not in n} == {
        name: each for name, each in expected.items() if "history" not in name
    }
    assert content(folder) == content(run)
    fresh = Journal(copy.deepcopy(unedited))
    fresh.load(folder / "journal")
    assert state(fresh.model, _Holder(fresh)) == expected


class _Holder:
    """What ``state`` asks of a module."""

    def __init__(self, journal):
        self.journal = journal


def test_another_model_is_not_replayed(finished, tiny):
    journal = Journal(tiny)
    before = state(tiny, _Holder(journal))
    with pytest.raises(ResumeError, match="fingerprint was"):
        journal.load(finished[0] / "journal")
    assert state(tiny, _Holder(journal)) == before


def test_weights_that_come_out_otherwise_are_refused_and_nothing_is_left(finished, run):
    """As on another machine: the ledger tells of other hashes than those that come out here."""
    path, lm = run / "journal/ledger.jsonl", copy.deepcopy(finished[1])
    entries = raw(path)
    (last,) = (body for _, body in entries if body.get("batch") == 2)
    (change,) = (change for change in last["changes"] if "3" in change["place"])
    change["after"] = "0" * 64
    forge(path, entries)
    journal = Journal(lm)
    before = state(lm, _Holder(journal))
    with pytest.raises(ResumeError, match=r"batch 2: the weights of \S*\.3\.\S* do not come out as recorded"):
        journal.load(run / "journal")
    assert state(lm, _Holder(journal)) == before
    assert len(journal) == 0


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.dictionaries(st.sampled_from(["batch", "files", "layers", "hashes", "targets", "order", "numbers",
                                             "requests", "batches", "changes", "places"]), JSON),
       kind=st.sampled_from(["batch", "rollback", "end", "run", "model"]), whole=st.booleans())  # fmt: skip
def test_only_our_errors_get_out_of_a_ledger_with_any_bodies(finished, run, body, kind, whole):
    first = raw(finished[0] / "journal/ledger.jsonl")[0]
    forge(run / "journal/ledger.jsonl", [first, (kind, {**EXAMPLES[kind], **body} if whole else body)])
    assert isinstance(verify(run).faults, list)
    journal = Journal(copy.deepcopy(finished[1]))
    try:
        journal.load(run / "journal")
    except EditError:
        assert len(journal) == 0


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match=r"has no journal/ledger.jsonl"):
        verify(tmp_path)


def test_half_precision_comes_out_again_too(lm, requests, tmp_path):
    lm.model.to(torch.bfloat16)
    unedited = copy.deepcopy(lm)
    editor = editor_of(lm)
    editor.fit(requests[:6], 2, evaluate=False, run_dir=tmp_path / "run")
    editor.rollback(batch=1)
    journal = Journal(unedited)
    journal.load(tmp_path / "run" / "journal")
    assert state(unedited, _Holder(journal)) == state(lm, editor.module)
