"""Probabilities of the continuations of prompts: the input of the metrics of edits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.errors import Fault, RequestError
from cakeflow.evaluation.protocols import Protocol, Read, joint_reads, official_reads, official_token_reads, reads_of
from cakeflow.forward.prefix_tree import predict
from cakeflow.forward.tokens import Row, encode_texts, unknown_tokens, unreadable_token
from cakeflow.metrics.preference import KINDS
from cakeflow.models.language import LanguageModel
from cakeflow.models.routing import Scope

CHECK_SIZE = 256
"""Records whose texts are tokenised together by ``check_records``: bounds memory, changes no result."""


class ScoredContinuation(NamedTuple):
    """A prompt with one continuation.

    Attributes:
        record: Index of the record.
        prompt: The prompt.
        target: The continuation.
        fields: Names of both in error messages.
        space: Whether a space stands between them; None lets the texts decide.
    """

    record: int
    prompt: str
    target: str
    fields: tuple[str, str] = ("prompt", "target")
    space: bool | None = None


class ScoredPrompt(NamedTuple):
    """A prompt with its right and its wrong continuation after the edit.

    Attributes:
        record: Index of the record.
        kind: Kind of the prompt, an index into ``KINDS``.
        prompt: The prompt.
        expected: Continuation that is right after the edit.
        rival: The other continuation; None if the record has none.
    """

    record: int
    kind: int
    prompt: str
    expected: str
    rival: str | None


@dataclass(frozen=True, eq=False)
class PromptScores:
    """Scores of the p prompts of some records.

    Attributes:
        expected: Mean log-probability per token of the continuation that is right after the edit.
        rival: Mean log-probability per token of the other continuation; nan if the record has none.
        correct: True where every token of the right continuation is the arg-max, teacher-forced.
        tokens: Share of its tokens that are the arg-max.
        answered: 1 where the model generates the right continuation by itself, else 0; nan where it generated nothing.
        record: Index of each prompt's record.
        kind: Kind of each prompt, an index into ``KINDS``.
        contained: 1 where what it generates contains the right continuation; nan where it generated nothing.
        judged: A judge's verdict on what it generates, from 0 to 1; nan where it generated nothing.
    """

    expected: Float[Tensor, " p"]
    rival: Float[Tensor, " p"]
    correct: Bool[Tensor, " p"]
    tokens: Float[Tensor, " p"]
    answered: Float[Tensor, " p"]
    record: Int[Tensor, " p"]
    kind: Int[Tensor, " p"]
    contained: Float[Tensor, " p"] = field(default_factory=lambda: torch.empty(0))
    judged: Float[Tensor, " p"] = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        for name in ("contained", "judged"):
            if len(getattr(self, name)) != len(self.kind):
                object.__setattr__(self, name, torch.full_like(self.answered, torch.nan))


def score_targets(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str],
    max_tokens: int = 4096,
    max_bytes: float | None = None,
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Score one continuation of each prompt in the ``clean`` protocol.

    Args:
        lm: The model.
        prompts: p prompts.
        targets: p continuations.
        max_tokens: Most tokens in one forward pass.
        max_bytes: Most bytes beyond the model.

    Returns:
        Mean log-probability per token (natural logarithm), and the share of tokens that are the arg-max.

    Raises:
        RequestError: If a target has no token, or a text is longer than the model can read.
        ConfigError: If the longest text does not fit ``max_bytes``.
    """
    pairs = [ScoredContinuation(index, *pair) for index, pair in enumerate(zip(prompts, targets, strict=True))]
    reads = _joint(lm, pairs)
    _require_readable(lm, reads, pairs)
    return score_reads(lm, reads, max_tokens, max_bytes)


