"""Free answers about edited facts, their neighbors and familiar facts, and the sentence that they add up to."""

import pytest

from cakeflow import EditRequest, Probe
from cakeflow.data import builtin_facts, states
from cakeflow.errors import ConfigError, RequestError
from cakeflow.evaluation.outcome import (
    TOKENS,
    Outcome,
    ask,
    fact_questions,
    familiar_facts,
    free_answers,
    neighbor_questions,
    rates,
    with_own_answers,
)
from cakeflow.forward.generation import continuations
from cakeflow.journal.schema import FreeAnswer

TEMPLATE = "{% for each in messages %}{{ each['content'] }}{% endfor %}? Answer:"


def answer(topic="fact", form="completion", prompt="Ann lives in", expected="Rome", before="", after="", **more):
    return FreeAnswer(topic=topic, form=form, prompt=prompt, expected=expected, before=before, after=after, **more)


def test_the_verdict_names_what_was_not_learned_and_what_changed():
    answers = [
        answer(before=" Oslo", after=" Rome, in Italy", request=0),
        answer(prompt="Twitter was founded by", expected="Newton", after=" the company", request=1),
        answer(form="chat", after="Ann lives in Rome.", request=0),
        answer(form="chat", prompt="Twitter was founded by", expected="Newton", after="Jack", request=1),
        answer("neighbor", prompt="Bob lives in", expected="Lyon", before=" Lyon", after=" Rome"),
        answer("neighbor", prompt="Cid lives in", expected="Bonn", before=" Bonn", after=" Bonn now"),
        answer("neighbor", prompt="Dan lives in", expected="Bonn", before=" Bonn", after=" Oslo", edited=True),
        answer("familiar", form="chat", prompt="Peru's capital is", expected="Lima", before="Lima", after="It's Lima"),
    ]  # fmt: skip
    outcome = Outcome(answers, {1: "blocked"})
    assert outcome.verdict == (
        "1 of 2 facts learned (1 of 2 as a chat question); not learned: 'Twitter was founded by' (blocked, answers "
        "'the company'); 1 of 3 other answers changed: 'Bob lives in' (Lyon -> Rome)"
    )
    assert not outcome.is_clean
    assert Outcome(answers[:1]).verdict == "1 of 1 facts learned"
    assert Outcome(answers[:1]).is_clean
    assert not Outcome(answers[:1], side_effects=["familiar went from 1 to 0"]).is_clean
    assert Outcome(answers[:1], side_effects=["familiar went from 1 to 0"]).verdict.endswith(
        "; familiar went from 1 to 0"
    )


def test_an_answer_that_was_not_right_before_cannot_have_changed():
    earlier = answer("neighbor", prompt="Bob lives in", expected="Lyon", before=" Oslo", after=" Rome")
    assert Outcome([earlier]).changed == []


def test_neighbors_come_from_every_fact_in_turn_and_edited_ones_are_marked():
    def fact(name, *others):
        return EditRequest("{} lives in", name, "Rome", "Oslo", probes=tuple(Probe("neighborhood", o) for o in others))

    facts = [fact("Ann", "Bob lives in", "Eve lives in", "Ann lives in"), fact("Bob", "Cid lives in")]
    questions = neighbor_questions(facts, 10)
    assert [each.prompt for each in questions] == ["Bob lives in", "Cid lives in", "Eve lives in", "Ann lives in"]
    assert [each.edited for each in questions] == [True, False, False, True]
    assert {each.expected for each in questions} == {"Oslo"}
    assert [each.prompt for each in neighbor_questions(facts, 1)] == ["Bob lives in", "Cid lives in"]
    assert neighbor_questions(facts, 0) == []


def test_answers_are_those_of_plain_generation(tiny):
    tiny.tokenizer.chat_template = TEMPLATE
    facts = builtin_facts()[:3]
    questions = fact_questions(facts, ("completion", "chat"))
    texts = ask(tiny, questions)
    prompts = [each.text for each in facts]
    for text, whole in zip(texts[:3], continuations(tiny, prompts, TOKENS), strict=True):
        assert whole.startswith(text)
    assert texts[3:] == continuations(tiny, [f"{prompt}? Answer:" for prompt in prompts], 2 * TOKENS)


def test_a_model_without_a_chat_template_cannot_be_asked_in_a_chat(lm):
    with pytest.raises(
        ConfigError, match=r"cannot write 'LeBron James .*' as a chat: .*; ask in the form of a completion"
    ):
        ask(lm, fact_questions(builtin_facts()[:1], ("chat",)))


