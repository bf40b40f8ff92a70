"""Requests and texts from files, URLs, lists and data sets; requests unchanged in their own schemas."""

import gzip
import json
import shutil
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from records import SAMPLES, as_json, as_lines, write, write_records

from cakeflow.data import EditRequest, Probe, builtin_facts, read_entries, read_requests, read_text, read_texts
from cakeflow.data.files import parse_json
from cakeflow.errors import ConfigError, RequestError

COUNTERFACT, ZSRE, OWN = SAMPLES.values()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What datasets downloads and prepares stays in the test's folder; the hub is a place where nobody answers."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cached")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cached" / "downloads"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for constants in (huggingface_hub.constants, datasets.config):  # whatever the environment says
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("schema", SAMPLES)
def test_files_give_what_the_list_gives(schema, suffix, tmp_path):
    records = SAMPLES[schema]
    path = write_records(tmp_path / f"facts{suffix}", records)
    expected = read_requests(records)
    assert read_requests(path) == read_requests(str(path)) == expected
    assert len(expected) == len(records)


def test_counterfact_sample():
    first, second = read_requests(COUNTERFACT)
    assert first.text == "The Paper Guild keeps its archive in"
    assert (second.subject, second.target_new, second.target_true, second.relation) == (
        "Café Söder", "Malmö", "Lund", "P276",
    )  # fmt: skip
    assert [probe.kind for probe in first.probes] == ["paraphrase", "paraphrase", "neighborhood", "generation"]


def test_zsre_sample():
    (request,) = read_requests(ZSRE)
    assert (request.prompt, request.target_new, request.target_true) == ("Who directed {}?", "Ida Dahl", None)
    assert request.probes[-1] == Probe("neighborhood", "nq question: who wrote the long song?", "Per Ek")


def test_one_object_is_a_list_of_one(tmp_path):
    path = write(tmp_path / "one.json", json.dumps(OWN[0]))
    request = EditRequest("{} is made of", "The bell", "tin", "bronze")
    assert read_requests(path) == read_requests(OWN[0]) == read_requests(request) == [request]


def test_a_generator_is_a_list():
    assert read_requests(record for record in OWN) == read_requests(OWN)


@pytest.mark.parametrize("schema", SAMPLES)
def test_datasets_give_what_the_list_gives(schema):
    assert read_requests(datasets.Dataset.from_list(SAMPLES[schema])) == read_requests(SAMPLES[schema])


def test_builtin_by_name():
    assert read_requests("builtin") == builtin_facts()


@pytest.mark.parametrize("name", ["missing.json", "missing/a.jsonl.gz", "builtin2", "./none", "../none", ""])
def test_missing_file(name, tmp_path):
    """Neither a path object nor a file's name is taken for a data set of the hub."""
    for source in (name, tmp_path / "no" / name, Path("owner/set")):
        with pytest.raises(ConfigError, match=r"no file or folder .* give 'builtin', a .json .* 'owner/name'"):
            read_requests(source)


# ---- URLs ----


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("query", ["", "?download=true"])
def test_urls_give_what_the_list_gives(suffix, query, site):
    folder, url = site
    for schema, records in SAMPLES.items():
        write_records(folder / f"{schema}{suffix}", records)
        assert read_requests(f"{url}/{schema}{suffix}{query}") == read_requests(records)


def test_errors_of_a_url_name_it_and_the_line(site):
    folder, url = site
    (folder / "a.jsonl").write_text('{"prompt": "{} is", "subject": "a", "target_new": "b"}\n\n{"prompt": \n')
    with pytest.raises(RequestError, match=rf"broken JSON in {url}/a.jsonl, line 3, column"):
        read_requests(f"{url}/a.jsonl")


def test_a_url_is_fetched_again_only_when_it_changed(site, sent):
    folder, url = site
    write_records(folder / "again.json", OWN)
    for _ in range(2):
        assert read_requests(f"{url}/again.json") == read_requests(OWN)
    assert sent.count("/again.json") == 1
    write_records(folder / "again.json", ZSRE)
    assert read_requests(f"{url}/again.json") == read_requests(ZSRE)


