"""What users and disks get wrong: refused by name before the model runs, and the model stays as it is."""

import copy
import gzip
import json
import unicodedata
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from records import COUNTERFACT
from tokenizers import normalizers

from cakeflow import Contexts, Editor, EditRequest, Probe
from cakeflow.data import files, read_requests, read_texts
from cakeflow.data.schemas import parse_requests
from cakeflow.errors import ConfigError, EditError, RequestError
from cakeflow.models import Site

GOOD = {"prompt": "The river {} flows into", "subject": "Elbe", "target_new": "the Black Sea"}
ZSRE = {"subject": "Anna Berg", "src": "Where did Anna Berg study?", "answers": ["Uppsala"], "loc": "a", "loc_ans": "b"}
SCHEMAS = [GOOD, COUNTERFACT, ZSRE]
LONG = "word " * 3000
NAN, INFINITY = float("nan"), float("inf")


def own(**changes):
    return {**GOOD, **changes}


def probe(**changes):
    return own(subject="Oder", probes=[{"kind": "paraphrase", "prompt": "The mouth of the Elbe lies at", **changes}])


def decomposed(text):
    return unicodedata.normalize("NFD", text)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@dataclass(frozen=True)
class Case:
    """A source, and what its refusal must say; the index is that of the entry, or the line of a file from 1."""

    name: str
    source: Any
    field: str
    remedy: str
    index: int = 1


def entry(name, bad, field, remedy):
    """A bad entry after a good one."""
    return Case(name, [GOOD, bad], field, remedy)


