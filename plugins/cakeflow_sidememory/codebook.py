"""The module that holds a codebook: keys with values, and balls around keys within which a value is the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cakeflow.errors import ConfigError, ShapeError, require_positive
from cakeflow.models import RoutedModule, is_transposed
from cakeflow_sidememory.routes import Measured

GAP = 1e-5
"""Where two balls are split, the older one ends so far before the newer one begins, as in GRACE's code."""
REACH = 1 + 1e-5
"""Part of its radius that a ball reaches: distances in float32 differ in the last bits from a radius in float64."""
PADDING = -1
"""Stands in the tables of labels where a target has no more tokens."""


@dataclass(frozen=True)
class Balls:
    """Balls around some of n keys: a key is the center of one, inside one that has its label, or outvoted.

    Attributes:
        radius: Radius of the ball around each key; -1 where a key is no center.
        owner: For each key the center whose ball answers with its value; -1 where a later key took its place.
    """

    radius: Float[Tensor, " n"]
    owner: Int[Tensor, " n"]


def fold(
    keys: Float[Tensor, "n d_in"], labels: Sequence[Sequence[int]], eps: float, start: Balls | None = None
) -> Balls:
    """Return the balls that n facts leave, one after another (GRACE, arXiv 2211.11031, algorithm 1).

    A key that is farther than ``eps`` and the nearest ball's radius from that ball's center gets a ball of radius
    ``eps``. Nearer, with the label of that ball, the ball grows to reach it. With another label it gets a ball of its
    own, and both have half of the distance as their radius, the older one ``GAP`` less. The code leaves no ball at all
    where two labels have one key; here the later fact takes the place of the earlier one.

    Args:
        keys: The keys, in the order of the facts.
        labels: Tokens of each fact's target; equal ones are one label (the code compares their means).
        eps: Radius of a new ball, above 0.
        start: What the first of these facts left; by default nothing comes before them.
    """
    done = 0 if start is None else len(start.owner)
    radius, owner = torch.full((len(keys),), -1.0, dtype=torch.float64), torch.full((len(keys),), -1)
    if start is not None:
        radius[:done], owner[:done] = start.radius, start.owner
    for new in range(done, len(keys)):
        nearest, distance = _nearest(keys[:new], keys[new], owner[:new])
        if nearest < 0 or distance > eps + float(radius[nearest]):
            radius[new], owner[new] = eps, new
        elif tuple(labels[new]) == tuple(labels[nearest]):
            radius[nearest], owner[new] = max(float(radius[nearest]), distance), nearest
        elif distance <= 2 * GAP:
            radius[new], radius[nearest] = float(radius[nearest]), -1
            owner[owner == nearest] = new
            owner[nearest], owner[new] = -1, new
        else:
            radius[new], radius[nearest], owner[new] = distance / 2, distance / 2 - GAP, new
    return Balls(radius, owner)


def _nearest(keys: Float[Tensor, "n d_in"], key: Tensor, owner: Int[Tensor, " n"]) -> tuple[int, float]:
    """Return the center nearest to a key, the first of several, and its distance; -1 if there is no center."""
    centers = (owner == torch.arange(len(owner))).nonzero()[:, 0]
    if not len(centers):
        return -1, float("inf")
    distances = (keys[centers].double() - key.double()).norm(dim=1)
    place = int(distances.argmin())
    return int(centers[place]), float(distances[place])


def table(labels: Sequence[Sequence[int]]) -> Int[Tensor, "n longest"]:
    """Return rows of tokens as one table, filled up with ``PADDING``."""
    width = max(map(len, labels), default=0)
    rows = [[*row, *[PADDING] * (width - len(row))] for row in labels]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), width)


def rows_of_table(labels: Int[Tensor, "n longest"]) -> list[tuple[int, ...]]:
    """Return the rows of tokens of a table that ``table`` made."""
    return [tuple(token for token in row if token != PADDING) for row in labels.tolist()]


@dataclass(frozen=True)
class CodebookSettings:
    """Rules of a codebook.

    Attributes:
        eps: Radius of a new ball, in the norm of the projection's inputs: measure what is usual at the layer.

    Raises:
        ConfigError: If it is not above 0.
    """

    eps: float = 1.0

    def __post_init__(self) -> None:
        require_positive("CodebookSettings", self, "eps")
        if not self.eps < inf:
            raise ConfigError("CodebookSettings.eps is infinite, so that one ball would hold every text; set a number")


