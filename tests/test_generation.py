"""Greedy continuations."""

import pytest
import torch

from cakeflow.generation import continuations

PROMPTS = ["The sea is", "Ann", "All about the town of Lund", "Bob"]


@pytest.mark.parametrize("budget", [1, 4096])
@pytest.mark.parametrize("tokens", [1, 5])
def test_each_is_what_the_model_says_alone(tiny, tokens, budget):
    got = continuations(tiny, PROMPTS, tokens, budget)
    for prompt, text in zip(PROMPTS, got, strict=True):
        ids = tiny.tokenizer(prompt)["input_ids"]
        start = len(ids)
        with torch.no_grad():
            for _ in range(tokens):
                ids.append(int(tiny.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert text == tiny.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_nothing_to_continue(lm):
    assert continuations(lm, []) == []
