"""Bounds of what is read: sizes, values, and what a packed file becomes."""

import gzip
import tracemalloc

import pytest

from cakeflow.data import files, read_documents, read_entries, read_requests, read_texts
from cakeflow.data.files import parse_json
from cakeflow.errors import ConfigError, RequestError


def peak(read):
    """Most bytes that a call takes."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_text_file_is_read_as_far_as_it_is_needed(tmp_path, end):
    line = "The Elbe flows into the sea.\r\n"
    data = line.encode() * 200_000 + b"\xff"
    path = tmp_path / f"a.txt{end}"
    path.write_bytes(gzip.compress(data, 1) if end else data)

    def first():
        (parts,) = read_documents(path)
        assert next(iter(parts)).startswith(line.replace("\r\n", "\n") * 2)

    assert peak(first) < 2e6
    with pytest.raises(ConfigError, match="UTF-8"):
        list(read_texts(path))


def test_line_ends_are_those_of_text_files_wherever_a_part_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART", 4)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\r\ndef\r\n\r\ng\rh")
    assert list(read_texts(tmp_path / "a.txt")) == ["abc\ndef\n\ng\nh"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_packed_file_that_becomes_far_more_than_a_text_would_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "LARGEST_DOCUMENT", 1 << 12)
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' + b" \n" * 2_000_000))
    with pytest.raises(ConfigError, match=r"unpacks to 200 times its size and more"):
        list(read_texts(path))
    plain = gzip.compress(b'{"text": "some words"}\n' * 100)
    path.write_bytes(plain if name != "a.json" else gzip.compress(b'{"text": "some words"}'))
    assert list(read_texts(path))


@pytest.mark.parametrize("text", ["[" + "{}," * 101 + "{}]", '{"a": ' * 101 + "1" + "}" * 101])
def test_json_has_a_limit_of_objects(monkeypatch, text):
    monkeypatch.setattr(files, "MOST_ENTRIES", 100)
    with pytest.raises(RequestError, match=r"x\.json, line 1 or below.*more than 100 objects; give it in parts"):
        parse_json(text, "x.json")


@pytest.mark.parametrize("text", ["[" + "[]," * 60 + "0]", "[" + "0," * 101 + "0]"])
def test_json_has_a_limit_of_values_before_any_is_made(monkeypatch, text):
    monkeypatch.setattr(files, "MOST_VALUES", 100)
    with pytest.raises(RequestError, match="more than 100 values"):
        parse_json(text, "x.json")


def test_sources_have_a_limit_of_entries(tmp_path, monkeypatch):
    monkeypatch.setattr("cakeflow.data.sources.MOST_ENTRIES", 100)
    (tmp_path / "a.jsonl").write_text("{}\n" * 101)
    for source in (tmp_path / "a.jsonl", ({"prompt": "x"} for _ in iter(int, 1))):
        with pytest.raises(ConfigError, match="more than 100 entries"):
            read_entries(source)


def test_a_small_file_of_many_entries_takes_little_memory(tmp_path):
    path = tmp_path / "entries.json.gz"
    path.write_bytes(gzip.compress(b"[" + b"{}," * (8 << 20 >> 2) + b"{}]", 9))

    def refuse():
        with pytest.raises(RequestError, match="objects; give it in parts"):
            read_requests(path)

    assert peak(refuse) < 128 << 20


def test_a_message_names_ten_faults_and_a_file_with_all(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(RequestError) as error:
        read_requests([{"prompt": f"{{}} is {i}", "subject": "\ud800", "target_new": "x"} for i in range(1301)])
    text = str(error.value).splitlines()
    assert text[0] == "1301 problem(s) in the requests; nothing was changed:"
    assert len(text) == 12
    assert text[-1].startswith("  and 1291 more; all of them: ")
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    assert str(path) in text[-1]
    assert path.read_text().splitlines() == list(map(str, error.value.faults))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    assert str(RequestError(error.value.faults)).endswith("and 1291 more")
