"""Requests from files, lists and data sets, unchanged in their own schemas."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from cakeflow.data import builtin_facts, read_requests
from cakeflow.errors import ConfigError, RequestError
from cakeflow.request import EditRequest, Probe

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


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("schema", SAMPLES)
def test_files_give_what_the_list_gives(schema, suffix, tmp_path):
    records = SAMPLES[schema]
    path = write(tmp_path / f"facts{suffix}", (as_lines if ".jsonl" in suffix else as_json)(records))
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


@pytest.mark.parametrize("name", ["missing.json", "builtin2", ""])
def test_missing_file(name, tmp_path):
    with pytest.raises(ConfigError, match=r"no file .* give a .json or .jsonl file, or 'builtin'"):
        read_requests(tmp_path / name)  # the last one is the folder itself


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
    [b"\xff\xfe{}", PACKED[:-9], b"no gzip", PACKED[:12] + b"\xff" * 9],
    ids=["no-utf8", "cut", "no-gzip", "damaged"],
)
def test_unreadable_files(data, tmp_path):
    path = tmp_path / ("a.json" if data.startswith(b"\xff") else "a.json.gz")
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_requests(path)


@pytest.mark.parametrize("text", ["5", '"builtin"', "[1, 2]", "null", "[]"])
def test_json_that_holds_no_requests(text, tmp_path):
    with pytest.raises(RequestError):
        read_requests(write(tmp_path / "a.json", text))


def test_bad_entries_of_a_file_are_all_reported(tmp_path):
    records = [OWN[0], {**OWN[0], "prompt": "none"}, {**OWN[0], "target_new": ""}]
    with pytest.raises(RequestError) as caught:
        read_requests(write(tmp_path / "a.jsonl", as_lines(records)))
    assert [(problem.index, problem.field) for problem in caught.value.problems] == [(1, "prompt"), (2, "target_new")]
