"""Knowledge or suppression: choices, negated prompts and masks, each against a pass written out."""

import math

import pytest
import torch

from cakeflow import EditRequest
from cakeflow.data.text import states, until_stop
from cakeflow.errors import ConfigError
from cakeflow.evaluation.knowledge import (
    UNCERTAIN,
    choose,
    negated,
    returns_when_masked,
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


@pytest.mark.parametrize("share", [(0.04, 0.15), (0.3, 0.5)])
def test_masks_are_tried_one_after_another(tiny, share):
    front, values = len(tiny.front), []
    facts = [EditRequest(f.prompt, f.subject, *pair) for f in FACTS[:2] for pair in (("a", "the"), ("the", "a"))]
    for fact in facts:
        new, old = fact.target_new, fact.target_true
        count = len(tiny.tokenizer(fact.text)["input_ids"])
        sizes = range(max(1, round(share[0] * count)), max(1, int(share[1] * count)) + 1)
        runs = [set(range(start, start + size)) for size in sizes for start in range(front, count - size)]
        if masked(tiny, fact.text, new, ()) > masked(tiny, fact.text, old, ()):
            values.append(any(masked(tiny, fact.text, old, r) > masked(tiny, fact.text, new, r) for r in runs))
    assert len(values) == 2  # of each pair one is likelier
    assert returns_when_masked(tiny, facts, share) == sum(values) / len(values)


def test_nothing_to_return_from(tiny):
    facts = [EditRequest("{} lives in", "Ann", *pair) for pair in (("a", "the"), ("the", "a"))]
    values = [returns_when_masked(tiny, [fact]) for fact in facts]
    assert sum(map(math.isnan, values)) == 1


@pytest.mark.parametrize("share", [(0.0, 0.1), (0.2, 0.1), (0.5, 1.0)])
def test_bad_shares(tiny, share):
    with pytest.raises(ConfigError, match="share needs two parts of the positions in order"):
        returns_when_masked(tiny, FACTS, share)


@pytest.mark.parametrize("measure", [choose, returns_when_masked])
def test_facts_without_an_old_answer(tiny, measure):
    with pytest.raises(ConfigError, match="no fact has a target_true"):
        measure(tiny, FACTS[2:])
