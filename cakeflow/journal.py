"""What was done to the weights: applied step by step, taken back bit for bit, written to disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from cakeflow.architecture import Site, is_transposed
from cakeflow.errors import NumericalError
from cakeflow.files import write_tensors, write_text
from cakeflow.history import KeyHistory
from cakeflow.model import LanguageModel
from cakeflow.problem import LayerProblem, Update
from cakeflow.request import EditRequest


@dataclass(frozen=True, eq=False)
class LayerStep:
    """What one batch did to one layer.

    Attributes:
        layer: Index of the block.
        keys: n x d_in, the keys that were used.
        update: The change, as factors where it has low rank.
        numbers: Share, residual and update norms, as logged.
    """

    layer: int
    keys: Tensor
    update: Update
    numbers: dict[str, float]


@dataclass(eq=False)
class EditStep:
    """What one edit batch did.

    Attributes:
        requests: The facts.
        layers: One entry per edited layer, in order.
        targets: Per request: loss, probability and steps of its target value.
        values: Anchor layer -> target values, n x d_out.
    """

    requests: tuple[EditRequest, ...]
    layers: list[LayerStep] = field(default_factory=list)
    targets: list[dict[str, float]] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)


class Journal(Sequence[EditStep]):
    """The committed edit batches of one model, oldest first, and the only code that changes its weights.

    Originals of every touched weight are kept as they were: undoing restores them, because W + D - D is not W in
    floating point. Weights in half precision get a float32 master that collects the changes.

    Args:
        lm: The model.
    """

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.steps: list[EditStep] = []
        self.originals: dict[int, Tensor] = {}
        self._masters: dict[int, Tensor] = {}
        self._history: dict[int, KeyHistory] = {}

    @overload
    def __getitem__(self, index: int) -> EditStep: ...
    @overload
    def __getitem__(self, index: slice) -> list[EditStep]: ...
    def __getitem__(self, index: int | slice) -> EditStep | list[EditStep]:
        return self.steps[index]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def edits(self) -> int:
        """Facts edited so far."""
        return sum(len(step.requests) for step in self.steps)

    def history(self, layer: int) -> KeyHistory:
        """Keys of all committed batches at a layer."""
        return self._history.setdefault(layer, KeyHistory())

    def origin(self, layer: int) -> Tensor:
        """The weight before any edit, d_out x d_in."""
        if layer not in self.originals:
            return self.lm.oriented(layer)
        original = self.originals[layer].to(self.lm.weight(layer).device)
        return original.T if self._transposed(layer) else original

    @contextmanager
    def batch(self, requests: Sequence[EditRequest]) -> Iterator[EditStep]:
        """A batch in the making: committed as a whole when the body ends, taken back as a whole if it raises."""
        step = EditStep(tuple(requests))
        try:
            yield step
        except BaseException:
            self._restore(len(self.steps), {part.layer for part in step.layers})
            raise
        self.steps.append(step)
        self._remember(step)

    @contextmanager
    def trial(self) -> Iterator[EditStep]:
        """A batch that is taken back when the body ends; for layers that no open batch wrote."""
        step = EditStep(())
        try:
            yield step
        finally:
            self._restore(len(self.steps), {part.layer for part in step.layers})

    def apply(self, step: EditStep, layer: int, problem: LayerProblem, update: Update) -> dict[str, float]:
        """Add an update to a layer's weight and note it in the step.

        Returns:
            Numbers to log: norms of the residual and of the update, alone and relative to the weight.

        Raises:
            NumericalError: If the edited weight is not finite.
        """
        norm, residual = update.norm(), float(problem.residual.norm(dim=1).mean())
        weight = float(torch.linalg.vector_norm(problem.weight, dtype=torch.float64))
        numbers = {"residual": residual, "update": norm, "relative_update": norm / weight}
        step.layers.append(LayerStep(layer, problem.keys.cpu(), update.to("cpu"), numbers))
        self._add(layer, update)
        return numbers

    def settle(self, step: EditStep) -> bool:
        """Put what is to be kept of each change in the change's place; whether there was any such change."""
        chosen = [index for index, part in enumerate(step.layers) if part.update.kept is not None]
        for index in chosen:
            part = step.layers[index]
            self._restore(len(self.steps), {part.layer})
            kept = part.update.kept
            assert kept is not None
            self._add(part.layer, kept)
            numbers = part.numbers | {"update": kept.norm()}
            step.layers[index] = replace(part, update=kept, numbers=numbers)
        return bool(chosen)

    def finish(self, rule: Callable[[Tensor, Tensor], Tensor]) -> None:
        """End a run: a step without requests for the layers whose weight a rule changes.

        Args:
            rule: Takes a weight before any edit and now, d_out x d_in; gives what it becomes, or the latter as it is.
        """
        changes: dict[int, Tensor] = {}
        for layer in sorted({part.layer for step in self.steps for part in step.layers}):
            master = self._masters.get(layer, self.lm.weight(layer)).detach()
            now = master.T if self._transposed(layer) else master
            wanted = rule(self.origin(layer), now)
            if wanted is not now:
                changes[layer] = wanted.double() - now
        if changes:
            with self.batch(()) as step:
                for layer, change in changes.items():
                    update = Update(change.cpu())
                    step.layers.append(LayerStep(layer, update.right[:0], update, {"update": update.norm()}))
                    self._add(layer, update)

    def rollback(self, steps: int | None = None) -> None:
        """Take back the last ``steps`` batches (default: all), bit for bit."""
        kept = 0 if steps is None else max(0, len(self.steps) - steps)
        self._restore(kept, set(self.originals))
        del self.steps[kept:]
        self._history.clear()
        for step in self.steps:
            self._remember(step)

    @contextmanager
    def reverted(self) -> Iterator[None]:
        """The unedited model for a while; then the edited one again, bit for bit."""
        edited = {layer: self.lm.weight(layer).detach().clone() for layer in self.originals}
        try:
            for layer in edited:
                self._write(layer, self.originals[layer])
            yield
        finally:
            for layer, weight in edited.items():
                self._write(layer, weight)

    @torch.no_grad()
    def _write(self, layer: int, weight: Tensor) -> None:
        self.lm.weight(layer).copy_(weight)

    def save(self, folder: Path) -> None:
        """Write the originals, every step's factors and keys, and a line of JSON per step."""
        write_tensors(folder / "originals.safetensors", {str(layer): w for layer, w in self.originals.items()})
        lines = []
        for number, step in enumerate(self.steps):
            name = f"step-{number:05d}.safetensors"
            write_tensors(folder / name, _tensors(step))
            lines.append(json.dumps(_summary(step, name), ensure_ascii=False))
        write_text(folder / "journal.jsonl", "".join(line + "\n" for line in lines))

    def _transposed(self, layer: int) -> bool:
        return is_transposed(self.lm.module(Site(layer, "mlp_out")))

    def _remember(self, step: EditStep) -> None:
        """Add a step's keys to the histories; those at a run's end have none."""
        for part in step.layers if step.requests else ():
            self.history(part.layer).append(part.keys.to(self.lm.device))

    @torch.no_grad()
    def _add(self, layer: int, update: Update) -> None:
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

    @torch.no_grad()
    def _restore(self, kept: int, layers: set[int]) -> None:
        """The weights of ``layers`` as they were after the first ``kept`` steps: originals, then the same additions."""
        for layer in layers & set(self.originals):
            self._write(layer, self.originals[layer])
            self._masters.pop(layer, None)
            for step in self.steps[:kept]:
                for part in step.layers:
                    if part.layer == layer:
                        self._add(layer, part.update)


def _tensors(step: EditStep) -> dict[str, Tensor]:
    tensors = {f"{layer}/target": values for layer, values in step.values.items()}
    for part in step.layers:
        tensors |= {f"{part.layer}/keys": part.keys, f"{part.layer}/right": part.update.right}
        if part.update.left is not None:
            tensors[f"{part.layer}/left"] = part.update.left
    return tensors


def _summary(step: EditStep, name: str) -> dict[str, Any]:
    return {
        "file": name,
        "requests": [request.to_dict() for request in step.requests],
        "targets": step.targets,
        "layers": {part.layer: part.numbers for part in step.layers},
    }
