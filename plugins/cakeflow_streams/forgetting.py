"""Unlearning the old answer while the new one is learned (HSE)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cakeflow.errors import ConfigError, Fault, RequestError
from cakeflow.forward import Row, Suffixes, encode_prompts
from cakeflow.targets import ObjectiveTerm, PreparedTerm, SearchProblem, TermRows

MARGIN = math.exp(-20)
"""What HSE's code adds inside the logarithm."""


@dataclass(frozen=True)
class Forgetting(ObjectiveTerm):
    """Unlikelihood of the old answer: the mean of ``-log(1 - p(token) + e^-20)`` over its tokens, then the contexts.

    HSE's forgetting loss (Square-Group-Sky/HSE, ``compute_z``). The old answer is the request's ``target_true``,
    teacher-forced after the prompt in the contexts of the new one. The term is 0 for a fact where it is not above
    ``floor``, where there is no old answer, and where the two answers share half of the tokens of either. HSE weighs
    the new target by 1 - f at the same time, everywhere: ``targets.likelihood.factor``.

    Attributes:
        factor: Weight of the term (f, ``forget_factor``).
        floor: Weight times unlikelihood at and below which nothing is forgotten.
        space: Whether a space stands before the old answer where one stands before the new one, if the texts want it.
            HSE's code leaves it out for CounterFact, and so unlearns a text that the model hardly says.
    """

    factor: float = 0.2
    floor: float = 1e-3
    space: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.floor >= 0:
            raise ConfigError(f"Forgetting: floor must be 0 or more, got {self.floor}")

    def prepare(self, problem: SearchProblem) -> PreparedTerm:
        """Write the old answers after the prompts and cut their suffixes.

        Raises:
            RequestError: If an old answer has no token, or is too long for the model.
        """
        pairs = [(row, fact) for fact in range(len(problem.batch)) for row in old_rows(problem, fact, self.space)]
        rows, facts = [row for row, _ in pairs], [fact for _, fact in pairs]
        return _PreparedForgetting(problem, self, problem.cut(rows, facts) if rows else [])


def old_rows(problem: SearchProblem, fact: int, space: bool = True) -> list[Row]:
    """Return the rows of an entry with the old answer in the new one's place; none if nothing is to be forgotten.

    Args:
        problem: The facts.
        fact: Place of the entry.
        space: As in ``Forgetting``.

    Raises:
        RequestError: If the old answer has no token, or is too long for the model.
    """
    request, rows, lm = problem.batch.requests[fact], problem.batch.rows[fact], problem.lm
    if not request.target_true:
        return []
    old, new = request.target_true, request.target_new
    tied, free, new_tied = (
        row.ids[row.target :]
        for row in encode_prompts(
            lm.tokenizer, [request.text] * 3, [old, old, new], [False, request.space if space else False, False]
        )
    )
    new_ids = [row.ids[row.target :] for row in rows]
    if len(new_ids[0]) > 1 and new_ids[0][-1] == lm.tokenizer.eos_token_id:  # the end is taught as well
        new_ids = [ids[:-1] for ids in new_ids]
    # in a chat an answer begins a text, so that no space stands before either
    answers = [tied if ids == new_tied else free for ids in new_ids]
    written = [replace(row, ids=row.ids[: row.target] + ids) for row, ids in zip(rows, answers, strict=True)]
    longest = max(len(row.ids) for row in written)
    if not all(answers) or longest > lm.longest:
        remedy = (
            "has no token of its own" if not all(answers) else f"{longest} tokens with it, {lm.longest} can be read"
        )
        raise RequestError([Fault(problem.batch.numbers[fact], "target_true", old, f"{remedy}; give another one")])
    return written if differ(new_ids[0], answers[0]) else []


def differ(new: Sequence[int], old: Sequence[int]) -> bool:
    """Return True if two answers share fewer than half of the tokens of each, counted with repetitions."""
    shared = (Counter(new) & Counter(old)).total()
    return shared < len(new) / 2 and shared < len(old) / 2


@dataclass(frozen=True, eq=False)
class _PreparedForgetting(PreparedTerm):
    problem: SearchProblem
    term: Forgetting
    parts: Sequence[Suffixes]

    def rows(self, delta: Tensor) -> Iterator[TermRows]:
        above = self._above(delta.detach())
        for part in self.parts:
            if bool(above[part.fact].any()):
                yield self._group(part.only(above), delta)

    @torch.no_grad()
    def _above(self, delta: Float[Tensor, "n sites d_out"]) -> Bool[Tensor, " n"]:
        """Evaluate the facts first, since the floor is one of a whole fact and its rows lie in several groups."""
        value = torch.zeros_like(delta[:, 0, 0])
        for part in self.parts:
            value.index_add_(0, part.fact, self._group(part, delta).value)
        return self.term.factor * value > self.term.floor

    def _group(self, part: Suffixes, delta: Tensor) -> TermRows:
        likely = self.problem.logits(part, delta).softmax(-1).gather(1, part.label[:, None])[:, 0]
        loss = -(1 - likely + MARGIN).log()
        contexts = torch.tensor([len(rows) for rows in self.problem.batch.rows]).to(loss)
        sums = loss.new_zeros(len(part.fact)).index_add(0, part.row, loss / contexts[part.fact[part.row]])
        return TermRows(part.fact, sums / torch.bincount(part.row, minlength=len(part.fact)))

    def factor(self, solved: Tensor) -> float:
        return self.term.factor

    def only(self, active: Tensor) -> PreparedTerm:
        return replace(self, parts=[part.only(active) for part in self.parts if bool(active[part.fact].any())])