REQUESTS = [
    # types
    entry("text-for-an-entry", "The Elbe flows into the Black Sea", "entry", "give an EditRequest or a mapping"),
    entry("list-for-an-entry", [GOOD], "entry", "give an EditRequest or a mapping"),
    entry("none-for-an-entry", None, "entry", "give an EditRequest or a mapping"),
    entry("bytes", own(subject=b"Elbe"), "subject", "must be a string"),
    entry("integer", own(target_new=1900), "target_new", "must be a string"),
    entry("nan", own(target_new=NAN), "target_new", "must be a string"),
    entry("infinity", own(subject=-INFINITY), "subject", "must be a string"),
    entry("nan-for-a-missing-text", own(target_true=NAN), "target_true", "must be a string"),
    entry("boolean", own(prompt=True), "prompt", "must be a string"),
    entry("list-for-a-text", own(target_new=["the Black Sea"]), "target_new", "must be a string"),
    entry("nested-too-deeply", own(subject=nested(100_000)), "subject", "must be a string"),
    entry("too-many-digits", own(subject=10**5000), "subject", "must be a string"),
    entry("boolean-case-id", own(case_id=True), "case_id", "an integer or a text"),
    entry("surrogate-case-id", own(case_id="a\ud800"), "case_id", "valid Unicode"),
    entry("endless-case-id", own(case_id=10**5000), "case_id", "100 digits at most"),
    entry("nan-case-id", own(case_id=NAN), "case_id", "an integer or a text"),
    entry("relation-by-number", own(relation=31), "relation", "must be a string"),
    # empty and blank
    entry("empty-entry", {}, "prompt", "every request needs prompt, subject and target_new"),
    entry("empty-prompt", own(prompt=""), "prompt", "must not be empty or blank"),
    entry("empty-subject", own(subject=""), "subject", "must not be empty or blank"),
    entry("blank-subject", own(subject=" \t\n"), "subject", "must not be empty or blank"),
    entry("zero-width-subject", own(subject="\u200b\ufeff"), "subject", "must not be empty or blank"),
    entry("control-characters", own(target_new="\x00\x07"), "target_new", "must not be empty or blank"),
    entry("empty-target", own(target_new=""), "target_new", "must not be empty or blank"),
    entry("empty-reference", own(reference=""), "reference", "must not be empty or blank"),
    entry("space-around-the-subject", own(subject="Elbe "), "subject", "remove the white space"),
    entry("missing-subject", own(subject=None), "subject", "missing"),
    # the place of the subject
    entry("no-place", own(prompt="The river flows into"), "prompt", "found 0, and the subject does not occur"),
    entry("two-places", own(prompt="{} and {} meet in"), "prompt", "found 2; write braces that are part of the text"),
    entry("json-in-the-prompt", own(prompt='{"a": {}, "b": {}} of {} is'), "prompt", "found 3; write braces"),
    entry("named-place", own(prompt="The river {name} flows into"), "prompt", "found 0, and the subject does not"),
    entry("subject-twice", own(prompt="The Elbe, or Elbe, is"), "prompt", "occurs 2 times: put {} where it is meant"),
    entry("subject-inside-a-word", own(prompt="A banana is", subject="ana"), "prompt", "only inside a longer word"),
    entry("subject-in-other-letters", own(prompt="The elbe flows into"), "prompt", "the subject does not occur either"),
    entry("composed-prompt-decomposed-subject", own(prompt="Die Würm fließt in", subject=decomposed("Würm")), "prompt",
          "once both are in one Unicode normal form (NFC against NFD"),
    entry("decomposed-prompt-composed-subject", own(prompt=decomposed("In Malmö"), subject="Malmö"), "prompt",
          "unicodedata.normalize('NFC'"),
    entry("zsre-in-two-normal-forms", {**ZSRE, "subject": "Åsa", "src": decomposed("Where was Åsa?")}, "subject",
          "must occur in src; it does once both are in one Unicode normal form"),
    entry("object-in-full", EditRequest("The Elbe flows into", "Elbe", "it"), "prompt", "in place of the subject"),
    # targets
    entry("nothing-to-edit", own(target_true="the Black Sea "), "target_new", "there is nothing to edit"),
    entry("nothing-to-edit-in-two-normal-forms", own(target_new="Malmö", target_true=decomposed("Malmö")), "target_new",
          "there is nothing to edit"),
    entry("zero-token-target", own(subject="Oder", target_new="☃"), "target_new", "no token of its own"),
    entry("zero-token-subject", own(prompt="{} is", subject="☃"), "subject", "the tokenizer gives it no token"),
    entry("zero-token-answer", probe(kind="neighborhood", prompt="The Oder ends in", expected="☃☃"), "probes.expected",
          "no token of its own"),
    entry("zero-token-true-target", own(subject="Oder", target_true="☃"), "target_true", "no token of its own"),
    # too long
    entry("long-prompt", own(prompt=LONG + "{} is"), "prompt", "longer than the model's"),
    entry("long-subject", own(subject=LONG + "end"), "prompt", "longer than the model's"),
    entry("long-target", own(subject="Oder", target_new=LONG), "prompt", "longer than the model's"),
    entry("long-probe", probe(prompt=LONG), "probes.prompt", "positions, with its target; shorten it"),
    # Unicode
    entry("lone-surrogate", own(subject="Elbe\ud83d"), "subject", "give valid Unicode text"),
    entry("lone-surrogate-in-a-probe", probe(prompt="\udc00 is"), "probes.prompt", "give valid Unicode text"),
    # contradictions
    entry("contradiction", own(target_new="the Red Sea"), "target_new", "contradicts entry 0"),
    Case("contradiction-in-two-normal-forms",
         [own(subject="Würm"), own(subject=decomposed("Würm"), target_new="the Red Sea")], "target_new",
         "contradicts entry 0"),
    # fields and probes
    entry("unknown-field", own(target="the Black Sea"), "target", "unknown field; known: case_id, fact_token"),
    entry("fields-of-something-else", {"text": "a", "label": 1}, "prompt", "found ['label', 'text']"),
    entry("one-probe-for-a-list", own(probes={"kind": "paraphrase", "prompt": "x"}), "probes", "give a list of"),
    entry("probe-as-text", own(probes=["The Elbe ends in"]), "probes", "a probe has kind, prompt"),
    entry("probe-with-an-unknown-field", probe(answer="x"), "probes", "a probe has kind, prompt"),
    entry("probe-of-no-kind", probe(kind="rewrite"), "probes.kind", "must be one of paraphrase, neighborhood"),
    entry("probe-with-a-number", probe(expected=4), "probes.expected", "must be a string"),
    entry("probes-as-dictionaries", EditRequest("{} is", "c", "d", probes=({"kind": "x"},)), "probes", "a tuple"),
    entry("counterfact-target-as-text", {"requested_rewrite": {"prompt": "{} is", "subject": "x", "target_new": "y"}},
          "target_new.str", "missing in this schema"),
    entry("counterfact-prompts-as-text", {**COUNTERFACT, "paraphrase_prompts": "one"}, "paraphrase_prompts",
          "give a list of prompts"),
    entry("zsre-without-answers", {**ZSRE, "answers": []}, "answers", "at least one answer"),
    entry("zsre-about-somebody-else", {**ZSRE, "subject": "Nils"}, "subject", "must occur in src"),
    # lists
    Case("empty-list", [], "requests", "give at least one request", index=0),
]  # fmt: skip

