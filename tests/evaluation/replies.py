"""A model that answers what a test says."""

from types import SimpleNamespace

import torch
from transformers import DynamicCache


def says(lm, text):
    """Let a model answer whatever it is asked with a text, and end."""
    end = lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token_id
    ids = [*lm.tokenizer(text, add_special_tokens=False)["input_ids"], end]

    def generate(input_ids, **_):
        sequences = torch.cat([input_ids, torch.tensor([ids] * len(input_ids))], 1)
        return SimpleNamespace(sequences=sequences, past_key_values=DynamicCache())

    lm.model.generate = generate
