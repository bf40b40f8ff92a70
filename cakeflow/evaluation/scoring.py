"""How likely the model finds given continuations: what the metrics of edits are fed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.errors import Fault, RequestError
from cakeflow.evaluation.protocols import Protocol, Read, joint_reads, official_reads, official_token_reads
from cakeflow.forward.prefix_tree import predict
from cakeflow.models.language import LanguageModel

CHECKED_AT_ONCE = 256
"""Records whose texts are tokenised together when all are checked."""


KINDS = ("rewrite", "paraphrase", "neighborhood")
"""What a scored prompt is; ``PromptScores.kind`` indexes this."""


class Asked(NamedTuple):
    """A prompt with one continuation, and what they are called in messages."""

    record: int
    prompt: str
    target: str
    names: tuple[str, str] = ("prompt", "target")


class Question(NamedTuple):
    """A prompt with the continuation that is right after the edit, and the other one where the record names one."""

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
        rival: The same of the other continuation; nan where the record names none.
        correct: Whether every token of the wanted continuation is the most likely one, teacher-forced.
        tokens: Share of its tokens that are.
        answered: 1 where the model gives it when it answers freely, else 0; nan where it was not asked to.
        record: Which record each prompt belongs to.
        kind: What each prompt is, as an index into ``KINDS``.
    """

    expected: Float[Tensor, " p"]
    rival: Float[Tensor, " p"]
    correct: Bool[Tensor, " p"]
    tokens: Float[Tensor, " p"]
    answered: Float[Tensor, " p"]
    record: Int[Tensor, " p"]
    kind: Int[Tensor, " p"]


def score_targets(
    lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str], max_tokens: int = 4096
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Score one continuation of each prompt, the clean way.

    Args:
        lm: The model.
        prompts: p prompts.
        targets: p continuations.
        max_tokens: Most tokens in one forward pass.

    Returns:
        Mean log-probability per token (natural logarithm), and the share of tokens that are the arg-max.

    Raises:
        RequestError: If a target has no token, or a text is longer than the model can read.
    """
    asked = [Asked(index, *pair) for index, pair in enumerate(zip(prompts, targets, strict=True))]
    return score_reads(lm, _checked(lm, joint_reads(lm.tokenizer, prompts, targets), asked), max_tokens)


def score_reads(
    lm: LanguageModel, questions: Sequence[Sequence[Read]], max_tokens: int = 4096
) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Mean log-probability and share of hits of each question.

    Args:
        lm: The model.
        questions: q lists of what was read and what should come next.
        max_tokens: Most tokens in one forward pass.
    """
    contexts, labels = zip(*chain.from_iterable(questions), strict=True) if questions else ((), ())
    logprobs, hits = predict(lm, contexts, labels, max_tokens)
    owner = torch.tensor([index for index, reads in enumerate(questions) for _ in reads], dtype=torch.long)
    totals = torch.zeros(2, len(questions)).index_add(1, owner, torch.stack([logprobs, hits.float()]))
    means = totals / torch.bincount(owner, minlength=len(questions))
    return means[0], means[1]


def _checked(lm: LanguageModel, reads: list[list[Read]], asked: Sequence[Asked]) -> list[list[Read]]:
    if problems := _problems(lm, reads, asked):
        raise RequestError(problems)
    return reads


def _problems(lm: LanguageModel, reads: list[list[Read]], asked: Sequence[Asked]) -> list[Fault]:
    problems: dict[tuple[int, str, str], Fault] = {}  # a target that many prompts share is named once
    for each, (record, prompt, target, names) in zip(reads, asked, strict=True):
        if not each or not each[0][0]:
            remedy = f"has no token of its own after {prompt[-40:]!r}; give another one, or leave the entry out"
            problems.setdefault((record, names[1], target), Fault(record, names[1], target, remedy))
        elif len(each[-1][0]) >= lm.longest:
            remedy = f"longer than the model's {lm.longest} positions, with its target; shorten it or leave it out"
            problems.setdefault((record, names[0], prompt), Fault(record, names[0], prompt, remedy))
    return [*problems.values()]


def _asked(records: Sequence[EditRequest], first: int = 0) -> list[Asked]:
    """Every prompt of records with each of its continuations, all that are right before any that are rivals."""
    found: list[list[Asked]] = [[], []]
    for index, kind, prompt, *targets in questions(records):
        of = {records[index].target_true: "target_true", records[index].target_new: "target_new"}
        for some, target in zip(found, targets, strict=True):
            if target is not None:
                names = ("probes.prompt" if kind else "prompt", of.get(target, "probes.expected"))
                some.append(Asked(first + index, prompt, target, names))
    return found[0] + found[1]


def check_records(lm: LanguageModel, records: Sequence[EditRequest]) -> None:
    """Whether a model can be asked everything about some records; only its tokenizer is used.

    Args:
        lm: The model.
        records: The records, probes included.

    Raises:
        RequestError: Naming every record with a prompt that is too long or a continuation without a token.
    """
    problems: list[Fault] = []
    for first in range(0, len(records), CHECKED_AT_ONCE):
        asked = _asked(records[first : first + CHECKED_AT_ONCE], first)
        reads = joint_reads(lm.tokenizer, [each.prompt for each in asked], [each.target for each in asked])
        problems += _problems(lm, reads, asked)
    if problems:
        raise RequestError(problems)


def score_records(
    lm: LanguageModel, records: Sequence[EditRequest], protocol: Protocol = "clean", max_tokens: int = 4096
) -> PromptScores:
    """Score the prompt, paraphrases and neighborhood prompts of records, all in common batches.

    Args:
        lm: The model.
        records: The records, probes included.
        protocol: See ``cakeflow.protocols``.
        max_tokens: Most tokens in one forward pass.

    Returns:
        One entry per prompt, in the order of ``questions``.

    Raises:
        RequestError: As in ``check_records``.
    """
    record, kind, prompts, expected, rivals = zip(*questions(records), strict=True)
    known = [i for i, rival in enumerate(rivals) if rival is not None]
    asked = _asked(records)
    texts, targets = [each.prompt for each in asked], [each.target for each in asked]
    if protocol == "official":
        singly = official_token_reads(lm.tokenizer, prompts, expected, [KINDS[each] == "neighborhood" for each in kind])
        reads = [*official_reads(lm.tokenizer, texts, targets), *singly]
        asked += asked[: len(prompts)]
    else:
        reads = joint_reads(lm.tokenizer, texts, targets)
    scores, hits = score_reads(lm, _checked(lm, reads, asked), max_tokens)
    count = len(prompts)
    rival = torch.full((count,), torch.nan)
    rival[torch.tensor(known, dtype=torch.long)] = scores[count : count + len(known)]
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


def questions(records: Sequence[EditRequest]) -> Iterator[Question]:
    """Every prompt of some records that can be scored."""
    for index, record in enumerate(records):
        yield Question(index, 0, record.text, record.target_new, record.target_true)
        for probe in record.probes:
            if probe.kind == "paraphrase":
                yield Question(index, 1, probe.prompt, probe.expected or record.target_new, record.target_true)
            elif probe.kind == "neighborhood" and (expected := probe.expected or record.target_true):
                yield Question(index, 2, probe.prompt, expected, record.target_new if record.target_true else None)