def test_what_a_server_does_not_have_and_a_server_that_is_not_there(site):
    for url in (f"{site[1]}/missing.json", "http://127.0.0.1:9/a.json", "https://no-such-host.invalid/a.jsonl"):
        start = time.monotonic()
        with pytest.raises(ConfigError, match=f"{url} cannot be fetched: .*; check it, or download it"):
            read_requests(url)
        assert time.monotonic() - start < 20


# ---- data sets ----


@pytest.mark.parametrize("schema", [*SAMPLES, "all"])
def test_datasets_read_from_a_file_give_what_the_file_gives(schema, tmp_path):
    """Also where three schemas share a file, and each record has every column."""
    path = write_records(tmp_path / "a.jsonl", SAMPLES.get(schema) or [*COUNTERFACT, *OWN, *ZSRE])
    loaded = datasets.load_dataset("json", data_files=str(path), cache_dir=tmp_path / "cached")
    assert read_requests(loaded["train"]) == read_requests(loaded) == read_requests(path)


@pytest.fixture
def folder(tmp_path):
    """A data set as it lies on the hub, with two splits."""
    place = tmp_path / "owner" / "set"
    place.mkdir(parents=True)
    write_records(place / "train.jsonl", OWN)
    write_records(place / "test.jsonl", OWN[:1])
    return place


def test_splits_of_a_folder(folder):
    assert read_requests(folder, "train") == read_requests(OWN)
    assert read_requests(str(folder), "test") == read_requests(folder, "train[:1]") == read_requests(OWN[:1])


def test_one_split_needs_no_name(folder):
    (folder / "test.jsonl").unlink()
    assert read_requests(folder) == read_requests(OWN)


def test_saved_data_sets(tmp_path):
    one = datasets.Dataset.from_list(OWN)
    one.save_to_disk(str(tmp_path / "one"))
    several = datasets.DatasetDict({"a": one, "b": one.select([1])})
    several.save_to_disk(str(tmp_path / "several"))
    assert read_requests(tmp_path / "one") == read_requests(tmp_path / "several", "a") == read_requests(OWN)
    assert read_requests(several, "b") == read_requests(OWN[1:])


def test_a_local_path_wins_over_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    assert read_requests("owner/set", "train") == read_requests(OWN)
    write_records(folder.parent / "file", OWN)
    assert read_requests("owner/file") == read_requests(OWN)


@pytest.mark.parametrize("split", [None, "validation", "train[:0]"])
def test_a_split_that_is_missing_or_empty(folder, split):
    with pytest.raises(ConfigError, match=r"train.*test" if split != "train[:0]" else "no data"):
        read_requests(folder, split)
    if split != "train[:0]":
        with pytest.raises(ConfigError, match=r"the data set .* split.* a, b"):
            read_requests(
                datasets.DatasetDict(a=datasets.Dataset.from_list(OWN), b=datasets.Dataset.from_list(OWN)), split
            )


def test_an_empty_data_set():
    with pytest.raises(RequestError, match="at least one request"):
        read_requests(datasets.Dataset.from_list(OWN).select([]))


def test_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty' cannot be read as a data set: .*; give 'builtin'"):
        read_requests(tmp_path / "empty")


def test_a_split_of_what_has_none(tmp_path):
    path = write_records(tmp_path / "a.json", OWN)
    for source in ("builtin", path, "http://127.0.0.1:9/a.json", OWN, datasets.Dataset.from_list(OWN)):
        with pytest.raises(ConfigError, match=r"split='train': .* has no splits"):
            read_requests(source, "train")


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_cannot_be_reached_is_said_quickly(offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"no file or folder 'owner/set' here, .* hub .*; give 'builtin'.* HF_HUB_OFF"
    ):
        read_requests("owner/set")
    assert time.monotonic() - start < 10


