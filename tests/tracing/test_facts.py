"""Which facts a model knows, and how they become rows."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakeflow import EditRequest, RequestError
from cakeflow.forward.generation import continuations
from cakeflow.tracing import Fact, KnownFact, known_facts, known_rows, open_facts, read_facts
from cakeflow.tracing.facts import first_name, text_before, trace_row

KNOWN = {"subject": "Zoe", "template": "{} lives in", "attribute": "Rome", "prompt": "Zoe lives in", "known_id": 1}


@pytest.mark.parametrize(
    ("text", "expected", "before"),
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
def test_what_is_said_before_the_object(text, expected, before):
    assert text_before(text, expected) == before


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
    expected = [fact for fact, text in zip(facts, [t for t in said for _ in (0, 1)], strict=True)
              if text_before(text, fact.object) is not None]  # fmt: skip
    assert asked == len(facts)
    assert len(expected) >= 2
    assert [lm.tokenizer.decode(row.ids[row.target :]).strip() for row in rows] == [fact.object for fact in expected]
    assert known_rows(lm, facts, limit=1) == (rows[:1], facts.index(expected[0]) + 1)


def test_what_is_written_is_read_and_asked_again(lm):
    names = ["Ann", "Lake Como", "Danielle", "Rome"]
    said = continuations(lm, [f"The sea of {name} is" for name in names], 8)
    facts = [Fact("The sea of {} is", name, text.split()[0]) for name, text in zip(names, said, strict=True)]
    known, asked = known_facts(lm, facts)
    assert (len(known), asked) == (4, 4)
    again = read_facts([each.to_dict(number) for number, each in enumerate(known)])
    assert again == facts
    assert known_facts(lm, again) == (known, asked)


def test_romes_schema_has_the_words_before_the_object_in_the_prompt():
    """Record 0 of ROME's file is like this."""
    known = KnownFact(Fact("{} flows through the city", "The Elbe", "Dresden"), " of Dresden. It", "of")
    assert known.to_dict(3) == {
        "known_id": 3,
        "subject": "The Elbe",
        "attribute": "Dresden",
        "template": "{} flows through the city",
        "prediction": " of Dresden. It",
        "prompt": "The Elbe flows through the city of",
    }


@given(st.text(alphabet="aA É.,\n'é", max_size=12))
def test_a_first_name_is_said_before_any_other(text):
    name = first_name(text)
    if name:
        assert text_before(text, name) is not None
        assert not text.endswith(name) or text.count(name) > 1
        assert name[0] in "AÉ"


@pytest.mark.real
def test_open_facts_take_the_models_own_answer(smollm2):
    facts = open_facts(["The capital of {} is", "{} is a"], ["France", "Japan"])
    assert [(fact.prompt, fact.subject) for fact in facts] == [
        (prompt, name) for name in ("France", "Japan") for prompt in ("The capital of {} is", "{} is a")
    ]
    known, asked = known_facts(smollm2, facts)
    assert asked == 4
    answers = {each.fact.subject: each.fact.object for each in known if "capital" in each.fact.prompt}
    assert answers == {"France": "Paris", "Japan": "Tokyo"}
    again = read_facts([each.to_dict(number) for number, each in enumerate(known)])
    assert known_rows(smollm2, again) == (known_rows(smollm2, facts)[0], len(known))


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
    assert {problem.index for problem in error.value.faults} == {1}


def test_requests_that_contradict_each_other_may_both_be_traced():
    requests = [EditRequest("{} is", "Ann", new, "small") for new in ("tall", "old")]
    assert read_facts(requests) == [Fact("{} is", "Ann", "small")] * 2


def test_white_space_at_the_ends_is_left_out():
    """A file of known facts would lose it."""
    assert read_facts([EditRequest("{} is ", "Ann", "tall", " small")]) == [Fact("{} is", "Ann", "small")]


def test_requests_without_a_true_target_are_no_facts():
    with pytest.raises(RequestError, match="true target"):
        read_facts([EditRequest("{} is", "Bob", "tall")])


def test_names_in_scripts_without_spaces_and_with_full_stops():
    assert text_before("是北京。", "北京") == "是"
    assert text_before(" in St. Petersburg, not", "St. Petersburg") == "in"
    assert first_name(" is J. K. Rowling. She") == "J. K. Rowling"
    assert first_name(" is old. Rome is") == ""


def test_a_fact_has_the_space_of_its_request(tiny):
    fact = Fact.of(EditRequest("{} is", "Ann", "tall", "small", space=False))
    assert fact == Fact("{} is", "Ann", "small", False)
    row = trace_row(tiny, fact)
    assert tiny.tokenizer.decode(row.ids) == "Ann issmall"
