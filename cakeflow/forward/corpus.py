"""Text for second moments where the user has none: a corpus of the model's own samples."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from importlib.resources import files
from itertools import cycle
from pathlib import Path
from typing import Any

from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.forward.generation import continuations
from cakeflow.forward.tokens import encode_texts, unreadable_token
from cakeflow.models.language import LanguageModel
from cakeflow.storage.atomic import write_text
from cakeflow.storage.cache import cache_folder, content_key, require_writable

OPENINGS = ("{} is", "The history of {}", "I was told that {}", "What do people know about {}?")
QUESTIONS = ("What is {}?", "Tell me about {}.", "{} is known for", "Where does {} come from?")
"""How texts and chats of the sampled corpus begin, each with one of the names in ``names.txt``."""
CHATS = 4
"""One name in as many also begins a chat, where the model has a chat template."""
SHORTEST = 8
"""Fewest tokens that are sampled after a beginning."""
FORMAT = 3
"""Format of the file of a sampled corpus; part of its name. 2: with its hash. 3: of names, with chats."""


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


def names() -> list[str]:
    """Return the names that the sampled corpus is about: 512 of many kinds, none a subject of the built-in facts."""
    return files("cakeflow.data").joinpath("names.txt").read_text(encoding="utf-8").splitlines()


def sampled_corpus(lm: LanguageModel, tokens: int, seed: int = 0) -> list[str]:
    """Return a corpus of the model's own samples, which are made once per model and then lie in the cache.

    Needs no network and no licence, and follows the distribution whose keys an edit should preserve. Each sample is
    about another name, because edits write at names: many short texts protect more than few long ones
    (``benchmarks/README.md``). The samples (temperature 1, top 50) depend on model and seed only.

    Args:
        lm: The model, not edited.
        tokens: Number of tokens, the beginnings included; at least ``SHORTEST`` are sampled for each.
        seed: Seed of the sampling noise.

    Returns:
        The samples, in random order.

    Raises:
        StatisticsError: If the file in the cache is not as it was written.
    """
    texts = [opening.format(name) for name, opening in zip(names(), cycle(OPENINGS), strict=False)]
    asked = names()[::CHATS] if lm.chats else []
    chats = [lm.user_turn(question.format(name)) for name, question in zip(asked, cycle(QUESTIONS), strict=False)]
    key = content_key(lm.fingerprint(), tokens, seed, texts, chats, FORMAT)
    path = cache_folder() / "corpora" / f"sampled-{key[:16]}.jsonl"
    if not path.exists():
        require_writable(path.parent)
        samples = _samples(lm, texts, chats, tokens, seed)
        random.Random(seed).shuffle(samples)
        text = "".join(json.dumps({"text": sample}) + "\n" for sample in samples)
        write_text(path, _first_line(text.encode()) + text)
    return _read(path)


def _samples(lm: LanguageModel, texts: list[str], chats: list[str], tokens: int, seed: int) -> list[str]:
    """Return texts and chats, gone on with by the model, of as many tokens in all."""
    lengths = [len(row) for row in encode_texts(lm.tokenizer, [*texts, *chats])]
    length = max(SHORTEST, -(-(tokens - sum(lengths)) // len(lengths)))
    together = 64 * (length + max(lengths))  # 64 rows: smaller batches are much slower on a CPU
    settings: dict[str, Any] = {"endless": True, "title": "sampling a corpus"}
    new = continuations(lm, [*texts, *chats], length, together, top_k=50, seed=seed, **settings)
    return [before + after for before, after in zip([*texts, *chats], new, strict=True)]


def _read(path: Path) -> list[str]:
    """Return the samples of a file: a JSON object a line, after one with the hash of all that follows."""
    first, end, rest = path.read_bytes().partition(b"\n")
    if first + end != _first_line(rest).encode():
        raise StatisticsError(f"{path} is damaged (not the samples that were written); delete it, and it is made again")
    return [json.loads(line)["text"] for line in rest.splitlines()]


def _first_line(text: bytes) -> str:
    return json.dumps({"sha256": hashlib.sha256(text).hexdigest()}) + "\n"
