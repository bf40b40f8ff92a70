"""How likely the model finds given continuations: the forward passes behind the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.batch import Row, encode_prompts, pad, plan
from cakeflow.errors import Problem, RequestError
from cakeflow.model import LanguageModel
from cakeflow.request import EditRequest
from cakeflow.suffixes import before_targets
from cakeflow.tap import narrow

KINDS = ("rewrite", "paraphrase", "neighborhood")
"""What a scored prompt is; ``PromptScores.kind`` indexes this."""


@dataclass(frozen=True, eq=False)
class PromptScores:
    """Scores of the p prompts of some records.

    Attributes:
        wanted: Mean log-probability per token of the continuation that is right after the edit.
        rival: The same of the other continuation; nan where the record names none.
        correct: Whether every token of the wanted continuation is the most likely one, teacher-forced.
        record: Which record each prompt belongs to.
        kind: What each prompt is, as an index into ``KINDS``.
    """

    wanted: Float[Tensor, " p"]
    rival: Float[Tensor, " p"]
    correct: Bool[Tensor, " p"]
    record: Int[Tensor, " p"]
    kind: Int[Tensor, " p"]


def score_targets(
    lm: LanguageModel, prompts: Sequence[str], targets: Sequence[str], budget: int = 8192
) -> tuple[Float[Tensor, " p"], Bool[Tensor, " p"]]:
    """Score one continuation of each prompt.

    Args:
        lm: The model.
        prompts: p prompts.
        targets: p continuations.
        budget: Most tokens in one forward pass.

    Returns:
        Mean log-probability per token (natural logarithm), and whether every token is the arg-max.

    Raises:
        RequestError: If a target has no token, or a text is longer than the model can read.
    """
    rows = encode_prompts(lm.tokenizer, prompts, targets)
    _check_rows(lm, rows, prompts, targets)
    return score_rows(lm, rows, budget)


@torch.no_grad()
def score_rows(
    lm: LanguageModel, rows: Sequence[Row], budget: int = 8192
) -> tuple[Float[Tensor, " p"], Bool[Tensor, " p"]]:
    """``score_targets`` of p texts that are tokens already; every row has a target, after at least one token."""
    scores, correct = torch.zeros(len(rows)), torch.zeros(len(rows), dtype=torch.bool)
    texts, text_of = _shared([row.ids[:-1] for row in rows])
    for group in plan([len(text) for text in texts], budget, slack=256):
        place = {text: number for number, text in enumerate(group)}
        index = torch.tensor([i for i, text in enumerate(text_of) if text in place])
        chosen = [rows[i] for i in index]
        row, column, label = torch.tensor(before_targets(chosen, from_subject=False), device=lm.device).T
        ids = pad([texts[text] for text in group], lm.device)
        with narrow(lm, torch.tensor([place[text_of[i]] for i in index], device=lm.device)[row], column):
            logits = lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        each = torch.nn.functional.cross_entropy(logits.float(), label, reduction="none")
        hits = (logits.argmax(-1) == label).float()
        count = torch.bincount(row)
        total = torch.zeros(2, len(chosen), device=lm.device).index_add(1, row, torch.stack([-each, hits]))
        scores[index] = (total[0] / count).cpu()
        correct[index] = (total[1] == count).cpu()
    return scores, correct


def _shared(inputs: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The inputs that begin no other one, and which of them holds each input: causal models read a beginning for free.

    The targets of one prompt mostly need one pass together.

    Example:
        >>> _shared([(1, 2), (1, 2, 7), (1, 3), (1, 2)])
        ([(1, 2, 7), (1, 3)], [0, 0, 1, 0])
    """
    ordered = sorted(set(inputs))  # what an input begins stands right after it
    holder: dict[tuple[int, ...], tuple[int, ...]] = {}
    for this, following in zip(reversed(ordered), [(), *reversed(ordered[1:])], strict=True):
        holder[this] = holder[following] if this == following[: len(this)] else this
    texts = sorted(set(holder.values()))
    number = {text: index for index, text in enumerate(texts)}
    return texts, [number[holder[each]] for each in inputs]


def _check_rows(lm: LanguageModel, rows: Sequence[Row], prompts: Sequence[str], targets: Sequence[str]) -> None:
    problems = []
    for index, (row, prompt, target) in enumerate(zip(rows, prompts, targets, strict=True)):
        if not 0 < row.target < len(row.ids):
            problems.append(Problem(index, "target", target, f"has no token of its own after {prompt[-40:]!r}"))
        if len(row.ids) > lm.longest:
            problems.append(Problem(index, "prompt", prompt, f"longer than the model's {lm.longest} positions"))
    if problems:
        raise RequestError(problems)


def score_records(lm: LanguageModel, records: Sequence[EditRequest]) -> PromptScores:
    """Score the prompt, paraphrases and neighborhood prompts of records, all in common batches.

    Args:
        lm: The model.
        records: The records, probes included.

    Returns:
        One entry per prompt.
    """
    asked = [(index, *question) for index, record in enumerate(records) for question in _questions(record)]
    record, kind, prompts, wanted, rivals = zip(*asked, strict=True)
    rows = [(prompt, target) for prompt, target in zip(prompts, wanted, strict=True)]
    known = [i for i, rival in enumerate(rivals) if rival is not None]
    scores, correct = score_targets(
        lm, [*(p for p, _ in rows), *(prompts[i] for i in known)], [*(t for _, t in rows), *(rivals[i] for i in known)]
    )
    rival = torch.full((len(rows),), torch.nan)
    rival[torch.tensor(known, dtype=torch.long)] = scores[len(rows) :]
    return PromptScores(scores[: len(rows)], rival, correct[: len(rows)], torch.tensor(record), torch.tensor(kind))


def _questions(record: EditRequest) -> Iterator[tuple[int, str, str, str | None]]:
    """(kind, prompt, wanted, rival) of every prompt of a record that can be scored."""
    yield 0, record.text, record.target_new, record.target_true
    for probe in record.probes:
        if probe.kind == "paraphrase":
            yield 1, probe.prompt, probe.expected or record.target_new, record.target_true
        elif probe.kind == "neighborhood" and (wanted := probe.expected or record.target_true):
            yield 2, probe.prompt, wanted, record.target_new if record.target_true else None