def test_without_a_network_the_hubs_data_sets_come_from_the_cache(tmp_path, monkeypatch):
    """A data set is prepared from a file and put where datasets keeps those that it has from the hub."""
    path = write_records(tmp_path / "a.jsonl", COUNTERFACT)
    datasets.load_dataset("json", data_files=str(path), cache_dir=tmp_path / "prepared")
    (arrow,) = (tmp_path / "prepared").rglob("json-train.arrow")
    place = tmp_path / "cached" / "owner___set" / "default" / "0.0.0" / arrow.parent.name
    shutil.copytree(arrow.parent, place)
    (place / arrow.name).rename(place / "set-train.arrow")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert read_requests("owner/set") == read_requests("owner/set", "train") == read_requests(COUNTERFACT)
    with pytest.raises(ConfigError, match="test"):
        read_requests("owner/set", "test")
    with pytest.raises(ConfigError, match="owner/set: entry 0, text = None"):
        next(read_texts("owner/set"))


# ---- bad files ----


@pytest.mark.parametrize("source", [None, 5, 2.5])
def test_what_is_no_source(source):
    with pytest.raises(ConfigError, match=type(source).__name__):
        read_requests(source)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.json", '[\n {"prompt": "{} is"},\n {"prompt": oops}\n]\n', 3),
        ("a.json", "not json", 1),
        ("a.json", "", 1),
        ("a.json", '[{"prompt": "{} is"},\n', 2),  # cut off after a line's end
        ("a.json", '[{"prompt": "{} is"}', 1),
        ("a.jsonl", '{"prompt": "{} is", "subject": "a", "target_new": "b"}\n\n{"prompt": \n', 3),
        ("a.jsonl.gz", "\n\n{]\n", 3),
    ],
)
def test_broken_json_names_file_and_line(name, text, line, tmp_path):
    path = write(tmp_path / name, text)
    with pytest.raises(RequestError) as caught:
        read_requests(path)
    (problem,) = caught.value.faults
    assert problem.index == line
    assert f"broken JSON in {path}, line {line}, column" in str(caught.value)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085"])
def test_only_line_feeds_end_a_jsonl_line(character, tmp_path):
    record = {**OWN[0], "reference": f"one{character}text"}
    line = json.dumps(record, ensure_ascii=False)
    path = write(tmp_path / "a.jsonl", line + "\r\n" + json.dumps(OWN[1]) + "\n")
    assert [request.reference for request in read_requests(path)] == [record["reference"], None]


def test_windows_line_ends(tmp_path):
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\r\n" for record in OWN))
    assert read_requests(path) == read_requests(OWN)


PACKED = gzip.compress(as_json(OWN).encode())


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe{}", PACKED[:-9], PACKED[:12] + b"\xff" * 9],
    ids=["no-utf8", "cut", "damaged"],
)
def test_unreadable_files(data, tmp_path):
    path = tmp_path / ("a.json" if data.startswith(b"\xff") else "a.json.gz")
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_requests(path)


def test_content_says_whether_a_file_is_packed(tmp_path):
    """Servers unpack what they send, and people rename files."""
    (tmp_path / "a.json").write_bytes(PACKED)
    (tmp_path / "b.jsonl.gz").write_text(as_lines(OWN))
    assert read_requests(tmp_path / "a.json") == read_requests(tmp_path / "b.jsonl.gz") == read_requests(OWN)


@pytest.mark.parametrize("text", ["5", '"builtin"', "[1, 2]", "null", "[]"])
def test_json_that_holds_no_requests(text, tmp_path):
    with pytest.raises(RequestError):
        read_requests(write(tmp_path / "a.json", text))


def test_bad_entries_of_a_file_are_all_reported(tmp_path):
    records = [OWN[0], {**OWN[0], "prompt": "none"}, {**OWN[0], "target_new": ""}]
    with pytest.raises(RequestError) as caught:
        read_requests(write(tmp_path / "a.jsonl", as_lines(records)))
    assert [(problem.index, problem.field) for problem in caught.value.faults] == [(1, "prompt"), (2, "target_new")]


# ---- texts ----

TEXTS = ["First document.\nIt has two lines.", "Zweites Dokument, größer.", "third"]


def corpus(folder, kind):
    """A source with the texts, of a kind."""
    entries = [{"text": text, "other": number} for number, text in enumerate(TEXTS)]
    dataset = datasets.Dataset.from_list(entries)
    if kind in ("dataset", "list", "splits"):
        return {"dataset": dataset, "list": entries, "splits": datasets.DatasetDict(validation=dataset)}[kind]
    if kind in ("folder", "arrow"):
        dataset.save_to_disk(folder / "saved")
        return folder / "saved" if kind == "folder" else next((folder / "saved").glob("*.arrow"))
    return write_records(folder / f"corpus.{kind}", entries)