LINE = json.dumps(GOOD).encode()
BROKEN = [
    ("broken.json", b'[\n {"prompt": "{} is"},\n {"prompt": oops}\n]', 3, "line 3, column 13"),
    ("broken.jsonl", LINE + b"\n\n" + LINE[:-1], 3, "line 3, column"),
    ("empty.json", b"", 1, "line 1, column 1"),
    ("cut.json", b"[" + LINE + b",\n", 2, "line 2"),
    ("lines.json", LINE + b"\n" + LINE, 2, "line 2, column 1: Extra data"),
    ("python.json", b"[{'prompt': '{} is'}]", 1, "property name enclosed in double quotes"),
    ("control.json", b'["a\x01"]', 1, "Invalid control character"),
    ("deep.json", b"[" * 100_000, 1, "recursion depth"),
    ("deep.jsonl", LINE + b"\n" + b'{"a":' * 100_000, 2, "recursion depth"),
    ("digits.json", b'[{"case_id": ' + b"9" * 5000 + b"}]", 1, "Exceeds the limit"),
    ("twice.jsonl", LINE + b'\n{"prompt": "{} is", "subject": "a", "subject": "b"}', 2, "gives a field twice"),
    ("table.csv", b"prompt,subject,target_new\n{} is,a,b\n", 1, "facts in texts come as .json or .jsonl"),
    ("facts.yaml", b'!!python/object/apply:os.system ["touch marker"]', 1, "line 1, column 1"),
]
UNREADABLE = [
    ("latin.json", '[{"prompt": "Malmö"}]'.encode("latin-1"), "cannot be read as UTF-8"),
    ("utf16.json", LINE.decode().encode("utf-16"), "cannot be read as UTF-8"),
    ("cut.json.gz", gzip.compress(LINE)[:-6], "Compressed file ended"),
    ("damaged.jsonl.gz", gzip.compress(LINE)[:12] + b"\xff" * 20, "cannot be read"),
    ("checksum.json.gz", gzip.compress(LINE)[:-8] + b"\0" * 8, "CRC check failed"),
    ("picture.json", b"\x89PNG\r\n\x1a\n\x00", "cannot be read as UTF-8"),
    ("large.json", b" " * 3000 + LINE, "more than"),
    ("bomb.json.gz", gzip.compress(b" " * 100_000), "more than"),
]
ENTRIES = [  # files whose JSON is fine and whose entries are not
    ("nan.json", b'[{"prompt": NaN, "subject": "Elbe", "target_new": "it"}]', "prompt", "must be a string"),
    ("infinity.jsonl", LINE.replace(b'"Elbe"', b"-Infinity"), "subject", "must be a string"),
    ("number.json", b"5", "entry", "give an EditRequest or a mapping"),
    ("empty-list.json", b"[]", "requests", "give at least one request"),
    ("blank.jsonl", b"\n \n", "requests", "give at least one request"),
    ("list.jsonl", b"[" + LINE + b"]", "entry", "give an EditRequest or a mapping"),
    ("surrogate.json", LINE.replace(b"Elbe", b"Elbe\\ud83d"), "subject", "valid Unicode"),
]
SOURCES = [
    (None, "got NoneType"),
    (True, "got bool"),
    (2.5, "got float"),
    (LINE, "got bytes"),
    (json.dumps([GOOD] * 9), "no file or folder"),  # requests where their file's name should be
    ("facts\0.json", "no file or folder"),
    ("no-such-file.json", "no file or folder"),
]


