"""Every built-in record is checked: what the metrics rely on holds for each of them."""

from collections import Counter

import pytest

from cakeflow.data import builtin_facts, reversed_prompts
from cakeflow.data.request import contradictions
from cakeflow.data.schemas import parse_requests

FACTS = builtin_facts()
TRUTH = {(fact.relation, fact.subject): fact.target_true for fact in FACTS}
TARGETS = {relation: {true for (name, _), true in TRUTH.items() if name == relation} for relation, _ in TRUTH}


def prompts(fact, kind):
    return [probe.prompt for probe in fact.probes if probe.kind == kind]


def says(text, words):
    """Whether the text holds the words as words."""
    bare = "".join(letter.lower() if letter.isalnum() else " " for letter in text)
    expected = "".join(letter.lower() if letter.isalnum() else " " for letter in words)
    return f" {' '.join(expected.split())} " in f" {' '.join(bare.split())} "


@pytest.fixture(params=TARGETS)
def facts(request):
    """All records of one relation."""
    return [fact for fact in FACTS if fact.relation == request.param]


def test_there_are_enough():
    assert len(FACTS) >= 240
    assert len(TARGETS) >= 12
    assert min(Counter(fact.relation for fact in FACTS).values()) >= 15


def test_first_records_cover_many_relations():
    assert len({fact.relation for fact in FACTS[:16]}) >= 12


def test_list_passes_the_checks_and_has_no_contradictions():
    assert parse_requests(FACTS) == FACTS
    assert contradictions(FACTS) == []


def test_order_is_deterministic():
    assert builtin_facts() == FACTS


def test_subject_and_relation_are_unique():
    assert len(TRUTH) == len(FACTS)
    assert not [pair for pair, count in Counter((f.text, f.subject) for f in FACTS).items() if count > 1]


def test_one_prompt_per_relation():
    assert len({(fact.relation, fact.prompt) for fact in FACTS}) == len(TARGETS)


def test_both_targets(facts):
    for fact in facts:
        assert fact.target_new != fact.target_true
        assert {fact.target_new, fact.target_true} <= TARGETS[fact.relation]


def test_target_texts_are_clean(facts):
    for fact in facts:
        for text in (fact.subject, fact.target_new, fact.target_true, fact.prompt):
            assert text == text.strip()
            assert "  " not in text


def test_paraphrases(facts):
    for fact in facts:
        texts = prompts(fact, "paraphrase")
        assert len(set(texts)) == 2
        assert all(fact.subject in text and text != fact.text for text in texts)


def test_generation_prompts(facts):
    for fact in facts:
        texts = prompts(fact, "generation")
        assert len(set(texts)) == 2
        assert all(fact.subject in text for text in texts)


def test_neighborhood(facts):
    """Other subjects of the same relation with the same true target, and never the record's own subject."""
    for fact in facts:
        texts = prompts(fact, "neighborhood")
        assert len(set(texts)) == len(texts) >= 5
        before, after = fact.prompt.split("{}")
        for text in texts:
            other = text.removeprefix(before).removesuffix(after)
            assert other != fact.subject
            assert not says(other, fact.subject)
            assert not says(fact.subject, other)
            assert TRUTH[fact.relation, other] == fact.target_true
        assert all(probe.expected is None for probe in fact.probes)


def test_no_prompt_gives_the_answer_away(facts):
    for fact in facts:
        for text in [fact.text, *(probe.prompt for probe in fact.probes)]:
            assert not says(text, fact.target_new)
            assert not says(text, fact.target_true)


def test_reference_text(facts):
    """Of some length, about the new target and not about the subject."""
    for fact in facts:
        assert len(fact.reference.split()) >= 25
        assert not says(fact.reference, fact.subject)
        stem = fact.target_new.split()[-1].lower()
        assert stem[: max(3, len(stem) - 3)] in fact.reference.lower()


def test_no_braces_are_left(facts):
    for fact in facts:
        assert not any("{" in probe.prompt or "}" in probe.prompt for probe in fact.probes)


def test_every_relation_can_be_reversed():
    prompts = reversed_prompts()
    assert set(TARGETS) <= set(prompts)
    for prompt in prompts.values():
        assert prompt.count("{}") == 1
        assert prompt == prompt.strip()
