"""Which facts a model knows, and how they become rows."""

import json

import pytest

from cakeflow import EditRequest, RequestError
from cakeflow.generation import continuations
from cakeflow.tracing import Fact, known_rows, read_facts
from cakeflow.tracing.facts import said_before, trace_row

KNOWN = {"subject": "Zoe", "template": "{} lives in", "attribute": "Rome", "prompt": "Zoe lives in", "known_id": 1}


@pytest.mark.parametrize(
    ("text", "wanted", "before"),
    [
        (" Paris.", "Paris", ""),
        (" the city of Paris, France", "Paris", "the city of"),
        (" Rome, not Paris", "Paris", None),
        (" a town called Élan near Paris", "Paris", None),
        (" Parisian life", "Paris", None),
        (" the French language", "French", "the"),
        (" tennis and golf", "tennis", ""),
        (" (C++) or so", "C++", "("),
        ("", "Paris", None),
    ],
)
def test_what_is_said_before_the_object(text, wanted, before):
    assert said_before(text, wanted) == before


def test_a_row_marks_subject_and_object(tiny):
    row = trace_row(tiny, Fact("The mother tongue of {} is", "Danielle Darrieux", "French"), "of course")
    text = tiny.tokenizer.decode
    assert text(row.ids[row.start : row.subject + 1]).strip() == "Danielle Darrieux"
    assert text(row.ids[row.target :]).strip() == "French"
    assert text(row.ids[: row.target]).endswith("is of course")


def test_known_facts_are_those_that_the_model_states(lm):
    """A tiny random model says nonsense: what it says is made the object of some facts and not of others."""
    prompts = ["The sea of {} is", "All about {}", "{} has", "In {} they say"]
    names = ["Ann", "Lake Como", "Danielle", "Rome"]
    said = continuations(lm, [p.replace("{}", n) for p, n in zip(prompts, names, strict=True)], 8)
    words = [text.split() for text in said]
    facts = []
    for prompt, name, each in zip(prompts, names, words, strict=True):
        facts += [Fact(prompt, name, each[0]), Fact(prompt, name, "qqq")]
    rows, asked = known_rows(lm, facts)
    wanted = [fact for fact, text in zip(facts, [t for t in said for _ in (0, 1)], strict=True)
              if said_before(text, fact.object) is not None]  # fmt: skip
    assert asked == len(facts)
    assert len(wanted) >= 2
    assert [lm.tokenizer.decode(row.ids[row.target :]).strip() for row in rows] == [fact.object for fact in wanted]
    assert known_rows(lm, facts, limit=1) == (rows[:1], facts.index(wanted[0]) + 1)


# ---- reading ----


def test_romes_schema(tmp_path):
    (tmp_path / "known.json").write_text(json.dumps([KNOWN, {**KNOWN, "attribute": " Paris"}]))
    facts = read_facts(tmp_path / "known.json")
    assert facts == [Fact("{} lives in", "Zoe", "Rome"), Fact("{} lives in", "Zoe", "Paris")]


def test_requests_give_their_true_target():
    requests = [EditRequest("{} is", "Ann", "tall", "small"), EditRequest("{} is", "Bob", "tall")]
    assert read_facts(requests) == [Fact("{} is", "Ann", "small")]
    assert read_facts([request.to_dict() for request in requests]) == [Fact("{} is", "Ann", "small")]
    assert read_facts([Fact("{} is", "Ann", "small")]) == [Fact("{} is", "Ann", "small")]


def test_builtin_facts():
    assert len(read_facts("builtin")) >= 240


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ({**KNOWN, "subject": " "}, "subject"),
        ({**KNOWN, "attribute": None}, "attribute"),
        ({**KNOWN, "template": "{} and {}"}, "template"),
        ({"attribute": "Rome"}, "template"),
    ],
)
def test_a_bad_entry_is_named(entry, field):
    with pytest.raises(RequestError, match=field) as error:
        read_facts([KNOWN, entry])
    assert {problem.index for problem in error.value.problems} == {1}


def test_requests_without_a_true_target_are_no_facts():
    with pytest.raises(RequestError, match="true target"):
        read_facts([EditRequest("{} is", "Bob", "tall")])