@pytest.fixture(scope="module")
def editor(_models):
    """An editor of a tiny model whose tokenizer drops one character."""
    lm = copy.deepcopy(_models["gpt2"])
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("☃", ""), normalizers.Strip()]
    )
    moment = torch.eye(lm.key_width(Site(1, "mlp_out")), dtype=torch.float64)
    trainer = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Editor.from_pretrained(
        lm.model, "memit", tokenizer=lm.tokenizer, layers=[1], moments={1: moment}, trainer=trainer,
        contexts=Contexts.of(["{}", "It rained. {}"]), targets={"steps": 2},
    )  # fmt: skip


@pytest.fixture
def untouched(editor):
    """The editor, whose model must neither run nor change."""
    before, runs = editor.module.lm.fingerprint(), []
    handle = editor.model.register_forward_pre_hook(lambda *_: runs.append(1))
    yield editor
    handle.remove()
    assert not runs
    assert editor.module.lm.fingerprint() == before
    assert not len(editor.journal)


def refused(editor, source):
    with pytest.raises(RequestError, match="nothing was changed") as caught:
        editor.fit(source)
    assert all(str(problem) in str(caught.value) for problem in caught.value.faults)
    return caught.value.faults


def says(problems, field, remedy):
    """Whether one of the problems is this one."""
    result = [problem for problem in problems if problem.field == field and remedy in problem.remedy]
    return bool(result)


def test_what_the_tables_start_from_is_good():
    assert len(parse_requests(SCHEMAS)) == 3
    assert len({case.name for case in REQUESTS}) == len(REQUESTS)


@pytest.mark.filterwarnings("ignore:.*targets end a sentence:cakeflow.errors.RequestWarning")
@pytest.mark.parametrize("case", REQUESTS, ids=lambda case: case.name)
def test_malformed_requests(case, untouched):
    problems = refused(untouched, case.source)
    assert {problem.index for problem in problems} == {case.index}
    assert says(problems, case.field, case.remedy)


def test_all_faults_of_all_entries_are_named_at_once_whatever_finds_them(untouched):
    faults = [own(subject="Oder", target_new="☃"), GOOD, own(subject=LONG + "end"), own(prompt="{} is", subject="☃")]
    problems = refused(untouched, faults)
    assert [(problem.index, problem.field) for problem in problems] == [
        (0, "target_new"), (2, "prompt"), (3, "subject"),
    ]  # fmt: skip
    probes = [own(probes=[Probe("paraphrase", LONG)]), own(subject="Oder", probes=[Probe("paraphrase", LONG)] * 2)]
    assert [problem.index for problem in refused(untouched, probes)] == [0, 1]


