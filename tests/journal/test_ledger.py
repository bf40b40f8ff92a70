"""A ledger is added to, whole entries only, and no byte of it can change unnoticed."""

import json
import re
import threading
from contextlib import suppress

import pytest
from bodies import EXAMPLES, body, forge, raw
from hypothesis import given
from hypothesis import strategies as st
from strategies import JSON

from cakeflow.errors import LedgerError, LockedError
from cakeflow.journal import ledger as ledger_module
from cakeflow.journal.ledger import Ledger, bodies, canonical, read_entries
from cakeflow.journal.schema import BODIES, BatchBody, EndBody
from cakeflow.storage.locks import locked
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
    """The end of the last line too: without it the line was cut off."""
    whole = path.read_bytes()
    ends = [index for index, byte in enumerate(whole) if byte == 10]
    for place in range(len(whole)):
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


class StopError(Exception):
    pass


@pytest.fixture
def torn(path):
    """A ledger of three entries, and the beginning of a fourth whose process was killed."""

    def tear(size):
        whole = path.read_bytes()
        Ledger(path).append(batch(3))
        line = path.read_bytes()[len(whole) :]
        path.write_bytes(whole + line[:size])
        path.with_name(".ledger.jsonl.append").write_text(str(len(whole)))
        return whole

    return tear


@pytest.mark.parametrize("size", [0, 1, 40, -1])
def test_an_unfinished_append_is_left_out_and_cut_off_by_the_next_entry(path, torn, size):
    whole = torn(size)
    assert len(list(read_entries(path))) == 3
    ledger = Ledger(path)
    ledger.append(batch(3))
    assert path.read_bytes().startswith(whole)
    assert [entry.body.batch for entry in read_entries(path)] == [0, 1, 2, 3]
    assert [each.name for each in path.parent.iterdir()] == ["ledger.jsonl"]


@pytest.mark.parametrize("size", [1, 40, -1])
def test_a_line_that_was_whole_once_is_not_left_out(path, size):
    """Else a rollback that was acknowledged would be taken back with it."""
    ledger = Ledger(path)
    ledger.append(body("rollback"))
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    path.write_bytes(whole[: start + size] if size >= 0 else whole[:-1])
    for read in (Ledger, lambda path: list(read_entries(path))):
        with pytest.raises(LedgerError, match="entry 3: cut off"):
            read(path)
    with pytest.raises(LedgerError, match="by another process"):
        ledger.append(batch(4))


def test_a_line_that_ends_while_it_is_read_is_no_damage(path, torn, monkeypatch):
    """Its mark is gone when the reader looks for it."""
    torn(40)
    usual = ledger_module.unfinished

    def overtaken(path):
        monkeypatch.setattr(ledger_module, "unfinished", usual)
        Ledger(path).append(batch(3))
        return usual(path)

    monkeypatch.setattr(ledger_module, "unfinished", overtaken)
    assert len(list(read_entries(path))) == 3
    assert len(list(read_entries(path))) == 4


def test_what_another_process_wrote_is_never_cut_back(path):
    mine, other = Ledger(path), Ledger(path)
    other.append(body("rollback"))
    whole = path.read_bytes()
    for _ in range(2):
        with pytest.raises(LedgerError, match="continued or changed by another process after entry 2"):
            mine.append(batch(3))
        assert path.read_bytes() == whole
    other.append(batch(3))
    path.write_bytes(whole)  # cut back by somebody else
    with pytest.raises(LedgerError, match="after entry 4"):
        other.append(batch(4))
    path.unlink()
    with pytest.raises(LedgerError, match="after entry 2"):
        mine.append(batch(3))
    assert not path.exists()


def test_a_ledger_that_is_being_written_is_not_added_to(path):
    errors = []

    def add():
        try:
            Ledger(path).append(batch(3))
        except LockedError as error:
            errors.append(error)

    with locked(path):
        thread = threading.Thread(target=add)
        thread.start()
        thread.join()
        assert len(Ledger(path).entries) == 3  # to read takes no lock
    assert len(errors) == 1


def test_an_entry_that_reached_the_disk_is_noted_whatever_came_after(path, monkeypatch):
    """An exception out of nowhere, as another thread can raise one, between the disk and the note in memory."""
    usual, ledger = ledger_module.append_line, Ledger(path)

    def late(path, line):
        usual(path, line)
        raise StopError

    monkeypatch.setattr(ledger_module, "append_line", late)
    with pytest.raises(StopError):
        ledger.append(batch(3))
    monkeypatch.setattr(ledger_module, "append_line", usual)
    ledger.settle()
    ledger.settle()
    assert [entry.body.batch for entry in ledger.entries] == [0, 1, 2, 3]
    ledger.append(batch(4))
    assert [entry.body.batch for entry in read_entries(path)] == [0, 1, 2, 3, 4]


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
