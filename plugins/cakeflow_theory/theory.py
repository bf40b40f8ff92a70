"""Measurements of CAKE's theory: deviations of edits from the linear model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.allocators import LinearMap, ShareAllocator, conjugate_gradients
from cakeflow.core import EditCallback, LayerEdit, LocateThenEdit
from cakeflow.errors import NumericalError, require_count
from cakeflow.forward import Row
from cakeflow.tracing import CausalTrace, Fact, Trace, known_rows, read_facts


class ResidualDrift(EditCallback):
    """Difference between a layer's effect at the value site and its share (CAKE appendix B.5, eq. 51-56).

    Logs ``layer{l}/drift``, the mean over facts of ``|(R_before - R_after) - share|``, and ``drift``, their sum over
    layers. Methods with a target at each layer (``residual_at="self"``) have no common residual and are skipped.
    """

    def __init__(self) -> None:
        self._edits: list[LayerEdit] = []

    def on_layer_solved(self, module: LocateThenEdit, edit: LayerEdit) -> None:
        """Collect the layer's edit; those of a batch that failed are dropped."""
        self._edits = [*(self._edits if edit.context.index else ()), edit]

    def on_batch_edited(self, module: LocateThenEdit, remaining: Float[Tensor, "n d_out"]) -> None:
        """Log the drift of every layer of the batch."""
        edits, self._edits = self._edits, []
        if len({edit.context.value_site for edit in edits}) > 1:
            return
        after = [
            *(edit.residual for edit in edits[1:]),
            remaining,
        ]  # the residual after a layer is that before the next
        drifts = {edit.context.site.layer: drift(edit, rest) for edit, rest in zip(edits, after, strict=True)}
        for layer, value in drifts.items():
            module.log(f"layer{layer}/drift", value, batch_size=len(remaining))
        module.log("drift", sum(drifts.values()), batch_size=len(remaining))


def drift(edit: LayerEdit, after: Float[Tensor, "n d_out"]) -> float:
    """Compute the mean over facts of ``|actual - expected|`` reduction of the residual (CAKE eq. 53-55)."""
    return float((edit.residual - after - edit.share).norm(dim=1).mean())


