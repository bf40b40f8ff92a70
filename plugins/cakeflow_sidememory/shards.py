"""The module that holds a side memory: shards of one projection's weight, and the router that chooses among them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cakeflow.errors import ConfigError, require_choice, require_count
from cakeflow.models import RoutedModule, Scope, is_transposed
from cakeflow_sidememory.distance import activation_of, row_distances, token_distances
from cakeflow_sidememory.joins import Join, join
from cakeflow_sidememory.routes import Measured

Rule = Literal["retrieve", "merge"]
"""Among finished shards the most excited one answers, or all of them are joined into one that answers."""
Control = Literal["distance", "always", "never"]
"""Route by distance, or, as controls, every row to the shard being written, or none to any."""
EARLIER = 0.6
"""Weight of an earlier join in the next one, in WISE's code."""


@dataclass(frozen=True)
class ShardSettings:
    """Rules by which shards are kept and routed; the defaults are WISE's (arXiv 2405.14768), with a causal router.

    Attributes:
        rule: What happens to finished shards.
        scope: What a decision holds for.
        ratio: Part of a shard's threshold that a row must reach.
        save_every: Edits of a shard. Where every row goes to the shard being written, there is one for all.
        join_every: Edits after which finished shards are joined.
        join: How.
        density: Share of the entries of each shard that a join keeps.
        longest: Beyond so many tokens the largest distance counts, not the mean; None for never.
        control: How rows are routed.
        activation: Name of an activation; empty for that of the model's MLPs.
        unjoined: Whether, with ``merge``, finished shards answer before they are joined. WISE's code says no: there the
            facts of a finished shard are not answered until ``join_every`` edits are reached.

    Raises:
        ConfigError: If a number is out of its range, or a word none of its choices.
    """

    rule: Rule = "retrieve"
    scope: Scope = "prompt"
    ratio: float = 0.88
    save_every: int = 500
    join_every: int = 1000
    join: Join = "ties"
    density: float = 0.53
    longest: int | None = None
    control: Control = "distance"
    activation: str = ""
    unjoined: bool = True

    def __post_init__(self) -> None:
        choices = {"rule": Rule, "scope": Scope, "join": Join, "control": Control}
        for name, choice in choices.items():
            require_choice(f"ShardSettings.{name}", getattr(self, name), choice)
        for name in ("save_every", "join_every", "longest"):
            require_count(f"ShardSettings.{name}", getattr(self, name), 1, optional=name == "longest")
        if not (0 < self.ratio < inf and 0 < self.density <= 1):
            raise ConfigError(
                f"ratio={self.ratio}, density={self.density}: ratio must be above 0 and finite, density above 0 and at "
                "most 1"
            )
        if self.join_every < self.save_every or self.join_every % self.save_every:
            raise ConfigError(
                f"join_every={self.join_every} must be a multiple of save_every={self.save_every}: whole shards are "
                "joined"
            )
        if self.activation:
            activation_of(self.activation)

    @property
    def shard_edits(self) -> int:
        """Edits after which a shard is put away; never without a router, which alone could find it again."""
        return sys.maxsize if self.control == "always" else self.save_every


