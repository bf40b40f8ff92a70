"""Text for second moments: any local or hub source, or the model's own samples where the user has none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from cakeflow.models.language import LanguageModel
from cakeflow.storage.atomic import write_text
from cakeflow.storage.cache import cache_folder, content_key

OPENINGS = (
    "The history of {}",
    "{} is usually described as",
    "Why do people care about {}?",
    "A short story about {}:",
)


TOPICS = (
    "the sea", "mathematics", "a small village", "music", "medicine", "the railways", "farming", "the weather",
    "law", "football", "the human body", "a famous painter", "economics", "the stars", "cooking", "an old city",
    "computers", "war and peace", "education", "rivers", "chemistry", "the theatre", "birds", "money",
    "the mountains", "language", "a long journey", "elections", "gardens", "engineering", "friendship", "philosophy",
)  # fmt: skip
"""Openings and topics of the sampled corpus: broad, and none of them a prompt of the built-in facts."""


SAMPLED_TOGETHER = 64


def token_stream(lm: LanguageModel, texts: Iterable[str], tokens: int) -> list[int]:
    """The first ``tokens`` tokens of the texts, joined without special tokens."""
    stream: list[int] = []
    for text in texts:
        stream += lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= tokens:
            break
    return stream[:tokens]


def sampled_corpus(
    lm: LanguageModel, tokens: int, seed: int = 0, progress: Callable[[int], object] = lambda done: None
) -> Path:
    """A corpus of the model's own samples, made once per model and kept in the cache.

    Needs no network and no licence, and follows the distribution whose keys an edit should leave alone. Sampling is
    seeded (temperature 1, top 50); the caller's random state is left alone.

    Args:
        lm: The model, not edited.
        tokens: About how many tokens to sample.
        seed: Of the sampling.
        progress: Called with the number of tokens that became ready.

    Returns:
        A JSONL file, one sample a line.
    """
    openings = [opening.format(topic) for opening, topic in product(OPENINGS, TOPICS)]
    key = content_key(lm.fingerprint(), tokens, seed, openings)
    path = cache_folder() / "corpora" / f"sampled-{key[:16]}.jsonl"
    if path.exists():
        return path
    length = -(-tokens // len(openings))
    samples: list[str] = []
    devices = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), lm.evaluating():
        torch.manual_seed(seed)
        for start in range(0, len(openings), SAMPLED_TOGETHER):
            samples += _sample(lm, openings[start : start + SAMPLED_TOGETHER], length, progress)
    write_text(path, "".join(json.dumps({"text": sample}) + "\n" for sample in samples))
    return path


class _Progress(StoppingCriteria):
    """Never stops; counts the tokens of each step."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        self._progress = progress

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._progress(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _sample(lm: LanguageModel, openings: list[str], length: int, progress: Callable[[int], object]) -> list[str]:
    rows = [lm.tokenizer(opening)["input_ids"] for opening in openings]
    width = max(map(len, rows))
    filler = lm.tokenizer.eos_token_id or 0
    ids = torch.tensor([[filler] * (width - len(row)) + row for row in rows], device=lm.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=lm.device)
    output = lm.model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=mask, do_sample=True, top_k=50, top_p=1.0, temperature=1.0,
        min_new_tokens=length, max_new_tokens=length, pad_token_id=filler,
        stopping_criteria=StoppingCriteriaList([_Progress(progress)]),
    )  # fmt: skip
    return [str(lm.tokenizer.decode(row, skip_special_tokens=True)) for row in output]