@dataclass(frozen=True)
class Bound:
    """Theorem 2 at one layer (CAKE eq. 7): ``error <= (mismatch + propagation) * amplification``.

    Attributes:
        error: ``|Delta* - Delta|``, spectral norm; Delta* writes the residual R* that suffices at this layer alone.
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
        """Right side of the inequality."""
        return (self.mismatch + self.propagation) * self.amplification


class WeightShiftBound(EditCallback):
    """Both sides of theorem 2, and the distance of ``M_l`` from the identity that the sequential rule assumes.

    The paper leaves the ideal residual R* open. Here it is the change of layer l's output that alone would remove the
    residual, ``M_l^T (M_l M_l^T + damping I)^-1 R``, by conjugate gradients: directions that layer l can hardly move
    are not forced. Logs ``layer{l}/shift_error``, ``shift_limit``, ``mismatch``, ``propagation``, ``amplification`` and
    ``sensitivity`` (``|M_l - I|``, root mean square over random directions of ``|(M_l - I)^T v| / |v|``).

    Args:
        damping: Damping of the system; 0 demands the whole residual, which real models may not allow in finite
            precision.
        tolerance: Relative residual at which the system counts as solved.
        iterations: Largest number of steps of conjugate gradients.
    """

    def __init__(self, damping: float = 0.01, tolerance: float = 1e-3, iterations: int = 500) -> None:
        self.damping, self.tolerance, self.iterations = damping, tolerance, iterations

    def on_layer_solved(self, module: LocateThenEdit, edit: LayerEdit) -> None:
        """Log the terms of the theorem; the bound itself needs an update that is linear in the residual."""
        assert edit.context.linear_map is not None
        size, layer = len(edit.residual), edit.context.site.layer
        module.log(f"layer{layer}/sensitivity", sensitivity(edit.context.linear_map, edit.residual)[0], batch_size=size)
        if not isinstance(module.allocator, ShareAllocator) or not edit.update.is_plain:
            return
        if not torch.equal(edit.share, edit.problem.residual):  # the theorem knows no norm or factor behind a layer
            return
        share = module.allocator.shares(edit.context.weights)[..., edit.context.index, None]
        bound = weight_shift_bound(edit, share, alone(edit, self.damping, self.tolerance, self.iterations))
        if bound.error > bound.limit * (1 + 1e-6):
            warnings.warn(f"layer {layer}: theorem 2 does not hold, {bound}", stacklevel=2)
        numbers = {"shift_error": bound.error, "shift_limit": bound.limit, "mismatch": bound.mismatch}
        numbers |= {"propagation": bound.propagation, "amplification": bound.amplification}
        module.log_dict({f"layer{layer}/{name}": value for name, value in numbers.items()}, batch_size=size)


def weight_shift_bound(edit: LayerEdit, share: Float[Tensor, "*n 1"], ideal: Float[Tensor, "n d_out"]) -> Bound:
    """Compute both sides of theorem 2 for an update ``residual^T Q^T`` and the ideal residual of its layer."""
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
    """Compute the smallest change of this layer's output that alone removes the residual at the value site.

    Raises:
        NumericalError: If ``iterations`` steps do not reach the tolerance.
    """
    linear_map = edit.context.linear_map
    assert linear_map is not None

    def first_only(change: Tensor) -> list[Tensor]:
        others = edit.context.weights.shape[-1] - edit.context.index - 1
        return [change, *(torch.zeros_like(change) for _ in range(others))]

    def effect(covector: Tensor) -> Tensor:
        return linear_map.jvp(first_only(linear_map.vjp(covector)[0])) + damping * covector

    solution = conjugate_gradients(effect, edit.residual, tolerance, iterations)
    if bool((solution.residual > tolerance).any()):
        raise NumericalError(
            f"layer {edit.context.site.layer}: the residual cannot be removed by this layer alone: a relative residual "
            f"of {float(solution.residual.max()):.1e} is left after {iterations} steps; set damping higher"
        )
    return linear_map.vjp(solution.value)[0]


def sensitivity(linear_map: LinearMap, like: Float[Tensor, "n d_out"], draws: int = 8) -> list[float]:
    """Estimate ``|M_j - I|`` of every layer: root mean square of ``|(M_j - I)^T v| / |v|`` over random directions v.

    Args:
        linear_map: The map from the layers to the value site.
        like: Tensor with the shape, type and device of v.
        draws: Number of directions per fact.
    """
    generator, total = torch.Generator().manual_seed(0), torch.zeros((), dtype=torch.float64)
    for _ in range(draws):
        v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
        ratios = [((part - v).norm(dim=1) / v.norm(dim=1)).square().mean().cpu() for part in linear_map.vjp(v)]
        total = total + torch.stack(ratios)
    return [math.sqrt(value / draws) for value in total.tolist()]


def _spectral(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


class ScoreDrift(L.Callback):
    """Change of the causal scores by edits, ``sum_l |s_l(after) - s_l(before)|`` (CAKE eq. 57).

    Traces facts that the unedited model knows, before and after the edits; logs ``score_drift``.

    Args:
        source: Facts, as for ``read_facts``.
        limit: Largest number of facts to trace.
        trace: Settings of the traces.
        layers: Layers to trace; by default those of the module.
    """

    def __init__(
        self,
        source: str | list[Fact] = "builtin",
        limit: int = 50,
        trace: CausalTrace = CausalTrace(),
        layers: Sequence[int] = (),
    ) -> None:
        require_count("ScoreDrift.limit", limit, 1)
        self.facts, self.limit, self.trace, self.layers = read_facts(source), limit, trace, layers
        self._rows: list[Row] = []
        self._before: Trace | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Trace the unedited model, after the checks of all requests."""
        assert isinstance(pl_module, LocateThenEdit)
        if batch_idx == 0:
            with pl_module.journal.reverted():
                self._rows, _ = known_rows(pl_module.lm, self.facts, self.limit, max_bytes=pl_module.max_bytes)
                self._before = self.trace.within(pl_module.max_bytes).run(
                    pl_module.lm, self._rows, self.layers or pl_module.layers
                )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Trace the edited model with the same noise."""
        assert isinstance(pl_module, LocateThenEdit)
        assert self._before is not None
        trace = replace(self.trace.within(pl_module.max_bytes), noise=self._before.settings["noise"])
        after = trace.run(pl_module.lm, self._rows, self._before.layers)
        pl_module.log("score_drift", score_drift(self._before, after))


def score_drift(before: Trace, after: Trace) -> float:
    """Sum the absolute differences of the scores over the layers."""
    return float(sum(abs(after.scores[layer] - score) for layer, score in before.scores.items()))
