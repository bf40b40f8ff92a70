"""CAKE's theory, measured: how far edits are from what the linear picture says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators import LinearMap, ShareAllocator
from cakeflow.allocators.jacobian import conjugate_gradients
from cakeflow.core.callback import EditCallback, LayerEdit
from cakeflow.tracing import CausalTrace, Fact, Trace, known_rows, read_facts


class ResidualDrift(EditCallback):
    """How much more or less a layer's edit does at the value site than its share (CAKE appendix B.5, eq. 51-56).

    Logs ``layer{l}/drift``, the mean over facts of ``|(R_before - R_after) - share|``, and ``drift``, their sum over
    layers. Methods with a target at each layer (``residual_at="self"``) have no common residual and are left out.
    """

    def __init__(self) -> None:
        self._turns: list[LayerEdit] = []

    def on_layer_solved(self, module: L.LightningModule, edit: LayerEdit) -> None:
        """See ``EditCallback``."""
        self._turns.append(edit)

    def on_batch_edited(self, module: L.LightningModule, left: Float[Tensor, "n d_out"]) -> None:
        """See ``EditCallback``."""
        layer_contexts, self._turns = self._turns, []
        if len({edit.context.value_site for edit in layer_contexts}) > 1:
            return
        after = [*(edit.residual for edit in layer_contexts[1:]), left]
        found = {edit.context.site.layer: drift(edit, rest) for edit, rest in zip(layer_contexts, after, strict=True)}
        for layer, value in found.items():
            module.log(f"layer{layer}/drift", value, batch_size=len(left))
        module.log("drift", sum(found.values()), batch_size=len(left))


def drift(edit: LayerEdit, after: Float[Tensor, "n d_out"]) -> float:
    """Mean over facts of ``|actual - expected|`` reduction of what is missing (CAKE eq. 53-55)."""
    return float((edit.residual - after - edit.problem.residual).norm(dim=1).mean())


@dataclass(frozen=True)
class Bound:
    """Theorem 2 at one layer (CAKE eq. 7): ``error <= (mismatch + propagation) * amplification``.

    Attributes:
        error: ``|Delta* - Delta|``, spectral norm; Delta* writes what would do alone at this layer.
        mismatch: Term A, ``|R* - R|``.
        propagation: Term B, ``(1 - eta) |R|``.
        amplification: ``|Q|``.
    """

    error: float
    mismatch: float
    propagation: float
    amplification: float

    @property
    def limit(self) -> float:
        """The right side."""
        return (self.mismatch + self.propagation) * self.amplification


class WeightShiftBound(EditCallback):
    """Both sides of theorem 2, and how far ``M_l`` is from the identity that the sequential rule takes it for.

    The paper leaves the ideal residual R* open. Here it is the change of layer l's output that alone would remove what
    is missing, ``M_l^T (M_l M_l^T + damping I)^-1 R``, by conjugate gradients: directions that layer l can hardly move
    are not forced. Logs ``layer{l}/shift_error``, ``shift_limit``, ``mismatch``, ``propagation``, ``amplification`` and
    ``sensitivity`` (``|M_l - I|``, root mean square over random directions of ``|(M_l - I)^T v| / |v|``).

    Args:
        damping: 0 asks for all that is missing, which real models may not allow in finite precision.
        tolerance: Relative residual at which R* is taken.
        iterations: Most steps of conjugate gradients.
    """

    def __init__(self, damping: float = 0.01, tolerance: float = 1e-3, iterations: int = 500) -> None:
        self.damping, self.tolerance, self.iterations = damping, tolerance, iterations

    def on_layer_solved(self, module: L.LightningModule, edit: LayerEdit) -> None:
        """See ``EditCallback``."""
        size, layer = len(edit.residual), edit.context.site.layer
        assert edit.context.linear_map is not None
        module.log(f"layer{layer}/sensitivity", sensitivity(edit.context.linear_map, edit.residual)[0], batch_size=size)
        allocator: Any = module.allocator
        if not isinstance(allocator, ShareAllocator) or edit.update.left is not edit.problem.residual:
            return
        share = allocator.shares(edit.context.weights)[..., edit.context.index, None]
        bound = weight_shift_bound(edit, share, alone(edit, self.damping, self.tolerance, self.iterations))
        if bound.error > bound.limit * (1 + 1e-6):
            warnings.warn(f"layer {layer}: theorem 2 does not hold, {bound}", stacklevel=2)
        numbers = {"shift_error": bound.error, "shift_limit": bound.limit, "mismatch": bound.mismatch}
        numbers |= {"propagation": bound.propagation, "amplification": bound.amplification}
        module.log_dict({f"layer{layer}/{name}": value for name, value in numbers.items()}, batch_size=size)


def weight_shift_bound(edit: LayerEdit, share: Float[Tensor, "*n 1"], ideal: Float[Tensor, "n d_out"]) -> Bound:
    """Both sides of theorem 2 for a layer whose update is ``residual^T Q^T`` and whose ideal residual is ``ideal``."""
    amplifier = edit.update.right
    return Bound(
        error=_spectral((ideal - edit.problem.residual).T @ amplifier),
        mismatch=_spectral(ideal - edit.residual),
        propagation=_spectral((1 - share) * edit.residual),
        amplification=_spectral(amplifier),
    )


def alone(
    edit: LayerEdit, damping: float = 0.0, tolerance: float = 1e-3, iterations: int = 500
) -> Float[Tensor, "n d_out"]:
    """The smallest change of this layer's output that would remove what is missing at the value site by itself.

    Raises:
        NumericalError: If ``iterations`` steps do not reach the tolerance.
    """
    chain = edit.context.linear_map
    assert chain is not None

    def first_only(change: Tensor) -> list[Tensor]:
        others = edit.context.weights.shape[-1] - edit.context.index - 1
        return [change, *(torch.zeros_like(change) for _ in range(others))]

    def effect(covector: Tensor) -> Tensor:
        return chain.jvp(first_only(chain.vjp(covector)[0])) + damping * covector

    return chain.vjp(conjugate_gradients(effect, edit.residual, tolerance, iterations))[0]


def sensitivity(linear_map: LinearMap, like: Float[Tensor, "n d_out"], draws: int = 8) -> list[float]:
    """``|M_j - I|`` of every layer: root mean square of ``|(M_j - I)^T v| / |v|`` over facts and random directions.

    Args:
        linear_map: The layers.
        like: Gives n, d_out and the type.
        draws: Directions per fact.
    """
    generator, total = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64)
    for _ in range(draws):
        v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
        ratios = [((pulled - v).norm(dim=1) / v.norm(dim=1)).square().mean().cpu() for pulled in linear_map.vjp(v)]
        total = total + torch.stack(ratios)
    return [math.sqrt(value / draws) for value in total.tolist()]


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


class ScoreDrift(L.Callback):
    """How far edits move the causal scores themselves, ``sum_l |s_l(after) - s_l(before)|`` (CAKE eq. 57).

    Traces the same facts, known to the unedited model, before and after; logs ``score_drift``.

    Args:
        source: Facts, as for ``read_facts``.
        limit: Most facts to trace.
        trace: How.
        layers: Which layers; those of the module by default.
    """

    def __init__(
        self,
        source: str | list[Fact] = "builtin",
        limit: int = 50,
        trace: CausalTrace = CausalTrace(),
        layers: Sequence[int] = (),
    ) -> None:
        self.facts, self.limit, self.trace, self.layers = read_facts(source), limit, trace, layers
        self._rows: list[Any] = []
        self._before: Trace | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Trace the model as it is, once every request was checked."""
        module: Any = pl_module
        if batch_idx == 0:
            self._rows, _ = known_rows(module.lm, self.facts, self.limit)
            self._before = self.trace.run(module.lm, self._rows, self.layers or module.layers)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Trace it again, with the same noise."""
        module: Any = pl_module
        assert self._before is not None
        noise = self._before.settings["noise"]
        after = CausalTrace(**{**vars(self.trace), "noise": noise}).run(module.lm, self._rows, self._before.layers)
        pl_module.log("score_drift", score_drift(self._before, after))


def score_drift(before: Trace, after: Trace) -> float:
    """Sum over layers of the scores' absolute differences."""
    return float(sum(abs(after.scores[layer] - score) for layer, score in before.scores.items()))
