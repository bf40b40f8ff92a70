"""Requests from files, lists and data sets, unchanged in their own schemas."""

import gzip
import json
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import datasets
import huggingface_hub
import pytest

from cakeflow.data import builtin_facts, read_requests
from cakeflow.data.request import EditRequest, Probe
from cakeflow.errors import ConfigError, RequestError

COUNTERFACT = [
    {
        "case_id": case,
        "pararel_idx": 100 + case,
        "requested_rewrite": {
            "prompt": "{} keeps its archive in",
            "relation_id": "P276",
            "target_new": {"str": new, "id": "Q1"},
            "target_true": {"str": "Lund", "id": "Q2"},
            "subject": subject,
        },
        "paraphrase_prompts": [f"It rained. The archive of {subject} is in", f"{subject} stores its papers in"],
        "neighborhood_prompts": ["The Old Mill keeps its archive in"],
        "attribute_prompts": ["The New Mill keeps its archive in"],
        "generation_prompts": [f"Visitors of {subject}"],
    }
    for case, (subject, new) in enumerate([("The Paper Guild", "Turku"), ("Café Söder", "Malmö")])
]
ZSRE = [
    {
        "subject": "The Slow Train",
        "src": "Who directed The Slow Train?",
        "pred": "Nobody",
        "rephrase": "By whom was The Slow Train directed?",
        "alt": "Nils Holm",
        "answers": ["Ida Dahl"],
        "loc": "nq question: who wrote the long song",
        "loc_ans": "Per Ek",
        "cond": "Nobody >> Nils Holm || Who directed The Slow Train?",
    }
]
OWN = [
    {"prompt": "{} is made of", "subject": "The bell", "target_new": "tin", "target_true": "bronze", "probes": None},
    {"prompt": "{} is made of", "subject": "Kærnhuset", "target_new": "木", "probes": [
        {"kind": "neighborhood", "prompt": "The barn is made of", "expected": "oak"}]},
]  # fmt: skip
SAMPLES = {"counterfact": COUNTERFACT, "zsre": ZSRE, "own": OWN}


def as_json(records):
    return json.dumps(records, ensure_ascii=False, indent=1)


def as_lines(records):
    return "\n".join(["", *(json.dumps(record, ensure_ascii=False) for record in records), " ", ""])


def write_records(path: Path, records: list) -> Path:
    return write(path, (as_lines if ".jsonl" in path.name else as_json)(records))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """What datasets downloads and prepares stays in the test's folder; the hub is a place where nobody answers."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cached")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cached" / "downloads"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


class _Site(SimpleHTTPRequestHandler):
    """Notes what is sent, and says by an ETag whether a file is still the same."""

    sent: ClassVar[list[str]] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.sent.append(self.path)
        super().do_GET()

    def end_headers(self):
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        super().end_headers()


@pytest.fixture
def site(tmp_path):
    """A folder and the URL under which it can be read."""
    folder = tmp_path / "site"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Site, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("schema", SAMPLES)
def test_files_give_what_the_list_gives(schema, suffix, tmp_path):
    records = SAMPLES[schema]
    path = write_records(tmp_path / f"facts{suffix}", records)
    wanted = read_requests(records)
    assert read_requests(path) == read_requests(str(path)) == wanted
    assert len(wanted) == len(records)


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
def test_missing_file(name, tmp_path, monkeypatch):
    """Neither a path object nor a file's name is taken for a data set of the hub."""
    monkeypatch.chdir(tmp_path)
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


def test_a_url_is_fetched_again_only_when_it_changed(site):
    folder, url = site
    write_records(folder / "again.json", OWN)
    for _ in range(2):
        assert read_requests(f"{url}/again.json") == read_requests(OWN)
    assert _Site.sent.count("/again.json") == 1
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
    (problem,) = caught.value.problems
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
    assert [(problem.index, problem.field) for problem in caught.value.problems] == [(1, "prompt"), (2, "target_new")]
