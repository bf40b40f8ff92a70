"""The module that composes small edits of one projection: it retrieves them by the question and adds their changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cakeflow.errors import ConfigError, ShapeError, require_choice
from cakeflow.models import RoutedModule, Rows, forced_decisions, is_transposed
from cakeflow_sidememory.composition import Retrieval, Rule, composed_change, require_edits, similarities
from cakeflow_sidememory.factors import Factors


@dataclass(frozen=True)
class ComposedSettings:
    """Rules by which edits are retrieved and composed.

    Attributes:
        near: Path of the projection whose output is compared with what is stored of each edit; it runs earlier.
        retrieval: Which edits a question retrieves.
        rule: How their changes are joined.

    Raises:
        ConfigError: If ``rule`` names no rule.
    """

    near: str
    retrieval: Retrieval = Retrieval()
    rule: Rule = "agreeing"

    def __post_init__(self) -> None:
        require_choice("rule", self.rule, Rule)


class ComposedProjection(RoutedModule):
    """A projection with small edits beside it, whose changes are composed for each row (A3E).

    Which edits a row retrieves is decided on its prompt, and holds while the answer is written. The changes act where
    the answer is written: from the last token of the prompt on. In a pass without a cache and without
    ``prompt_lengths`` all of the text is the prompt. A row that retrieves nothing is answered by the projection, to the
    bit.

    ``decision`` has True for each edit that a row retrieved, ``similarity`` what it was retrieved by. An edit whose
    fact was edited again later is never retrieved.

    Args:
        base: The projection, not changed.
        settings: Rules.
        factors: Factors of n edits.
        states: The representation of each by which it is retrieved.
        facts: Number of each one's fact.
    """

    def __init__(
        self,
        base: nn.Module,
        settings: ComposedSettings,
        factors: Factors,
        states: Float[Tensor, "n width"],
        facts: Int[Tensor, " n"],
    ) -> None:
        super().__init__("prompt", [settings.near])
        self.base, self.settings, self.scale = base, settings, factors.scale
        device = base.get_parameter("weight").device
        for name, tensor in (("direction", factors.direction), ("output", factors.output), ("states", states)):
            self.register_parameter(name, nn.Parameter(tensor.detach().to(device), requires_grad=False))
        self.register_buffer("neurons", factors.neurons.to(device))
        self.register_buffer("facts", facts.to(device))
        repeated = (self.facts[:, None] == self.facts).triu(1).any(1)
        self.register_buffer("repeated", repeated, persistent=False)
        self.direction: Tensor
        self.output: Tensor
        self.states: Tensor
        self.neurons: Tensor
        self.facts: Tensor
        self.repeated: Tensor
        self.similarity: Tensor | None = None
        self.train(base.training)

    @classmethod
    def around(
        cls,
        module: nn.Module,
        settings: ComposedSettings,
        factors: Factors,
        states: Float[Tensor, "n width"],
        facts: Int[Tensor, " n"],
    ) -> ComposedProjection:
        """Return a new module with further edits, behind those that ``module`` has; it stays as it is.

        Raises:
            ConfigError: If it is a memory of another kind, with other settings, or with factors of another scale.
            ShapeError: If the factors are not of the projection's widths, or of different edits.
        """
        if isinstance(module, cls):
            if module.settings != settings:
                raise ConfigError(
                    f"the edits there are composed by {module.settings}, not {settings}; go on with those, or take "
                    "them back first"
                )
            require_widths(module.base, factors, states, facts)
            factors = Factors.join([module.factors, factors.to(module.direction.device)])
            states = torch.cat([module.states, states.to(module.states)])
            return cls(module.base, settings, factors, states, torch.cat([module.facts, facts.to(module.facts)]))
        if isinstance(module, RoutedModule):
            raise ConfigError(
                f"a {type(module).__name__} is in place of the projection; take it back first, or edit another one"
            )
        require_widths(module, factors, states, facts)
        return cls(module, settings, factors, states, facts)

    @property
    def factors(self) -> Factors:
        """Factors of all edits."""
        return Factors(self.direction, self.output, self.neurons, self.scale)

    def __len__(self) -> int:
        return len(self.direction)

    def oracle(self, edits: Collection[int]) -> AbstractContextManager[None]:
        """Have every prompt of the ``with`` body retrieve these edits, whatever it says.

        Args:
            edits: Their places in the memory, from 0; none for a memory that is silent.

        Raises:
            ConfigError: If one of them is not stored.
        """
        decision = torch.zeros(len(self), dtype=torch.bool)
        decision[list(require_edits(edits, len(self)))] = True
        return forced_decisions(self, {(): decision})

    def forward(self, inputs: Float[Tensor, "rows time d_in"]) -> Float[Tensor, "rows time d_out"]:
        """Add to what the projection says the composed change of each row's edits."""
        said: Tensor = self.base(inputs)
        rows = self.rows_of(inputs)
        decision = self.settle(rows, self.retrieve(rows))
        if decision.shape[-1] != len(self):
            raise ShapeError(
                f"a cache has decisions about {decision.shape[-1]} edits, and {len(self)} are stored; decide on the "
                "prompts anew: run them without that cache"
            )
        active = (decision & rows.behind(decision.device)[..., None]).flatten(0, 1)
        flat, result = inputs.reshape(-1, inputs.shape[-1]), said.reshape(-1, said.shape[-1])
        for edits, at in _sets(active):
            exact = flat[at].to(torch.promote_types(flat.dtype, self.direction.dtype))
            change = composed_change(self.factors, edits, exact, self.settings.rule)
            result = result.index_add(0, at, change.to(result.dtype))
        return result.view_as(said)

    @torch.no_grad()
    def retrieve(self, rows: Rows) -> Bool[Tensor, "rows n"]:
        """Return the edits that each row retrieves, or retrieved when its prompt was read."""
        if (decided := rows.forced if rows.held is None else rows.held) is not None:
            return decided.to(self.states.device)
        states = self.output_of(self.settings.near, rows).to(self.states.device)
        similarity = similarities(states, rows.mask(states.device), self.states)
        self.similarity = similarity.masked_fill(self.repeated, -torch.inf)
        return self.settings.retrieval.decide(self.similarity)


def _sets(active: Bool[Tensor, "tokens n"]) -> Iterator[tuple[tuple[int, ...], Int[Tensor, " at"]]]:
    """Yield each set of edits that is active somewhere, and the tokens at which it is."""
    tokens = active.any(1).nonzero()[:, 0]
    sets, which = active[tokens].unique(dim=0, return_inverse=True)
    for number, edits in enumerate(sets):
        yield tuple(edits.nonzero()[:, 0].tolist()), tokens[which == number]


def require_widths(
    projection: nn.Module, factors: Factors, states: Float[Tensor, "n width"], facts: Int[Tensor, " n"]
) -> None:
    """Check that factors are those of a projection, and that each has its representation and fact.

    Raises:
        ShapeError: If they are not.
    """
    weight = getattr(projection, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
    d_out, d_in = (shape[::-1] if is_transposed(projection) else shape) if len(shape) == 2 else (0, 0)
    if (factors.direction.shape[1], factors.output.shape[1]) != (d_in, d_out):
        raise ShapeError(
            f"factors of a projection from {factors.direction.shape[1]} to {factors.output.shape[1]} numbers do not "
            f"fit one from {d_in} to {d_out}; a memory belongs to the projection and the model that it was made for"
        )
    sizes = {len(each) for each in (factors.direction, factors.output, factors.neurons, states, facts)}
    if len(sizes) != 1:
        raise ShapeError(f"factors, representations and facts of {sorted(sizes)} edits; each edit needs one of each")
