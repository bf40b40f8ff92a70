"""A model and facts that an edit can teach it."""

from dataclasses import replace

import pytest
import torch


@pytest.fixture
def sharp(lm):
    """A model whose probabilities are not nearly uniform, so that an edit can make a target the most likely one."""
    with torch.no_grad():
        lm.model.transformer.ln_f.weight *= 30
    return lm


@pytest.fixture
def learnable(requests):
    """Facts that a random model can learn: one token right behind the place where they are written."""
    words = ("Rome", "Paris", "the", "in") * 3
    return [
        replace(request, target_new=word, target_true=None, fact_token="prompt_last")
        for request, word in zip(requests, words, strict=True)
    ]