class Codebook(RoutedModule):
    """A projection with a codebook beside it, which answers in its place at the last token of a prompt.

    GRACE's ``replace_last``: where the projection's input at that token lies in a ball, the output there is the value
    of the nearest key that the ball holds; everywhere else the projection answers. What is written after the prompt
    sees the value through the cached keys and values of attention, and nothing is replaced at generated tokens. A pass
    without a cache takes its last token for the prompt's last one (as GRACE's code does), unless ``prompt_lengths``
    says otherwise, as every evaluation does.

    ``decision`` has for each row the number of the fact that answered, from 1 on in the order of learning, 0 for the
    projection. Balls are derived from keys and labels alone (``fold``), so that any facts can be left out.

    Args:
        base: The projection, not changed.
        settings: Rules.
        keys: Input of the projection at the last token of each fact's prompt.
        values: What to answer there.
        labels: Tokens of each fact's target.
        start: The balls of the first of these facts, if they are known.

    Raises:
        ShapeError: If keys or values are not of the projection's widths.
    """

    def __init__(
        self,
        base: nn.Module,
        settings: CodebookSettings,
        keys: Float[Tensor, "n d_in"],
        values: Float[Tensor, "n d_out"],
        labels: Sequence[Sequence[int]],
        start: Balls | None = None,
    ) -> None:
        super().__init__("prompt")
        weight = base.get_parameter("weight")
        d_out, d_in = weight.T.shape if is_transposed(base) else weight.shape
        if tuple(keys.shape) != (len(labels), d_in) or tuple(values.shape) != (len(labels), d_out):
            raise ShapeError(
                f"a codebook of {len(labels)} facts has keys {tuple(keys.shape)} and values {tuple(values.shape)}, and "
                f"the projection maps {d_in} to {d_out} numbers; a memory belongs to the model that it was made for"
            )
        self.base, self.settings = base, settings
        balls = fold(keys.cpu(), labels, settings.eps, start)
        tensors = {
            "keys": keys,
            "values": values,
            "labels": table(labels),
            "radius": balls.radius,
            "owner": balls.owner,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach().to(weight.device))
        self.keys: Tensor
        self.values: Tensor
        self.labels: Tensor
        self.radius: Tensor
        self.owner: Tensor
        self.distances: Tensor | None = None
        self._thresholds: Tensor | None = None
        self.train(base.training)

    @classmethod
    def around(cls, module: nn.Module, settings: CodebookSettings) -> Codebook:
        """Return the module itself if it is a codebook; else the module with an empty one.

        Raises:
            ConfigError: If it is a codebook with other settings.
        """
        if isinstance(module, cls):
            if module.settings != settings:
                raise ConfigError(
                    f"the codebook there has the settings {module.settings}, not {settings}; go on with those, or take "
                    "it back first"
                )
            return module
        weight = module.get_parameter("weight")
        d_out, d_in = weight.T.shape if is_transposed(module) else weight.shape
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return cls(module, settings, torch.empty(0, d_in, dtype=dtype), torch.empty(0, d_out, dtype=dtype), [])

    def grown(
        self, keys: Float[Tensor, "n d_in"], values: Float[Tensor, "n d_out"], labels: Sequence[Sequence[int]]
    ) -> Codebook:
        """Return a new codebook with further facts.

        Raises:
            ShapeError: If keys or values are not of the projection's widths.
        """
        mine = (self.keys.shape[1], self.values.shape[1])
        if (keys.shape[-1], values.shape[-1]) != mine:
            raise ShapeError(
                f"keys of {keys.shape[-1]} and values of {values.shape[-1]} numbers do not fit a codebook of {mine}; a "
                "memory belongs to the model that it was made for"
            )
        keys, values = torch.cat([self.keys, keys.to(self.keys)]), torch.cat([self.values, values.to(self.values)])
        balls = Balls(self.radius.cpu(), self.owner.cpu())
        return Codebook(self.base, self.settings, keys, values, [*rows_of_table(self.labels), *labels], balls)

    def forward(self, inputs: Float[Tensor, "rows time d_in"]) -> Float[Tensor, "rows time d_out"]:
        """Compute the projection's output, with a value in its place at the last token of the prompts it answers."""
        main: Tensor = self.base(inputs)
        rows = self.rows_of(inputs)
        if rows.held is not None:
            self.settle(rows, rows.held)
            return main
        number = torch.arange(rows.shape[0], device=main.device)
        last = rows.last(main.device)
        query = inputs.reshape(*rows.shape, -1)[number, last]
        choice = self.settle(rows, self.decide(query))[:, 0]
        if not len(self.keys) or not choice.any():
            return main
        answers, output = choice > 0, main.reshape(*rows.shape, -1).clone()
        output[number[answers], last[answers]] = self.values[choice[answers] - 1].to(output)
        return output.view_as(main)

    def decide(self, query: Float[Tensor, "rows d_in"]) -> Int[Tensor, " rows"]:
        """Return the number of the fact that answers each query, 0 for none; notes the distances to the balls."""
        query = query.detach().to(self.keys)
        if not len(self.keys):
            self.distances, self._thresholds = query.new_full((len(query),), float("inf")), query.new_zeros(len(query))
            return torch.zeros(len(query), dtype=torch.long, device=query.device)
        # pair by pair: a matrix product would make a distance depend on the other rows
        every = torch.cdist(query, self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        is_center = self.owner == torch.arange(len(self.owner), device=self.owner.device)
        self.distances, center = every.masked_fill(~is_center, float("inf")).min(1)
        self._thresholds = (self.radius[center] * REACH).to(self.distances)
        of_ball = every.masked_fill(self.owner != center[:, None], float("inf"))
        nearest = of_ball.shape[1] - 1 - of_ball.flip(1).argmin(1)  # of equal keys that of the later fact
        return torch.where(self.distances <= self._thresholds, nearest + 1, 0)

    def own(self, fact: int) -> int:
        """Return the number of a fact's own answer, by its place in the order of learning."""
        return fact + 1

    def measured(self) -> Measured:
        """Return the distance of each row of the last pass to the nearest center, and the radius of its ball."""
        if self.distances is None or self._thresholds is None:
            raise ConfigError("the codebook was not asked anything yet; run the model first")
        return Measured(self.distances, self._thresholds, "below")