KINDS = ["jsonl", "json", "jsonl.gz", "json.gz", "arrow", "folder", "dataset", "splits", "list"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_of_texts(kind, tmp_path):
    source = corpus(tmp_path, kind)
    assert list(read_texts(source)) == TEXTS
    assert [entry["text"] for entry in read_entries(source)] == TEXTS  # one reader for entries and texts


def test_texts_of_a_url(site):
    folder, url = site
    corpus(folder, "jsonl.gz")
    write(folder / "a.txt", TEXTS[0])
    assert list(read_texts([f"{url}/corpus.jsonl.gz", f"{url}/a.txt?raw=1"])) == [*TEXTS, TEXTS[0]]


def test_a_text_file_is_one_document(tmp_path):
    paths = [write(tmp_path / name, text) for name, text in zip(["a.txt", "b.txt.gz", "c"], TEXTS, strict=True)]
    assert list(read_texts([paths[0], str(paths[1]), paths[2], corpus(tmp_path, "dataset")])) == TEXTS * 2
    (tmp_path / "windows.txt").write_bytes("\ufeffone\r\n\r\ntwo\r\n".encode())
    assert list(read_texts(tmp_path / "windows.txt")) == ["one\n\ntwo\n"]
    assert read_text(tmp_path / "windows.txt") == "one\r\n\r\ntwo\r\n"


def test_json_lines_are_read_as_far_as_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("cakeflow.data.files.LARGEST", 100)
    path = write(tmp_path / "a.jsonl", '{"text": "one"}\n' * 50 + "broken" + "\n" + "x" * 101)
    texts = read_texts(path)
    assert [next(texts) for _ in range(50)] == ["one"] * 50
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 51, column 1"):
        next(texts)
    with pytest.raises(ConfigError, match=r"a\.jsonl has more than"):
        read_entries(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a\.jsonl, line 2, column 1"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "a"}', r"a\.jsonl: entry 1, text = None: .*field 'text'"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": 5}\n', r"a\.jsonl: entry 1, text = 5: "),
        ("a.jsonl", b"[1]\n", r"a\.jsonl: entry 0, text"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', r"a\.json, line 2.*with one object a line \.jsonl"),
        ("latin.txt", "größer".encode("latin-1"), r"latin\.txt cannot be read as UTF-8 text: .* save it as such"),
        ("latin.jsonl", '{"text": "größer"}'.encode("latin-1"), r"latin\.jsonl cannot be read as UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"text")[:-6], r"a\.txt\.gz cannot be read .*fetch it again"),
        ("a.arrow", b"none", r"a\.arrow' cannot be read as a data set"),
    ],
)
def test_bad_corpora_are_named(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        list(read_texts([{"text": "good"}, tmp_path / name]))


def test_a_false_gz_is_read_by_its_content(tmp_path):
    (tmp_path / "a.txt.gz").write_text(TEXTS[1], encoding="utf-8")
    assert list(read_texts(tmp_path / "a.txt.gz")) == [TEXTS[1]]


@pytest.mark.parametrize(
    "source", [None, 5, b"text", "missing.txt", "no/such-file.arrow", "no/file.txt.gz", "owner/set"]
)
def test_what_is_no_corpus(source):
    with pytest.raises(ConfigError, match=r"; give 'builtin', a \.json"):
        list(read_texts(source))


def test_entries_without_text_are_named():
    for source in (datasets.Dataset.from_dict({"body": ["x"]}), "builtin", {"body": "x"}):
        with pytest.raises(ConfigError, match=r"entry 0, text = None: .*field 'text'"):
            list(read_texts(source))


def test_parse_json_counts_from_the_first_line():
    assert parse_json('{"a": [1]}', "x.json") == {"a": [1]}
    with pytest.raises(RequestError, match=r"x\.json, line 12, column 2"):
        parse_json("[1,\n ?]", "x.json", 11)
