"""The objective of a target search: a sum of exchangeable terms, and the rules that end the search of a fact."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cakeflow.errors import ArchitectureError, ConfigError, NumericalError, require_choice
from cakeflow.forward.suffix import Suffixes, cut
from cakeflow.forward.tokens import Row, TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.language import LanguageModel


@dataclass(frozen=True, eq=False)
class SearchProblem:
    """A batch of n facts and the sites where their vectors are added: what terms are prepared from.

    Attributes:
        lm: Frozen model.
        batch: n facts.
        sites: Value site first, further sites after it.
        initial: Present output of each site on the bare prompt, n x sites x d_out.
        prompts: Suffixes of each fact's prompt in every context, target included.
        max_tokens: Most suffix tokens in one pass with gradients.
        importance: Sum of ``Targets.importance`` over earlier facts at the first site; None before the first one.
    """

    lm: LanguageModel
    batch: TextBatch
    sites: Sequence[Site]
    initial: Float[Tensor, "n sites d_out"]
    prompts: Sequence[Suffixes]
    max_tokens: int
    importance: Float[Tensor, " d_out"] | None = None

    @classmethod
    def prepare(
        cls,
        lm: LanguageModel,
        batch: TextBatch,
        sites: Sequence[Site],
        max_tokens: int,
        importance: Float[Tensor, " d_out"] | None = None,
    ) -> SearchProblem:
        """Run the prompts once in full and cut their suffixes.

        Raises:
            ArchitectureError: If the model's attention cannot start in the middle of a text.
        """
        _require_agreement(lm, batch.essence, sites)
        rows, owners = [row for variants in batch.rows for row in variants], batch.row_entries
        prompts, outputs = cut(lm, rows, owners, sites, max_tokens)
        first = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
        initial = outputs[first]  # h_0 is read on the bare prompt, the first of each fact's rows
        initial = initial if initial.dtype == torch.float64 else initial.float()
        return cls(lm, batch, sites, initial, prompts, max_tokens, importance)

    def cut(self, rows: Sequence[Row], facts: Sequence[int], *, read_first: bool = False) -> list[Suffixes]:
        """Cut a term's own rows at the token of the fact, as ``cakeflow.forward.cut`` does.

        Args:
            rows: Tokenised texts with a subject.
            facts: Index of the fact of each row.
            read_first: True to read the logits at that token only, False to read them before each target token.
        """
        return cut(self.lm, rows, facts, self.sites, self.max_tokens, read_first=read_first)[0]

    def logits(self, part: Suffixes, delta: Float[Tensor, "n sites d_out"]) -> Float[Tensor, "read vocabulary"]:
        """Compute the logits that a group of rows reads with each fact's vectors added, in delta's precision."""
        return part.logits(self.lm, self.sites, delta[part.fact]).to(delta.dtype)


SolvedIn = Literal["all", "sampled"]


class TermRows(NamedTuple):
    """Some rows of a term at one delta, differentiable.

    Attributes:
        fact: Index of each row's fact.
        value: Value of each row; a fact's value is the sum over its rows.
        misses: Number of target tokens in each row that are not the most likely ones, from a term that counts them.
    """

    fact: Int[Tensor, " rows"]
    value: Float[Tensor, " rows"]
    misses: Float[Tensor, " rows"] | None = None


class PreparedTerm(ABC):
    """A term for the facts of one search, evaluated at many deltas."""

    @abstractmethod
    def rows(self, delta: Float[Tensor, "n sites d_out"]) -> Iterator[TermRows]:
        """Yield the rows group by group; a group is evaluated once the graph of the one before has been freed.

        Args:
            delta: Vectors added at the sites, one row for each of the n facts, done or not.
        """

    @abstractmethod
    def factor(self, solved: Bool[Tensor, " n"]) -> float | Float[Tensor, " n"]:
        """Return the weight of the term in the objective.

        Args:
            solved: True for facts whose target tokens were all the most likely ones at the previous delta.
        """

    def only(self, active: Bool[Tensor, " n"]) -> PreparedTerm:
        """Drop the rows of facts that are done; facts keep their indices."""
        return self


@dataclass(frozen=True)
class ObjectiveTerm(ABC):
    """Part of the objective that a target search minimises for each fact.

    Contract: pure, and no fact influences another. Subclasses are frozen dataclasses with the term's settings.

    Attributes:
        factor: Weight of the term.
        needs_importance: True for a term that uses ``SearchProblem.importance``.
    """

    needs_importance = False  # no annotation: jsonargparse stumbles over ClassVar
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor >= 0:
            raise ConfigError(f"{type(self).__name__}: factor must be 0 or more, got {self.factor}")

    @abstractmethod
    def prepare(self, problem: SearchProblem) -> PreparedTerm:
        """Compute once, without gradients, what the term needs of the facts: suffixes, reference distributions ...

        Args:
            problem: Facts and sites.
        """


@dataclass(frozen=True)
class TargetLikelihood(ObjectiveTerm):
    """Negative log-likelihood of the new target: mean over its tokens, then over the contexts.

    Attributes:
        factor: Weight of the term.
        solved_factor: Further factor while all tokens of the target are the most likely ones in all contexts (PMET's
            code: 0.1).
        solved_in: Contexts that count for a fact to be solved: ``all``, or those ``sampled`` to stand in front of the
            prompt, the bare prompt left out where there are any (ENCORE's code).
    """

    solved_factor: float = 1.0
    solved_in: SolvedIn = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("TargetLikelihood.solved_in", self.solved_in, SolvedIn)
        if not 0 < self.solved_factor <= 1:
            raise ConfigError(f"TargetLikelihood: solved_factor must lie in (0, 1], got {self.solved_factor}")

    def prepare(self, problem: SearchProblem) -> PreparedTerm:
        """Use the suffixes of the problem's prompts."""
        return _PreparedLikelihood(problem, self, problem.prompts)


@dataclass(frozen=True, eq=False)
class _PreparedLikelihood(PreparedTerm):
    problem: SearchProblem
    term: TargetLikelihood
    parts: Sequence[Suffixes]

    def rows(self, delta: Tensor) -> Iterator[TermRows]:
        return (self._group(part, delta) for part in self.parts)

    def _group(self, part: Suffixes, delta: Tensor) -> TermRows:
        logits = self.problem.logits(part, delta)
        nll = torch.nn.functional.cross_entropy(logits, part.label, reduction="none")
        chosen = logits.detach().gather(1, part.label[:, None])[:, 0]  # ties count as most likely
        misses = (chosen < logits.detach().amax(1)).to(nll)
        count = torch.bincount(part.row, minlength=len(part.fact))
        contexts = torch.tensor([len(rows) for rows in self.problem.batch.rows]).to(nll)
        value = _by_row(part, nll / contexts[part.fact[part.row]]) / count
        counted = self._counted(part) if self.term.solved_in == "sampled" else 1
        return TermRows(part.fact, value, counted * _by_row(part, misses))

    def _counted(self, part: Suffixes) -> Bool[Tensor, " rows"]:
        """Return False for bare prompts of facts with further contexts, which put their token further behind."""
        bare = [rows[0].fact if len(rows) > 1 else -1 for rows in self.problem.batch.rows]
        at = part.positions.gather(1, part.changed_column[:, None])[:, 0]
        return at != torch.tensor(bare, device=at.device)[part.fact]

    def factor(self, solved: Tensor) -> Tensor:
        # torch.where rounds plain numbers to float32: solved_factor is single precision on every model
        return self.term.factor * torch.where(solved, self.term.solved_factor, 1.0).to(self.problem.initial)

    def only(self, active: Tensor) -> PreparedTerm:
        return replace(self, parts=[part.only(active) for part in self.parts if bool(active[part.fact].any())])


def _by_row(part: Suffixes, values: Float[Tensor, " read"]) -> Float[Tensor, " rows"]:
    """Sum what was read over the positions of each row."""
    return values.new_zeros(len(part.fact)).index_add(0, part.row, values)


@dataclass(frozen=True)
class EssenceKL(ObjectiveTerm):
    """KL(p_now || p_before) of the prediction after "{subject} is a", cut at the subject (ROME 3.1, eq. 4).

    The official code takes the divergence in this direction; the papers print the other one.

    Attributes:
        factor: Weight of the term (``kl_factor``).
    """

    factor: float = 0.0625

    def prepare(self, problem: SearchProblem) -> PreparedTerm:
        """Cut the essence prompts and compute the reference distributions."""
        parts = problem.cut(problem.batch.essence, range(len(problem.batch)), read_first=True)
        with torch.no_grad():
            nothing = torch.zeros_like(problem.initial)
            before = [problem.logits(part, nothing).log_softmax(-1) for part in parts]
        return _PreparedEssence(problem, self.factor, list(zip(parts, before, strict=True)))


@dataclass(frozen=True, eq=False)
class _PreparedEssence(PreparedTerm):
    problem: SearchProblem
    weight: float
    parts: Sequence[tuple[Suffixes, Tensor]]

    def rows(self, delta: Tensor) -> Iterator[TermRows]:
        return (self._group(part, before, delta) for part, before in self.parts)

    def _group(self, part: Suffixes, before: Tensor, delta: Tensor) -> TermRows:
        now = self.problem.logits(part, delta).log_softmax(-1)
        return TermRows(part.fact, (now.exp() * (now - before)).sum(1))

    def factor(self, solved: Tensor) -> float:
        return self.weight

    def only(self, active: Tensor) -> PreparedTerm:
        parts = [(part.only(active), before[active[part.fact]]) for part, before in self.parts
                 if bool(active[part.fact].any())]  # fmt: skip
        return replace(self, parts=parts)


@dataclass(frozen=True)
class NormDecay(ObjectiveTerm):
    """Length of each added vector over the squared length of the present value, summed over the sites.

    Attributes:
        factor: Weight of the term (``v_weight_decay``).
    """

    factor: float = 0.5

    def prepare(self, problem: SearchProblem) -> PreparedTerm:
        """Compute the length of the present values."""
        return _PreparedDecay(self.factor, torch.linalg.vector_norm(problem.initial, dim=2))


@dataclass(frozen=True, eq=False)
class _PreparedDecay(PreparedTerm):
    weight: float
    norm: Float[Tensor, "n sites"]

    def rows(self, delta: Tensor) -> Iterator[TermRows]:
        length = torch.linalg.vector_norm(delta, dim=2)
        fact = torch.arange(len(delta), device=delta.device)
        yield TermRows(fact, (length / self.norm.square()).sum(1))

    def factor(self, solved: Tensor) -> float:
        return self.weight


@torch.no_grad()
def _require_agreement(lm: LanguageModel, essence: Sequence[Row], sites: Sequence[Site]) -> None:
    """Compare suffix passes with full ones: not every attention can go on from cached keys and an explicit mask.

    Raises:
        ArchitectureError: If they differ by more than rounding.
        NumericalError: If the full ones do not give finite numbers.
    """
    dtype = torch.promote_types(lm.dtype, torch.float32)
    rows = [pick(essence, key=lambda row: row.fact) for pick in (max, min)]  # both, so that one prefix is padded
    (part,), _ = cut(lm, rows, [0, 1], sites, len(rows), read_first=True)
    for index, logits in zip(part.fact.tolist(), part.run(lm), strict=True):
        ids = torch.tensor([rows[index].ids[: rows[index].fact + 1]], device=lm.device)
        full = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
        if not bool(torch.isfinite(full).all()):
            raise NumericalError(
                f"{type(lm.model).__name__}: its logits for a prompt are not finite in {full.dtype}; load the model in "
                "float32 or bfloat16, or another copy of it"
            )
        difference = float((full.to(dtype).log_softmax(-1) - logits.to(dtype).log_softmax(-1)).abs().mean())
        if not difference <= torch.finfo(lm.dtype).eps ** (1 / 3):
            raise ArchitectureError(
                f"{type(lm.model).__name__}: a pass resumed from cached attention keys differs from a full one by "
                f"{difference:.1e} in log-probability; this attention is not supported"
            )


@dataclass(frozen=True, eq=False)
class ObjectiveValue:
    """The objective at one delta, fact by fact.

    Attributes:
        delta: Vectors added at the sites.
        grad: Gradient of the loss.
        loss: Sum of the terms' values, each times its factor.
        solved: True where all tokens of the target are the most likely ones; False if no term counts misses.
        terms: Value of each term by its name, without its factor.
        hits: Number of evaluations so far at which the fact was solved, this one included.
    """

    delta: Float[Tensor, "n sites d_out"]
    grad: Float[Tensor, "n sites d_out"]
    loss: Float[Tensor, " n"]
    solved: Bool[Tensor, " n"]
    terms: Mapping[str, Float[Tensor, " n"]]
    hits: Int[Tensor, " n"]

    def after(self, earlier: ObjectiveValue) -> ObjectiveValue:
        """Count the hits of an earlier evaluation as well."""
        return replace(self, hits=self.hits + earlier.hits)

    def updated(self, active: Bool[Tensor, " n"], newer: ObjectiveValue) -> ObjectiveValue:
        """Take over newer numbers for the facts marked in ``active``."""
        each = active[:, None, None]
        return ObjectiveValue(
            torch.where(each, newer.delta, self.delta),
            torch.where(each, newer.grad, self.grad),
            torch.where(active, newer.loss, self.loss),
            torch.where(active, newer.solved, self.solved),
            {name: torch.where(active, newer.terms[name], value) for name, value in self.terms.items()},
            torch.where(active, newer.hits, self.hits),
        )


@dataclass(frozen=True, eq=False)
class Objective:
    """A sum of prepared terms.

    Attributes:
        terms: Terms by name, in the order in which their gradients are added.
    """

    terms: Mapping[str, PreparedTerm]

    def evaluate(self, delta: Tensor, solved: Bool[Tensor, " n"], *, with_grad: bool) -> ObjectiveValue:
        """Compute the terms, the loss and, on request, its gradient.

        Args:
            delta: Vectors added at the sites, n x sites x d_out.
            solved: Facts that were solved at the previous delta.
            with_grad: True to compute the gradient; otherwise it is 0.
        """
        leaf = delta.detach().clone().requires_grad_(with_grad)
        grad, loss = torch.zeros_like(delta), delta.new_zeros(len(delta))
        misses, counted, values = torch.zeros_like(loss), False, dict[str, Tensor]()
        with torch.set_grad_enabled(with_grad):
            for name, term in self.terms.items():
                factor, value = term.factor(solved), torch.zeros_like(loss)
                for rows in term.rows(leaf):
                    value.index_add_(0, rows.fact, rows.value.detach())
                    if rows.misses is not None:
                        misses.index_add_(0, rows.fact, rows.misses)
                        counted = True
                    if with_grad:
                        grad += _gradient(rows, factor, leaf)
                values[name], loss = value, loss + factor * value
        solved = (misses == 0) & counted
        return ObjectiveValue(leaf.detach(), grad, loss, solved, values, solved.long())

    def only(self, active: Bool[Tensor, " n"]) -> Objective:
        """Drop the rows of facts that are done."""
        return Objective({name: term.only(active) for name, term in self.terms.items()})


def _gradient(rows: TermRows, factor: float | Tensor, leaf: Tensor) -> Tensor:
    weight = factor[rows.fact] if isinstance(factor, Tensor) else factor
    return torch.autograd.grad((weight * rows.value).sum(), leaf)[0]
