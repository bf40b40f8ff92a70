"""A ledger is added to, whole entries only, and no byte of it can change unnoticed."""

import json
import re
from contextlib import suppress

import pytest
from bodies import EXAMPLES, body, forge, raw
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON

from cakeflow.errors import LedgerError
from cakeflow.journal.ledger import Ledger, bodies, canonical, read_entries
from cakeflow.journal.schema import BODIES, BatchBody, EndBody
from cakeflow.storage.typed import plain


def batch(number):
    request = {"subject": "Frédéric 🙂"}
    return body("batch", batch=number, requests=[request], numbers={"share": 1 / 3, "loss": float("nan")})


@pytest.fixture
def path(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in range(3):
        ledger.append(batch(number))
    return ledger.path


def test_entries_are_chained_and_read_back(path):
    first, second, third = read_entries(path)
    assert (first.previous, second.previous, third.previous) == ("", first.hash, second.hash)
    assert [entry.number for entry in (first, second, third)] == [0, 1, 2]
    assert isinstance(third.body, BatchBody)
    assert third.body.to_dict() == batch(2).to_dict()
    assert (third.body.numbers["share"], third.body.requests) == (1 / 3, [{"subject": "Frédéric 🙂"}])
    ledger = Ledger(path)
    assert ledger.head == third.hash
    assert ledger.append(body("end")) == list(read_entries(path))[-1]
    assert [entry.kind for entry in read_entries(path)] == ["batch"] * 3 + ["end"]
    assert [each.batch for each in bodies(ledger.entries, BatchBody)] == [0, 1, 2]
    assert bodies(ledger.entries, EndBody) == [body("end")]


def test_the_form_of_a_line_is_fixed(tmp_path):
    """Byte for byte: ledgers are compared, and their hashes are noted elsewhere."""
    forge(tmp_path / "expected.jsonl", [("model", EXAMPLES["model"]), ("policy", EXAMPLES["policy"])])
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for kind in ("model", "policy"):
        ledger.append(body(kind))
    forge(ledger.path, raw(ledger.path))  # the time aside, which is part of the hash
    assert ledger.path.read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert ledger.path.read_bytes().startswith(b'{"body":{"dtype":"torch.float32","fingerprint":"ab12"},"hash":"')


@pytest.mark.parametrize("kind", ["model", "run"])
@pytest.mark.parametrize("version", [0, 3, "2", 10**400, None])
def test_a_format_of_another_version_is_refused_by_its_number(tmp_path, kind, version):
    path = tmp_path / "ledger.jsonl"
    forge(path, [(kind, EXAMPLES[kind] | {"format": version, "new field": 1})])
    with pytest.raises(LedgerError, match=r"entry 0, format = .*: known are 1 to 2; read .* version of cakeflow that"):
        Ledger(path)


@pytest.mark.parametrize("kind", BODIES)
def test_every_kind_is_written_and_read_back(tmp_path, kind):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(body(kind))
    (entry,) = read_entries(ledger.path)
    assert (entry.kind, entry.body) == (kind, body(kind))
    assert raw(ledger.path) == [(kind, EXAMPLES[kind])]


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
    ledger.append(batch(2))
    assert [entry.body.batch for entry in read_entries(path)] == [0, 1, 2]


def test_entries_that_were_not_acknowledged_are_withdrawn(path):
    whole, ledger = path.read_bytes(), Ledger(path)
    ledger.append(batch(3))
    ledger.withdraw(3)
    ledger.withdraw(3)
    assert path.read_bytes() == whole
    ledger.append(body("end"))
    assert len(list(read_entries(path))) == 4


@given(content=st.dictionaries(st.text(), JSON, max_size=4))
def test_any_settings_and_requests_survive(tmp_path_factory, content):
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
    ledger.append(body("run", settings=content))
    ledger.append(body("batch", requests=[content]))
    run, edit = read_entries(ledger.path)
    assert run.body.settings == edit.body.requests[0] == json.loads(json.dumps(plain(content)))


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
    ((name, value),) = change.items()
    with pytest.raises(LedgerError, match=rf"entry 0, {name} = {re.escape(repr(value))}"):
        list(read_entries(path))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("edit", {}, "entry 1, kind = 'edit': expected model, run, evaluation, batch"),
        ("model", {"earlier": "two"}, "entry 1, earlier = 'two': .*integer"),
        ("run", {"batch_size": True}, "entry 1, batch_size = True"),
        ("run", {"format": 3}, "entry 1, format = 3"),
        ("evaluation", {"metrics": {"efficacy": "high"}}, r"entry 1, metrics\.efficacy = 'high'"),
        ("batch", {"hashes": None}, "entry 1, hashes = None"),
        ("batch", {"targets": [{"layer": 1, "loss": 1.0, "steps": 3.0}]}, r"targets\.0\.probability: .*required"),
        ("batch", {"layers": {}}, r"entry 1: not a batch of format 1 .*order"),
        ("batch", {"layers": {"a": {}}, "order": ["a"]}, "entry 1: not a batch of format 1 .*'a'"),
        ("batch", {"layers": {"3": {}}, "order": [3]}, r"entry 1, changes\.0\.numbers: .*required"),
        ("rollback", {"layers": {"x": ""}}, "entry 1: not a rollback of format 1 .*'x'"),
        ("rollback", {"batches": [0.5]}, r"batches\.0 = 0\.5"),
        ("policy", {"faults": "none"}, "faults = 'none'"),
        ("end", {"more": 1}, "entry 1, more = 1"),
    ],
)
def test_a_body_of_another_form_is_refused_however_sound_its_hash(tmp_path, kind, change, words):
    path = tmp_path / "ledger.jsonl"
    forge(path, [("model", EXAMPLES["model"]), (kind, EXAMPLES.get(kind, {}) | change)])
    with pytest.raises(LedgerError, match=words) as error:
        Ledger(path)
    assert str(path) in str(error.value)
    assert "; " in str(error.value)


@given(kind=st.sampled_from(sorted(BODIES)), content=st.dictionaries(st.text(), JSON, max_size=3))
def test_only_our_error_gets_out_of_any_body(tmp_path_factory, kind, content):
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    forge(path, [(kind, EXAMPLES[kind] | content)])
    with suppress(LedgerError):
        (entry,) = read_entries(path)
        assert entry.body.to_dict() == EXAMPLES[kind] | content


def test_nan_that_only_python_reads_is_refused(path):
    path.write_bytes(path.read_bytes().replace(b'"loss":null', b'"loss":NaN'))
    with pytest.raises(LedgerError, match="entry 0: its content does not have its hash"):
        list(read_entries(path))


def test_deep_nesting_is_refused(path):
    path.write_bytes(b"[" * 100_000 + b"\n")
    with pytest.raises(LedgerError):
        list(read_entries(path))
