"""Text for second moments where the user has none: sentences about names, and the model's own samples."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.forward.generation import continuations
from cakeflow.forward.tokens import encode_texts, unreadable_token
from cakeflow.models.language import LanguageModel
from cakeflow.storage.atomic import write_text
from cakeflow.storage.cache import cache_folder, content_key, require_writable

SENTENCES = (
    "{} is a",
    "The history of {} began when",
    "I was told that {} is known for its",
    "What do people know about {}? It is",
    "Most people who like {} also like",
    "In the year when {} was",
)
QUESTIONS = ("What is {}?", "Tell me about {}.", "{} is known for", "Where does {} come from?")
"""Beginnings of sentences and chats about a name."""
TIMES = 3
"""Sentences about each name."""
SHORTEST = 8
"""Fewest tokens that are sampled after a beginning."""
FORMAT = 3
"""Format of the file of a sampled corpus; part of its name. 2: with its hash. 3: about names."""


PADDING = -1
"""What stands behind the last token of a name."""
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
    return [*chain.from_iterable(_pieces(lm, documents, tokens))]


def window_rows(
    lm: LanguageModel, documents: Iterable[Iterable[str]], tokens: int, window: int
) -> tuple[Int[Tensor, "windows window"], int]:
    """Return the first tokens of some documents as rows, each with the special tokens in front, and their number.

    The rows lie in a temporary file, which the system maps and deletes, so that memory does not grow with the corpus.

    Args:
        lm: The model.
        documents: As for ``token_stream``.
        tokens: Most tokens, special ones not counted; those that do not fill a row are left out.
        window: Length of a row.

    Raises:
        ConfigError: If a text has a token that the model cannot read.
    """
    body, count = window - len(lm.front), 0
    rest = torch.tensor([], dtype=torch.long)
    with tempfile.TemporaryFile() as file:
        for piece in _pieces(lm, documents, tokens):
            count += len(piece)
            rest = torch.cat([rest, torch.tensor(piece, dtype=torch.long)])
            number = len(rest) // body
            rows, rest = rest[: number * body].view(number, body), rest[number * body :].clone()
            front = torch.tensor(lm.front, dtype=torch.long).expand(number, -1)
            file.write(torch.cat([front, rows], 1).numpy().tobytes())
        file.flush()
        if count < body:  # an empty file cannot be mapped
            return torch.empty(0, window, dtype=torch.long), count
        # "c": writable in memory only, as torch asks for
        return torch.from_numpy(np.memmap(file, np.int64, mode="c", shape=(count // body, window))), count


def _pieces(lm: LanguageModel, documents: Iterable[Iterable[str]], tokens: int) -> Iterator[list[int]]:
    """Yield the tokens of one document after the other, as many as are needed."""
    for document in documents:
        parts = [document] if isinstance(document, str) else document
        piece = _first_tokens(lm, parts, tokens)
        if remedy := unreadable_token(lm, piece):
            raise ConfigError(f"the corpus {remedy}")
        yield piece
        tokens -= len(piece)
        if tokens <= 0:
            break


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
    """Return the names of ``names.txt``: 512 of many kinds, none a subject of the built-in facts."""
    return files("cakeflow.data").joinpath("names.txt").read_text(encoding="utf-8").splitlines()


def name_rows(lm: LanguageModel, texts: Sequence[str]) -> Int[Tensor, "names window"]:
    """Return the tokens of names, each a row with the special tokens in front and ``PADDING`` behind.

    Args:
        lm: The model.
        texts: The names; empty ones are left out.

    Raises:
        ConfigError: If one is too long for the model.
        StatisticsError: If there are none.
    """
    rows = [row for row in encode_texts(lm.tokenizer, texts) if len(row) > len(lm.front)]
    if not rows:
        raise StatisticsError("the corpus has no name; with statistics.at names each of its documents is one")
    if (longest := max(map(len, rows))) > lm.longest:
        raise ConfigError(
            f"the corpus has a name of {longest} tokens, and the model reads {lm.longest}; with statistics.at names "
            "each document is a name: give a .jsonl file with a text per line"
        )
    return torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows])


def default_corpus(lm: LanguageModel, tokens: int, seed: int = 0) -> list[str]:
    """Return a corpus for second moments where the user has none: texts about names, which a model need not write.

    Edits write at names, so keys at names are what they have to leave alone: on SmolLM2 these texts protect as much as
    three times as many tokens of WikiText-2 (``benchmarks/README.md``). Three beginnings of sentences stand for each
    name, and where there is a chat template a question; where they are too few tokens, the model's samples follow.

    Args:
        lm: The model, not edited.
        tokens: Number of tokens that are needed.
        seed: Seed of the order and of the sampling noise.

    Raises:
        StatisticsError: If samples in the cache are not as they were written.
    """
    texts = [
        SENTENCES[(place + turn) % len(SENTENCES)].format(name)
        for turn in range(TIMES)
        for place, name in enumerate(names())
    ]
    if lm.chats:
        texts += [
            lm.user_turn(question.format(name)) for name, question in zip(names(), cycle(QUESTIONS), strict=False)
        ]
    random.Random(seed).shuffle(texts)
    texts = [f"{text}\n\n" for text in texts]
    rest = tokens - len(token_stream(lm, texts, tokens))
    return texts + (sampled_corpus(lm, rest, seed) if rest > 0 else [])


def sampled_corpus(lm: LanguageModel, tokens: int, seed: int = 0) -> list[str]:
    """Return a corpus of the model's own samples, which are made once per model and then lie in the cache.

    Needs no network and no licence, and follows the distribution whose keys an edit should preserve. Each sample goes
    on from a sentence about another name. The samples (temperature 1, top 50) depend on model and seed only.

    Args:
        lm: The model, not edited.
        tokens: Number of tokens, the beginnings included; at least ``SHORTEST`` are sampled for each.
        seed: Seed of the sampling noise.

    Returns:
        The samples.

    Raises:
        StatisticsError: If the file in the cache is not as it was written.
    """
    openings = [sentence.format(name) for name, sentence in zip(names(), cycle(SENTENCES), strict=False)]
    key = content_key(lm.fingerprint(), tokens, seed, openings, FORMAT)
    path = cache_folder() / "corpora" / f"sampled-{key[:16]}.jsonl"
    if not path.exists():
        require_writable(path.parent)
        lengths = [len(row) for row in encode_texts(lm.tokenizer, openings)]
        length = max(SHORTEST, -(-(tokens - sum(lengths)) // len(lengths)))
        together = 64 * (length + max(lengths))  # 64 rows: smaller batches are much slower on a CPU
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
