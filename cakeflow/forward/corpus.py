"""Text for second moments where the user has none: a corpus of the model's own samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from cakeflow.errors import StatisticsError
from cakeflow.forward.generation import continuations
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
FORMAT = 2
"""Format of the file of a sampled corpus; part of its name. 2: with the hash of its content."""


def token_stream(lm: LanguageModel, texts: Iterable[str], tokens: int) -> list[int]:
    """Return the first ``tokens`` tokens of the texts, joined without special tokens."""
    stream: list[int] = []
    for text in texts:
        stream += lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= tokens:
            break
    return stream[:tokens]


def sampled_corpus(lm: LanguageModel, tokens: int, seed: int = 0) -> list[str]:
    """Return a corpus of the model's own samples, which are made once per model and then lie in the cache.

    Needs no network and no licence, and follows the distribution whose keys an edit should preserve. The samples
    (temperature 1, top 50) depend on model and seed only.

    Args:
        lm: The model, not edited.
        tokens: Number of tokens to sample, rounded up to the same number for every opening.
        seed: Seed of the sampling noise.

    Returns:
        The samples.

    Raises:
        StatisticsError: If the file in the cache is not as it was written.
    """
    openings = [opening.format(topic) for opening, topic in product(OPENINGS, TOPICS)]
    key = content_key(lm.fingerprint(), tokens, seed, openings, FORMAT)
    path = cache_folder() / "corpora" / f"sampled-{key[:16]}.jsonl"
    if not path.exists():
        length = -(-tokens // len(openings))
        together = 64 * (length + 16)  # 64 openings: smaller batches are much slower on a CPU
        settings: dict[str, Any] = {"endless": True, "with_prompt": True, "title": "sampling a corpus"}
        samples = continuations(lm, openings, length, together, top_k=50, seed=seed, **settings)
        text = "".join(json.dumps({"text": sample}) + "\n" for sample in samples)
        write_text(path, _first_line(text.encode()) + text)
    return _read(path)


def _read(path: Path) -> list[str]:
    """Return the samples of a file: a JSON object a line, after one with the hash of all that follows."""
    first, end, rest = path.read_bytes().partition(b"\n")
    if first + end != _first_line(rest).encode():
        raise StatisticsError(f"{path} is damaged (not the samples that were written); delete it, and it is made again")
    return [json.loads(line)["text"] for line in rest.splitlines()]


def _first_line(text: bytes) -> str:
    return json.dumps({"sha256": hashlib.sha256(text).hexdigest()}) + "\n"
