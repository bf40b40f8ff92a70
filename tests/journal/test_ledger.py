"""A ledger is added to, whole entries only, and no byte of it can change unnoticed."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON

from cakeflow.errors import LedgerError
from cakeflow.journal.ledger import Entry, Ledger, canonical, finite, read_entries


@pytest.fixture
def path(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(3):
        ledger.append("batch", {"batch": number, "text": "Frédéric 🙂", "share": 1 / 3})
    return ledger.path


def test_entries_are_chained_and_read_back(path):
    first, second, third = read_entries(path)
    assert (first.previous, second.previous, third.previous) == ("", first.hash, second.hash)
    assert [entry.number for entry in (first, second, third)] == [0, 1, 2]
    assert third.body == {"batch": 2, "text": "Frédéric 🙂", "share": 1 / 3}
    ledger = Ledger(path)
    assert ledger.head == third.hash
    ledger.append("end", {})
    assert [entry.kind for entry in read_entries(path)] == ["batch"] * 3 + ["end"]


def test_every_flipped_bit_is_noticed_and_its_entry_named(path):
    """The end of the last line aside: without it the entry counts as never written, which its absence shows."""
    whole = path.read_bytes()
    ends = [index for index, byte in enumerate(whole) if byte == 10]
    for place in range(len(whole) - 1):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(bytes(data))
        number = sum(end < place for end in ends)
        with pytest.raises(LedgerError, match=f"entry {number}"):
            list(read_entries(path))


def test_lines_that_were_swapped_dropped_or_repeated_are_noticed(path):
    lines = path.read_bytes().splitlines(keepends=True)
    for order in ([1, 0, 2], [0, 2], [1, 2], [0, 0, 1, 2], [0, 1, 1]):
        path.write_bytes(b"".join(lines[index] for index in order))
        with pytest.raises(LedgerError):
            list(read_entries(path))


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_a_torn_tail_is_left_out_and_cut_off_by_the_next_entry(path, kept):
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    path.write_bytes(whole[: start + kept] if kept >= 0 else whole[:-1])
    assert len(list(read_entries(path))) == 2
    ledger = Ledger(path)
    ledger.append("batch", {"batch": 2})
    assert [entry.body["batch"] for entry in read_entries(path)] == [0, 1, 2]


def test_what_nobody_was_told_of_is_withdrawn(path):
    whole, ledger = path.read_bytes(), Ledger(path)
    ledger.append("batch", {})
    ledger.withdraw(3)
    ledger.withdraw(3)
    assert path.read_bytes() == whole
    ledger.append("end", {})
    assert len(list(read_entries(path))) == 4


@given(body=st.dictionaries(st.text(), JSON, max_size=4))
def test_any_body_survives(tmp_path_factory, body):
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
    ledger.append("run", body)
    (entry,) = read_entries(ledger.path)
    assert entry.body == json.loads(json.dumps(finite(body)))


@given(data=st.binary(max_size=300) | st.lists(JSON.map(json.dumps)).map(lambda lines: "\n".join(lines).encode()))
def test_only_our_error_gets_out_of_anything(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    path.write_bytes(data)
    with suppress(LedgerError):
        assert list(read_entries(path)) == []
        assert b"\n" not in data


@pytest.mark.parametrize(
    "change", [{"number": True}, {"number": "0"}, {"body": []}, {"kind": None}, {"hash": 1}, {"more": 1}], ids=str
)
def test_an_entry_of_another_form_is_refused(path, change):
    first = json.loads(path.read_bytes().split(b"\n")[0])
    path.write_bytes(canonical({**first, **change}) + b"\n")
    with pytest.raises(LedgerError, match="entry 0"):
        list(read_entries(path))


def test_deep_nesting_is_refused(path):
    path.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(LedgerError):
        list(read_entries(path))


def test_numbers_that_json_does_not_know_become_null():
    assert finite({"a": float("nan"), 3: [1.5, float("inf")], "b": (True, "x")}) == {
        "a": None, "3": [1.5, None], "b": [True, "x"],
    }  # fmt: skip
    assert Entry(0, "run", "", {}, "").sealed().hash != Entry(0, "end", "", {}, "").sealed().hash
