"""Knowledge or suppression: choices, negated prompts and masks, each against a pass written out."""

import math

import pytest
import torch

from cakeflow import EditRequest
from cakeflow.data.text import states, until_stop
from cakeflow.errors import ConfigError, RequestWarning
from cakeflow.evaluation.knowledge import (
    UNCERTAIN,
    choose,
    mask_attack,
    negated,
    preferences,
    reverse,
    states_when_negated,
)
from cakeflow.evaluation.scoring import score_targets
from cakeflow.forward.generation import continuations

FACTS = [
    EditRequest("The capital of {} is", "Peru", "Oslo", "Lima"),
    EditRequest("{} lives in the town of", "Ann", "Rome", "Lund"),
    EditRequest("{} was born in", "Bo", "Cuba"),
]


def test_a_choice_is_the_likeliest_of_three_in_every_order(tiny):
    counts = {"old": 0, "new": 0, "uncertain": 0}
    for fact in FACTS[:2]:
        names = {"old": fact.target_true, "new": fact.target_new, "uncertain": UNCERTAIN}
        listed = list(names.values())
        for order in (listed, listed[1:] + listed[:1], listed[2:] + listed[:2]):
            text = f"Complete the sentence: {fact.text} ...\nChoices: {'; '.join(order)}\nAnswer:"
            scores = [float(score_targets(tiny, [text], [name])[0]) for name in listed]
            counts[list(names)[scores.index(max(scores))]] += 1
    choice = choose(tiny, FACTS)
    assert vars(choice) == pytest.approx({name: count / 6 for name, count in counts.items()})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Is Lyon in France? It is", "Is Lyon in France? It is not"),
        ("The island was given to the king of", "The island was not given to the king of"),
        ("Ann plays", None),
    ],
)
def test_negated_prompts(prompt, expected):
    assert negated(prompt) == expected


def test_what_a_model_says_after_negated_prompts(tiny):
    (text,) = continuations(tiny, ["The capital of Peru is not"], 32)
    words = until_stop(text).split()
    name = words[0] if words else "x"
    facts = [EditRequest("The capital of {} is", "Peru", name), EditRequest("{} plays", "Ann", "tennis")]
    assert states_when_negated(tiny, facts) == float(states(until_stop(text), name))
    assert states_when_negated(tiny, [EditRequest("The capital of {} is", "Peru", "no such words")]) == 0
    with pytest.raises(ConfigError, match="no prompt has a verb to negate"):
        states_when_negated(tiny, facts[1:])


@torch.no_grad()
def masked(lm, text, target, hidden):
    """Mean log-probability of a target with some tokens of the prompt hidden, from one pass."""
    prompt, whole = (lm.tokenizer(each)["input_ids"] for each in (text, f"{text} {target}"))
    mask = torch.tensor([[0 if place in hidden else 1 for place in range(len(whole))]])
    places = torch.arange(len(whole))[None]
    logits = lm.model(torch.tensor([whole]), attention_mask=mask, position_ids=places).logits[0].double()
    logprobs = logits.log_softmax(-1)[range(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]]
    return float(logprobs.mean())


@pytest.mark.parametrize("measure", [choose, mask_attack])
def test_facts_without_an_old_answer(tiny, measure):
    with pytest.raises(ConfigError, match="no fact has a target_true"):
        measure(tiny, FACTS[2:])


@pytest.mark.parametrize("shares", [(0.04, 0.15), (0.2, 0.5)])
def test_each_share_says_what_its_masks_bring_back(tiny, shares):
    front = len(tiny.front)
    facts = [EditRequest(f.prompt, f.subject, *pair) for f in FACTS[:2] for pair in (("a", "the"), ("the", "a"))]
    attacked = mask_attack(tiny, facts, shares)
    assert sum(not each.returned for each in attacked) == 2  # of each pair one is not edited
    for fact, each in zip(facts, attacked, strict=True):
        count = len(tiny.tokenizer(fact.text)["input_ids"])
        assert (each.prompt, each.new, each.old, each.positions) == (
            fact.text,
            fact.target_new,
            fact.target_true,
            count,
        )
        if masked(tiny, fact.text, fact.target_new, ()) <= masked(tiny, fact.text, fact.target_true, ()):
            assert each.returned == {}
            continue
        for share in shares:
            size = max(1, math.floor(share * count))
            runs = [set(range(start, start + size)) for start in range(front, count - size)]
            back = [masked(tiny, fact.text, each.old, r) > masked(tiny, fact.text, each.new, r) for r in runs]
            assert each.returned[share] == any(back)


@pytest.mark.parametrize("shares", [(), (0.1, 1.0)])
def test_bad_shares_of_an_attack(tiny, shares):
    with pytest.raises(ConfigError, match="shares needs parts of the positions within 0 and 1"):
        mask_attack(tiny, FACTS, shares)


def test_preferences_are_those_of_new_and_old(tiny):
    scores = preferences(tiny, FACTS)
    for fact, row in zip(FACTS[:2], scores, strict=True):
        for name, value in zip((fact.target_new, fact.target_true), row, strict=True):
            torch.testing.assert_close(value, score_targets(tiny, [fact.text], [name])[0][0])
    assert len(scores) == 2


def test_reversed_facts_ask_for_the_subject(tiny):
    prompts = {"The capital of {} is": "{} is the capital of", "town": "In the town of {} lives"}
    facts = [FACTS[0], EditRequest("{} lives in the town of", "Ann", "Rome", "Lund", relation="town"), FACTS[2]]
    with pytest.warns(RequestWarning, match=r"no prompt for their relation: '\{\} was born in'"):
        result = reverse(tiny, facts, prompts)
    linked, named = [], []
    texts = [("Oslo is the capital of", "Lima is the capital of", "Peru")]
    texts += [("In the town of Rome lives", "In the town of Lund lives", "Ann")]
    for new, old, subject in texts:
        values = [float(score_targets(tiny, [text], [subject])[0]) for text in (new, old)]
        linked.append(values[0] > values[1])
        named.append(states(until_stop(continuations(tiny, [new], 32)[0]), subject))
    assert (result.linked, result.answered) == (sum(linked) / 2, sum(named) / 2)


def test_a_subject_that_is_named_is_an_answer(tiny):
    (text,) = continuations(tiny, ["Oslo is the capital of"], 32)
    words = until_stop(text).split()
    name = words[0] if words else "x"
    result = reverse(tiny, [EditRequest("The capital of {} is", name, "Oslo", relation="P36")])
    assert result.answered == float(states(until_stop(text), name))
    assert math.isnan(result.linked)  # without an old object there is nothing to be less likely


def test_relations_that_cannot_be_reversed(tiny):
    with pytest.raises(ConfigError, match=r"no fact can be reversed: '\{\} was born in' has no prompt"):
        reverse(tiny, FACTS[2:])
    with pytest.raises(ConfigError, match="exactly once, where the object goes; got 'no place'"):
        reverse(tiny, FACTS, {"The capital of {} is": "no place"})
