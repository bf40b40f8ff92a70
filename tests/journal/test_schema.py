"""The types of what a run folder holds: strict, immutable, and the same for writing and reading."""

import json
import math
from pathlib import Path

import pytest
from bodies import EXAMPLES, body
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cakeflow.errors import LedgerError, RunFolderError
from cakeflow.journal.ledger import bodies, canonical, read_entries
from cakeflow.journal.schema import (
    BODIES,
    EvaluatedRequest,
    PromptAnswer,
    RunBody,
    RunInfo,
)
from cakeflow.storage.typed import LARGEST, parse_as

RUN = Path(__file__).parents[1] / "fixtures/format1/run"
PLACE = "transformer.h.{}.mlp.c_proj.weight".format


def test_every_line_of_the_ledger_of_format_1_is_read():
    lines = [json.loads(line) for line in (RUN / "journal/ledger.jsonl").read_text().splitlines()]
    entries = list(read_entries(RUN / "journal/ledger.jsonl", PLACE))
    assert [entry.kind for entry in entries] == [
        "model", "run", "evaluation", "batch", "batch", "evaluation", "end", "rollback",
    ]  # fmt: skip
    for line, entry in zip(lines, entries, strict=True):
        assert (line["number"], line["hash"], line["previous"]) == (entry.number, entry.hash, entry.previous)
        assert type(entry.body) is BODIES[entry.kind]
        if entry.kind not in ("batch", "rollback"):
            assert canonical(entry.body.to_dict()) == canonical(line["body"])
    assert [run.format for run in bodies(entries, RunBody)] == [1]


@pytest.mark.parametrize("name", ["before.jsonl", "after.jsonl"])
def test_answers_of_format_1_are_read(name):
    for line in (RUN / name).read_text().splitlines():
        data = json.loads(line)
        request = parse_as(EvaluatedRequest, line, name, RunFolderError, "")
        renamed = line.replace('"wanted"', '"expected"').replace('"wanted_logprob"', '"expected_logprob"')
        assert request.to_dict() == json.loads(renamed)
        assert request.key == (data["prompt"], data["subject"], data["target_new"])
        assert [prompt.prompt for prompt in request.of_kind("neighborhood")] == ["Eve lives in"]


def test_run_info_of_format_1_is_read():
    text = (RUN / "run.json").read_text()
    info = parse_as(RunInfo, text, "run.json", RunFolderError, "")
    assert json.dumps(info.to_dict(), indent=1, ensure_ascii=False) == text


@pytest.mark.parametrize("kind", BODIES)
def test_bodies_are_strict_and_immutable(kind):
    whole = body(kind)
    assert BODIES[kind].model_validate(whole.to_dict()) == whole
    with pytest.raises(ValidationError):
        BODIES[kind].model_validate(EXAMPLES[kind] | {"more": 1})
    name = next(iter(EXAMPLES[kind]))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(whole, name, None)
    for value in (b"bytes", 1.5, object()):
        with pytest.raises(ValidationError, match=name):
            BODIES[kind].model_validate(EXAMPLES[kind] | {name: value})


@given(value=st.floats())
def test_numbers_that_are_not_finite_or_beyond_all_measure_are_null_in_the_file(value):
    written = body("evaluation", metrics={"loss": value})
    text = json.dumps(written.to_dict(), allow_nan=False)
    (loss,) = parse_as(BODIES["evaluation"], text, "", LedgerError, "").metrics.values()
    assert loss == value if abs(value) <= LARGEST else math.isnan(loss)


@pytest.mark.parametrize(
    ("scores", "success"), [((-1.0, -2.0), True), ((-2.0, -1.0), False), ((None, -1.0), False), ((-1.0, None), None)]
)
def test_success_is_against_the_rival(scores, success):
    names = ("expected_logprob", "rival_logprob")
    answer = PromptAnswer(
        kind="rewrite", prompt="a", expected="b", correct=True, **dict(zip(names, scores, strict=True))
    )
    assert answer.success is success


COUNTS = [("model", "earlier"), ("run", "edits"), ("run", "batch_size"), ("evaluation", "edits"), ("batch", "batch")]


@pytest.mark.parametrize(("kind", "name"), COUNTS)
@pytest.mark.parametrize("value", [-1, 2**53, 10**400, True, 1.0], ids=type)
def test_counts_are_whole_numbers_in_bounds(kind, name, value):
    with pytest.raises(ValidationError, match=name):
        BODIES[kind].model_validate(EXAMPLES[kind] | {name: value})