class ShardedProjection(RoutedModule):
    """A projection with a side memory beside it; what the projection says stays as it is wherever the memory is silent.

    ``decision`` has for each row the shard that answered: 0 the projection, 1 the shard being written, then the
    finished ones. ``distances`` has the distance of each to the projection.

    Args:
        base: The projection, not changed.
        settings: Rules.
        shards: Weight of the shard being written, then of the finished ones, d_out x d_in.
        least: Threshold of each; infinite for one without edits.
        edits: Number of edits so far.
    """

    def __init__(
        self,
        base: nn.Module,
        settings: ShardSettings,
        shards: Sequence[Float[Tensor, "d_out d_in"]],
        least: Sequence[float],
        edits: int,
        joined: bool = False,
    ) -> None:
        super().__init__(settings.scope)
        self.base, self.settings = base, settings
        self.shards = nn.ParameterList(nn.Parameter(each, requires_grad=False) for each in shards)
        self.register_buffer("least", torch.tensor(least, dtype=torch.float64))
        self.register_buffer("edits", torch.tensor(edits))
        self.register_buffer("joined", torch.tensor(joined))
        self.least: Tensor
        self.edits: Tensor
        self.joined: Tensor
        self.distances: Tensor | None = None
        self._activation = activation_of(settings.activation)
        self.train(base.training)

    @classmethod
    def around(cls, module: nn.Module, settings: ShardSettings) -> ShardedProjection:
        """Return the module itself if it is a side memory; else the module with one that learned nothing yet.

        Raises:
            ConfigError: If it is a side memory with other settings.
        """
        if isinstance(module, cls):
            if module.settings != settings:
                raise ConfigError(
                    f"the side memory there has the settings {module.settings}, not {settings}; go on with those, or "
                    "take it back first"
                )
            return module
        return cls(module, settings, [plain_weight(module)], [float("inf")], 0)

    def changed(
        self, shards: Sequence[Tensor], least: Sequence[float], edits: int, *, joined: bool | None = None
    ) -> ShardedProjection:
        """Return a new module with other shards."""
        joined = bool(self.joined) if joined is None else joined
        return ShardedProjection(self.base, self.settings, [each.detach() for each in shards], least, edits, joined)

    def put_away(self) -> ShardedProjection:
        """Return the module with the shard being written among the finished ones, and joined, where that is due.

        WISE's code: with ``merge`` the earlier join weighs .6 in the next one, and the threshold is never reset.
        """
        settings, edits = self.settings, int(self.edits)
        base = plain_weight(self.base)
        writing, *saved = self.shards
        least, *leasts = self.least.tolist()
        merge = settings.rule == "merge"
        shards, thresholds = [*saved, writing], [*leasts, least]
        joined = bool(self.joined)
        if edits % settings.join_every == 0:
            count = settings.join_every // settings.save_every
            parts, weights = [each.detach() for each in shards[-count:]], [1 / count] * count
            if merge and joined:
                parts, weights = [*parts, shards[0].detach()], [(1 - EARLIER) / count] * count + [EARLIER]
            result = join(base, parts, weights, settings.join, settings.density)
            rest = 0 if merge else len(shards) - count
            shards, thresholds = [*shards[:rest], result], [*thresholds[:rest], min(thresholds[-count:])]
            joined = joined or merge
        return self.changed([base, *shards], [least if merge else float("inf"), *thresholds], edits, joined=joined)

    def forward(self, inputs: Float[Tensor, "rows time d_in"]) -> Float[Tensor, "rows time d_out"]:
        """Compute all answers and choose one of them for each row, or for each token."""
        main = self.base(inputs)
        rows = self.rows_of(inputs)
        answers = self.answers(inputs)
        with torch.no_grad():
            tokens = torch.stack([token_distances(each, main, self._activation) for each in answers])
            tokens = tokens.reshape(len(answers), *rows.shape).to(torch.promote_types(tokens.dtype, torch.float32))
            if self.scope == "token":
                self.distances = tokens
            else:
                mask = rows.mask(tokens.device)
                self.distances = torch.stack([row_distances(each, mask, self.settings.longest) for each in tokens])
            choice = self.settle(rows, self.decide(self.distances)).reshape(main.shape[:-1])[..., None]
        result: Tensor = main
        for number, answer in enumerate(answers, 1):
            result = torch.where(choice == number, answer, result)
        return result

    def own(self, fact: int) -> int:
        """Return the number of the shard that learned a fact, by its place in the order of learning; 0 for none."""
        settings, edits = self.settings, int(self.edits)
        shard, per_join = fact // settings.save_every, settings.join_every // settings.save_every
        if not 0 <= fact < edits:
            return 0
        if settings.control == "always" or shard == edits // settings.save_every:
            return 1
        joins, merge = edits // settings.join_every, settings.rule == "merge"
        if shard < joins * per_join:
            return 2 if merge else 2 + shard // per_join
        place = 2 + (min(joins, 1) if merge else joins) + shard - joins * per_join
        return place if place - 1 in self.candidates() else 0

    def measured(self) -> Measured:
        """Return for each row of the last pass the distance that decided, and the threshold it was compared with.

        It is that of the shard that answered or, where none did, of the one with the largest distance.

        Raises:
            ConfigError: If nothing was asked yet.
        """
        if self.distances is None or self.decision is None:
            raise ConfigError("the side memory was not asked anything yet; run the model first")
        largest = self.distances.argmax(0)
        place = torch.where(self.decision > 0, self.decision - 1, largest)
        distance = self.distances.gather(0, place[None])[0]
        least = (self.settings.ratio * self.least)[self.candidates()]
        if self.settings.rule == "merge":  # one threshold for all
            least = least[:1].expand(len(self.distances))
        return Measured(distance, least.to(distance.device)[place], "above")

    def answers(self, inputs: Tensor) -> list[Tensor]:
        """Return what each candidate says: the shard being written, then the finished ones or their join."""
        bias = getattr(self.base, "bias", None)
        return [nn.functional.linear(inputs, self.shards[index].to(inputs.dtype), bias) for index in self.candidates()]

    def candidates(self) -> list[int]:
        """Return the places of the shards that can answer."""
        if self.settings.rule == "retrieve" or self.settings.unjoined:
            return list(range(len(self.shards)))
        return [0, 1] if self.joined else [0]

    def decide(self, distances: Float[Tensor, "candidates ..."]) -> Int[Tensor, ...]:
        """Return which candidate answers at each place, by its distance; 0 is the projection (WISE's code, 1.4)."""
        if self.settings.control != "distance":
            return torch.full(distances.shape[1:], int(self.settings.control == "always"), device=distances.device)
        least = (self.settings.ratio * self.least).tolist()
        merge = self.settings.rule == "merge"  # one threshold for all, which may be met
        top: Tensor = distances[0]
        chosen: Tensor = (top >= least[0]).long()
        for number, place in enumerate(self.candidates()[1:], 2):
            distance = distances[number - 1]
            better = (distance > top) & (distance >= least[0] if merge else distance > least[place])
            chosen, top = torch.where(better, number, chosen), torch.where(better, distance, top)
        return chosen


def plain_weight(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """Return a copy of a projection's weight, d_out x d_in whatever its layout: in float32 or better."""
    weight = module.get_parameter("weight").detach()
    weight = (weight.T if is_transposed(module) else weight).contiguous()
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