def score_reads(
    lm: LanguageModel, continuations: Sequence[Sequence[Read]], max_tokens: int = 4096, max_bytes: float | None = None
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Compute the mean log-probability and the share of arg-max tokens of each continuation.

    Args:
        lm: The model.
        continuations: q lists, one ``Read`` for each token of a continuation.
        max_tokens: Most tokens in one forward pass.
        max_bytes: Most bytes beyond the model.
    """
    contexts, labels = zip(*chain.from_iterable(continuations), strict=True) if continuations else ((), ())
    scope = lm.scope
    texts = [_deciding(scope, reads) for reads in continuations for _ in reads] if scope else None
    logprobs, hits = predict(lm, contexts, labels, max_tokens, max_bytes, texts)
    owner = torch.tensor([index for index, reads in enumerate(continuations) for _ in reads], dtype=torch.long)
    totals = torch.zeros(2, len(continuations)).index_add(1, owner, torch.stack([logprobs, hits.float()]))
    means = totals / torch.bincount(owner, minlength=len(continuations))
    return means[0], means[1]


def _deciding(scope: Scope, reads: Sequence[Read]) -> tuple[int, ...]:
    """Return the text on which routed modules decide about a continuation: the prompt alone, or all of it."""
    return (*reads[-1][0], reads[-1][1]) if scope == "sequence" else tuple(reads[0][0])


def score_rows(
    lm: LanguageModel, rows: Sequence[Row], max_bytes: float | None = None
) -> tuple[Float[Tensor, " q"], Bool[Tensor, " q"]]:
    """Return the mean probability of the target of each row, and whether all its tokens are the most likely ones.

    Args:
        lm: The model.
        rows: q tokenised prompts with their targets.
        max_bytes: Most bytes beyond the model.
    """
    logprobs, hits = score_reads(lm, reads_of(rows), max_bytes=max_bytes)
    return logprobs.exp(), hits == 1


def check_records(lm: LanguageModel, records: Sequence[EditRequest]) -> None:
    """Check that a model can score all prompts of some records; only its tokenizer is used.

    Args:
        lm: The model.
        records: The records, probes included.

    Raises:
        RequestError: Naming every record with a prompt that is too long, a continuation without a token, or a token
            that tokenizer or model does not know.
    """
    faults: list[Fault] = []
    for first in range(0, len(records), CHECK_SIZE):
        pairs = _continuations(records[first : first + CHECK_SIZE], first)
        faults += _read_faults(lm, _joint(lm, pairs), pairs)
        faults += _prompt_faults(lm, records[first : first + CHECK_SIZE], first)
    if faults:
        raise RequestError(faults)


def score_records(
    lm: LanguageModel,
    records: Sequence[EditRequest],
    protocol: Protocol = "clean",
    max_tokens: int = 4096,
    max_bytes: float | None = None,
) -> PromptScores:
    """Score the prompt, paraphrases and neighborhood prompts of records, all in common batches.

    Args:
        lm: The model.
        records: The records, probes included.
        protocol: Tokenisation of the continuations (``cakeflow.evaluation.protocols``).
        max_tokens: Most tokens in one forward pass.
        max_bytes: Most bytes beyond the model.

    Returns:
        One entry per prompt, in the order of ``scored_prompts``.

    Raises:
        RequestError: As in ``check_records``.
        ConfigError: If the longest text does not fit ``max_bytes``.
    """
    record, kind, _, _, rivals = zip(*scored_prompts(records), strict=True)
    with_rival = [i for i, rival in enumerate(rivals) if rival is not None]
    pairs, reads = _reads(lm, records, protocol)
    _require_readable(lm, reads, pairs)
    scores, hits = score_reads(lm, reads, max_tokens, max_bytes)
    count = len(rivals)
    rival = torch.full((count,), torch.nan)
    rival[torch.tensor(with_rival, dtype=torch.long)] = scores[count : count + len(with_rival)]
    tokens = hits[-count:] if protocol == "official" else hits[:count]
    return PromptScores(
        expected=scores[:count],
        rival=rival,
        correct=hits[:count] == 1,
        tokens=tokens,
        answered=torch.full((count,), torch.nan),
        record=torch.tensor(record),
        kind=torch.tensor(kind),
    )


def prompt_contexts(
    lm: LanguageModel, records: Sequence[EditRequest], protocol: Protocol = "clean"
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each prompt of some records with the tokens of it that a model reads before a continuation.

    A prompt has several of these where its end becomes a part of the continuation's first token.

    Args:
        lm: The model.
        records: The records, probes included.
        protocol: Tokenisation of the continuations.
    """
    pairs, reads = _reads(lm, records, protocol)
    yield from dict.fromkeys((pair.prompt, each[0][0]) for pair, each in zip(pairs, reads, strict=True) if each)


def _reads(
    lm: LanguageModel, records: Sequence[EditRequest], protocol: Protocol
) -> tuple[list[ScoredContinuation], list[list[Read]]]:
    """Return all that is scored of some records: continuations, and what is read of each."""
    pairs = _continuations(records)
    if protocol != "official":
        return pairs, _joint(lm, pairs)
    _, kinds, prompts, expected, _ = zip(*scored_prompts(records), strict=True)
    texts, targets = [pair.prompt for pair in pairs], [pair.target for pair in pairs]
    singly = official_token_reads(lm.tokenizer, prompts, expected, [KINDS[each] == "neighborhood" for each in kinds])
    reads = [*official_reads(lm.tokenizer, texts, targets), *singly]
    return pairs + pairs[: len(prompts)], reads


def scored_prompts(records: Sequence[EditRequest]) -> Iterator[ScoredPrompt]:
    """Yield every prompt of some records that can be scored."""
    for index, record in enumerate(records):
        yield ScoredPrompt(index, 0, record.text, record.target_new, record.target_true)
        for probe in record.probes:
            if probe.kind == "paraphrase":
                yield ScoredPrompt(index, 1, probe.prompt, probe.expected or record.target_new, record.target_true)
            elif probe.kind == "neighborhood" and (expected := probe.expected or record.target_true):
                # zsRE's neighbors are unrelated questions without a true target: the new one is no rival there
                yield ScoredPrompt(index, 2, probe.prompt, expected, record.target_new if record.target_true else None)


def _continuations(records: Sequence[EditRequest], first: int = 0) -> list[ScoredContinuation]:
    """Return every prompt of records with each of its continuations: all right ones before all rivals."""
    right: list[ScoredContinuation] = []
    rivals: list[ScoredContinuation] = []
    for index, kind, prompt, *targets in scored_prompts(records):
        fields = {records[index].target_true: "target_true", records[index].target_new: "target_new"}
        for pairs, target in zip((right, rivals), targets, strict=True):
            if target is not None:
                names = ("probes.prompt" if kind else "prompt", fields.get(target, "probes.expected"))
                pairs.append(ScoredContinuation(first + index, prompt, target, names, records[index].space))
    return right + rivals


def _joint(lm: LanguageModel, pairs: Sequence[ScoredContinuation]) -> list[list[Read]]:
    prompts, targets = [pair.prompt for pair in pairs], [pair.target for pair in pairs]
    return joint_reads(lm.tokenizer, prompts, targets, [pair.space for pair in pairs])


def _require_readable(lm: LanguageModel, reads: list[list[Read]], pairs: Sequence[ScoredContinuation]) -> None:
    if faults := _read_faults(lm, reads, pairs):
        raise RequestError(faults)


def _read_faults(lm: LanguageModel, reads: list[list[Read]], pairs: Sequence[ScoredContinuation]) -> list[Fault]:
    faults: dict[tuple[int, str, str], Fault] = {}  # a target that many prompts share is named once
    front = lm.front
    for each, (record, prompt, target, (prompt_field, target_field), _) in zip(reads, pairs, strict=True):
        if not each or not each[0][0]:
            remedy = f"has no token of its own after {prompt[-40:]!r}; give another one, or leave the entry out"
            faults.setdefault((record, target_field, target), Fault(record, target_field, target, remedy))
        elif len(each[-1][0]) >= lm.longest:
            remedy = f"longer than the model's {lm.longest} positions, with its target; shorten it or leave it out"
            faults.setdefault((record, prompt_field, prompt), Fault(record, prompt_field, prompt, remedy))
        elif remedy := _target_remedy(lm, [label for _, label in each], target):
            faults.setdefault((record, target_field, target), Fault(record, target_field, target, remedy))
        elif remedy := unreadable_token(lm, each[-1][0], front):
            faults.setdefault((record, prompt_field, prompt), Fault(record, prompt_field, prompt, remedy))
    return [*faults.values()]


def _target_remedy(lm: LanguageModel, labels: Sequence[int], target: str) -> str:
    return unknown_tokens(lm, labels, target) or unreadable_token(lm, labels)


def _prompt_faults(lm: LanguageModel, records: Sequence[EditRequest], first: int) -> list[Fault]:
    """Return the faults of the prompts that are not scored, from which free texts start."""
    prompts = [
        (first + index, probe.prompt)
        for index, record in enumerate(records)
        for probe in record.probes
        if probe.kind == "generation"
    ]
    front, rows = lm.front, encode_texts(lm.tokenizer, [prompt for _, prompt in prompts])
    remedies = [unreadable_token(lm, ids, front) for ids in rows]
    pairs = zip(prompts, remedies, strict=True)
    return [Fault(record, "probes.prompt", prompt, remedy) for (record, prompt), remedy in pairs if remedy]