@pytest.mark.parametrize(("name", "content", "line", "remedy"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_files(name, content, line, remedy, untouched, tmp_path):
    (tmp_path / name).write_bytes(content)
    (problem,) = refused(untouched, tmp_path / name)
    assert (problem.index, problem.field) == (line, "line")
    assert remedy in problem.remedy
    assert name in problem.remedy
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(("name", "content", "reason"), UNREADABLE, ids=[case[0] for case in UNREADABLE])
def test_unreadable_files(name, content, reason, untouched, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 2048)
    monkeypatch.setattr(files, "LARGEST_DOCUMENT", 2048)
    (tmp_path / name).write_bytes(content)
    for read in (untouched.fit, lambda path: list(read_texts(path))):
        with pytest.raises(ConfigError, match=rf"{name} .*{reason}"):
            read(tmp_path / name)


@pytest.mark.parametrize(("name", "content", "field", "remedy"), ENTRIES, ids=[case[0] for case in ENTRIES])
def test_files_with_malformed_entries(name, content, field, remedy, untouched, tmp_path):
    (tmp_path / name).write_bytes(content)
    problems = refused(untouched, tmp_path / name)
    assert {problem.index for problem in problems} == {0}
    assert says(problems, field, remedy)


@pytest.mark.parametrize(("source", "reason"), SOURCES, ids=range(len(SOURCES)))
def test_what_is_no_source(source, reason, untouched):
    with pytest.raises(ConfigError, match=reason):
        untouched.fit(source)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    for name, text in (("a.json", f"[{LINE.decode()}]"), ("a.jsonl", LINE.decode())):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read_requests(tmp_path / name) == read_requests(GOOD)


# ---- what is no error: a warning ----


@torch.no_grad()
def said(editor, prompt):
    """The token that the model gives next."""
    return editor.tokenizer.decode(
        int(editor.model(**editor.tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())
    )


@pytest.mark.parametrize("evaluate", [True, False])
def test_what_the_model_says_already_and_what_is_said_twice_are_warned_of_once(editor, evaluate):
    name, token = next((name, token) for name in map(str, range(999)) if (token := said(editor, name))[0] == " ")
    known = {"prompt": "{}", "subject": name, "target_new": token}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        editor.fit([GOOD, known, GOOD, known], evaluate=evaluate)
    editor.rollback()
    texts = [str(each.message) for each in caught]
    (repeated,) = [text for text in texts if "repeat an earlier one" in text]
    (already,) = [text for text in texts if "gives already" in text]
    assert ": 2 (as 0), 3 (as 1) (numbered" in repeated
    assert ": 1, 3 (numbered from 0, in the order of the edits), 2 of 4;" in already


# ---- fuzzing ----

ODD = ["{}", "{{}}", "{name}", " ", "Elbe", "é", "e\u0301", "\ud800", "\u200f", Probe("paraphrase", "x"), NAN]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=4) | st.sampled_from(ODD) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def places(value, path=()):
    """Every path into nested data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, inner in items for place in places(inner, (*path, key))]


def put(record, path, value):
    """Replace a place, unless an earlier change has taken it away."""
    with suppress(TypeError, LookupError):
        for step in path[:-1]:
            record = record[step]
        record[path[-1]] = value


@st.composite
def mutated(draw):
    """A good record of any schema with some places replaced, at any depth."""
    record = copy.deepcopy(draw(st.sampled_from(SCHEMAS)))
    for path, value in draw(st.lists(st.tuples(st.sampled_from(places(record)), VALUES), max_size=3)):
        put(record, path, value)
    return record


def outcome(source):
    """Requests, or our error; anything else gets out."""
    try:
        return read_requests(source)
    except EditError as error:
        return error


@settings(max_examples=400)
@given(st.lists(mutated() | VALUES, max_size=3) | VALUES)
def test_whatever_comes_as_requests_only_our_errors_get_out(source):
    result = outcome(source)
    assert str(result)
    for request in result if isinstance(result, list) else ():
        assert request.text[: request.subject_end].endswith(request.subject)
        assert parse_requests([request.to_dict()]) == [request]


@st.composite
def damaged(draw):
    """A good file with some bytes replaced, taken out or put in, packed or not, before or after."""
    lines = [json.dumps(record, ensure_ascii=draw(st.booleans())).encode() for record in SCHEMAS]
    content = b"\n".join(lines) if draw(st.booleans()) else b"[" + b",\n".join(lines) + b"]"
    content = gzip.compress(content) if (early := draw(st.booleans())) else content
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(content)))
        content = content[:at] + draw(st.binary(max_size=4)) + content[at + draw(st.integers(0, 4)) :]
    return content if early or draw(st.booleans()) else gzip.compress(content)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | damaged(), st.sampled_from(["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz", "a.txt"]))
def test_whatever_is_in_a_file_only_our_errors_get_out(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert str(outcome(tmp_path / name))
    with suppress(ConfigError):
        assert all(isinstance(text, str) for text in read_texts(tmp_path / name))
