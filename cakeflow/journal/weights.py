"""The weights that edits change: what they were, what is added to them, and back; the only code that writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cakeflow.errors import NumericalError
from cakeflow.models.architecture import Site, is_transposed
from cakeflow.models.language import LanguageModel
from cakeflow.solvers.problem import Update
from cakeflow.storage.hashing import tensor_hash


class EditedWeights:
    """The touched weights of one model.

    The original of every touched weight is kept as it was: undoing restores it, because W + D - D is not W in floating
    point. Weights in half precision get a float32 master that collects the changes.

    Attributes:
        originals: Layer -> its weight before any edit, as the module has it.

    Args:
        lm: The model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.originals: dict[int, Tensor] = {}
        self._masters: dict[int, Tensor] = {}

    def hash(self, layer: int) -> str:
        """SHA-256 of a weight as it is now."""
        return tensor_hash(self.lm.weight(layer))

    def origin(self, layer: int) -> Tensor:
        """A weight before any edit, d_out x d_in."""
        if layer not in self.originals:
            return self.lm.oriented(layer)
        original = self.originals[layer].to(self.lm.weight(layer).device)
        return original.T if self._transposed(layer) else original

    def collected(self, layer: int) -> Tensor:
        """A weight now, d_out x d_in, with what rounding to half precision takes away."""
        master = self._masters.get(layer, self.lm.weight(layer)).detach()
        return master.T if self._transposed(layer) else master

    @torch.no_grad()
    def add(self, layer: int, update: Update) -> None:
        """Add a change.

        Raises:
            NumericalError: If the weight is not finite afterwards; it is left so, to be restored.
        """
        weight = self.lm.weight(layer)
        if layer not in self.originals:
            self.originals[layer] = weight.detach().cpu().clone()
        if weight.dtype in (torch.float16, torch.bfloat16) and layer not in self._masters:
            self._masters[layer] = weight.detach().float()
        master = self._masters.get(layer, weight)
        oriented = master.T if self._transposed(layer) else master
        for place, part in update.to(weight.device).rows():
            oriented[place] = oriented[place].double() + part  # one rounding per edit
        weight.copy_(master)
        if not torch.isfinite(weight).all():
            raise NumericalError(
                f"layer {layer}: the edited weight is not finite in {weight.dtype}; set ridge higher or load the model "
                "in float32"
            )

    def restore(self, layer: int) -> None:
        """Put a weight's original back, if it was touched."""
        if layer in self.originals:
            self._write(layer, self.originals[layer])
            self._masters.pop(layer, None)

    def forget(self, layer: int) -> None:
        """Take a weight, restored, for one that was never touched."""
        self.originals.pop(layer, None)
        self._masters.pop(layer, None)

    @contextmanager
    def reverted(self) -> Iterator[None]:
        """The unedited model for a while; then the edited one again, bit for bit."""
        edited = {layer: self.lm.weight(layer).detach().clone() for layer in self.originals}
        try:
            self._write_all(self.originals)
            yield
        finally:
            self._write_all(edited)

    def _write_all(self, weights: Mapping[int, Tensor]) -> None:
        for layer, weight in weights.items():
            self._write(layer, weight)

    @torch.no_grad()
    def _write(self, layer: int, weight: Tensor) -> None:
        self.lm.weight(layer).copy_(weight)

    def _transposed(self, layer: int) -> bool:
        return is_transposed(self.lm.module(Site(layer, "mlp_out")))
