"""Text for second moments where the user has none: a corpus of the model's own samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.forward.generation import continuations
from cakeflow.forward.tokens import unreadable_token
from cakeflow.models.language import LanguageModel
from cakeflow.storage.atomic import write_text
from cakeflow.storage.cache import cache_folder, content_key, require_writable

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


MARGIN = 64
"""Last tokens of the beginning of a text, which may not be those of the whole text."""


def token_stream(lm: LanguageModel, documents: Iterable[Iterable[str]], tokens: int) -> list[int]:
    """Return the first ``tokens`` tokens of some documents, joined without special tokens.

    Args:
        lm: The model.
        documents: Texts, or the parts of each; no more of them is read than the tokens need.
        tokens: Most tokens.

    Raises:
        ConfigError: If a text has a token that the model cannot read.
    """
    stream: list[int] = []
    for document in documents:
        parts = [document] if isinstance(document, str) else document
        stream += _first_tokens(lm, parts, tokens - len(stream))
        if len(stream) >= tokens:
            break
    if remedy := unreadable_token(lm, stream):
        raise ConfigError(f"the corpus {remedy}")
    return stream


def _first_tokens(lm: LanguageModel, parts: Iterable[str], tokens: int) -> list[int]:
    """Return the first tokens of a text, as the whole text has them, or all tokens where there are not as many."""
    pieces: list[str] = []
    size, enough = 0, 6 * tokens  # characters
    for part in parts:
        pieces.append(part)
        size += len(part)
        if size >= enough:
            ids = _ids(lm, pieces)
            if len(ids) >= tokens + MARGIN:
                return ids[:tokens]
            enough = 2 * size  # what is read twice is no more than what is read once
    return _ids(lm, pieces)[:tokens]


def _ids(lm: LanguageModel, pieces: list[str]) -> list[int]:
    ids: list[int] = lm.tokenizer("".join(pieces), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


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
        require_writable(path.parent)
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