def test_others_are_expected_to_answer_as_the_unedited_model_does():
    cases = [
        (answer("neighbor", expected="Lyon"), " Lyon, in France", "Lyon"),
        (answer("neighbor", expected="Lyon"), " the town of Bonn and", "Bonn"),
        (answer("neighbor", expected=""), " a very small house somewhere", "very small house"),
        (answer("fact", expected="Rome"), " Oslo", "Rome"),
        (answer("familiar", expected="Lima"), " Lima", "Lima"),
    ]
    questions = with_own_answers([case[0] for case in cases], [case[1] for case in cases])
    for question, (_, text, name) in zip(questions, cases, strict=True):
        assert (question.before, question.expected) == (text, name)
    assert list(with_own_answers([answer("neighbor", expected="")], [" "])) == []


def test_rates_are_per_topic_and_form():
    answers = [
        answer(before=" Rome", after=" Rome"),
        answer(before=" Oslo", after=" Rome"),
        answer("familiar", before=" Rome", after=" Oslo"),
        answer("neighbor", before=" Rome", after=" Rome", edited=True),
    ]
    assert rates(answers, "before") == {"learned": 0.5, "familiar": 1.0}
    assert rates(answers, "after") == {"learned": 1.0, "familiar": 0.0}
    assert rates([], "after") == {}


def test_familiar_facts_are_found_once_and_read_again(tiny, cache, monkeypatch):
    """The built-in facts, with this random model's own answers as the truth."""
    facts = builtin_facts()[:160]
    own = dict(zip([f.text for f in facts], continuations(tiny, [f.text for f in facts], TOKENS), strict=True))
    truths = [
        f.__class__(f.prompt, f.subject, "x", own[f.text].split()[0] if own[f.text].split() else "x") for f in facts
    ]
    monkeypatch.setattr("cakeflow.evaluation.outcome.builtin_facts", lambda: truths)
    first = familiar_facts(tiny, "a" * 64, ("completion",), 6)
    assert len(first) == 6
    assert ask(tiny, first) == [each.before for each in first]
    assert all(states(each.before, each.expected) for each in first)
    monkeypatch.setattr("cakeflow.evaluation.outcome.ask", lambda *_: pytest.fail("asked again"))
    assert familiar_facts(tiny, "a" * 64, ("completion",), 6) == first
    subject = next(f.subject for f in truths if f.text == first[0].prompt)
    others = familiar_facts(tiny, "a" * 64, ("completion",), 6, [subject.upper()])
    assert first[0] not in others
    monkeypatch.undo()
    (path,) = (cache / "familiar").iterdir()
    path.write_text("{}")
    monkeypatch.setenv("CAKEFLOW_CACHE", str(cache))
    monkeypatch.setattr("cakeflow.evaluation.outcome.builtin_facts", lambda: truths)
    assert familiar_facts(tiny, "a" * 64, ("completion",), 6) == first  # a damaged file is made again


@pytest.mark.parametrize("prompt", ["Ann\ud800 lives in", 3, None])
def test_what_is_no_text_is_not_asked(lm, prompt):
    with pytest.raises(RequestError, match=r"entry 1, prompt = .*: give a valid Unicode text"):
        free_answers(lm, ["Ann lives in", prompt], 4)


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "4"])
def test_an_answer_has_a_whole_number_of_tokens(lm, tokens):
    with pytest.raises(ConfigError, match=f"tokens must be a whole number of at least 1, got {tokens!r}"):
        free_answers(lm, ["Ann lives in"], tokens)


def test_a_prompt_longer_than_the_model_has_no_silent_answer(tiny):
    words = f"entry 1, prompt = .*longer than the model's {tiny.longest} positions"
    with pytest.raises(RequestError, match=words) as error:
        free_answers(tiny, [" in", " in" * tiny.longest], 2)
    assert "entry 0" not in str(error.value)
    assert free_answers(tiny, [" in" * (tiny.longest // 2)], 2)


def test_questions_are_put_before_they_are_asked(tiny):
    question = FreeAnswer(topic="fact", form="completion", prompt="of Lund", expected="a")
    assert ask(tiny, [question], question="The first letter ".__add__) == free_answers(
        tiny, ["The first letter of Lund"], 12
    )


def test_a_verdict_with_a_condition_claims_nothing_of_the_model():
    answers = [FreeAnswer(topic="fact", form="completion", prompt="x", expected="a", before="b", after="a", request=0)]
    assert Outcome(answers).verdict == "1 of 1 facts learned"
    assert Outcome(answers, condition="notes").verdict == "1 of 1 facts answered with notes, not learned"
