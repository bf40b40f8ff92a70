"""Health of a model along a stream of edits: fine, wearing or broken, from measured quantities."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.callbacks.neutral_text import NeutralText
from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.data.request import EditRequest
from cakeflow.data.sources import Source
from cakeflow.errors import ConfigError, SideEffectWarning, did_you_mean, listed, require_count
from cakeflow.evaluation.scoring import score_records
from cakeflow.journal.steps import facts_in_force, facts_on_record
from cakeflow.models.architecture import Site

log = logging.getLogger(__name__)

Limits = Mapping[str, tuple[float, float]]
"""Quantity -> the bounds of fine and of wearing; a pair that falls bounds from below, one that rises from above."""
STATES = ("fine", "wearing", "broken")
"""The states, by the number that is logged as ``health/state``."""
LIMITS: Limits = {
    "taken": (0.8, 0.6),
    "retention": (0.9, 0.8),
    "kl": (0.4, 1.0),
    "change": (0.05, math.inf),
    "growth": (1.5, math.inf),
}
"""The default limits, chosen on SmolLM2-135M; see ``benchmarks/README.md``, "Health along a stream".

A large change of a weight alone is wear and no breakage: BLUE changes one layer much, and states all that was asked.
"""


class StreamHealth(PeriodicCallback):
    """Says along a stream of edits whether the model is fine, wearing or broken.

    Logs ``health/state``, 0, 1 or 2, which is the worst of:

    - ``health/taken``: share of the last batch's facts that the model states word for word, all tokens of the target
      arg-max after the bare prompt.
    - ``health/retention``: the same share of the first facts of the stream. A fact that was edited again counts with
      its last target, one that was taken back does not count.
    - ``health/kl``: divergence on neutral text from the unedited model, in nats (``NeutralText``).
    - ``health/layer{l}/change``: tr(D C D^T) / tr(W_0 C W_0^T), the mean squared change of the projection's output on
      ordinary text over that of the output; D is the whole change of the weight so far, C the layer's second moment.
    - ``health/layer{l}/growth``: |W| / |W_0|, Frobenius norms (norm growth: Gupta et al. 2025, "Lifelong Sequential
      Knowledge Editing without Model Degradation").

    The last two are those of ``LocateThenEdit`` alone. A number that is not finite is broken. A worse state is a
    ``SideEffectWarning`` that names the reasons. A policy with ``maximum: {health/state: 1}`` takes back a run that
    ends broken.

    Args:
        limits: Quantity -> limits, in place of those of ``LIMITS``.
        first: Number of facts from the start of the stream whose retention is measured.
        every: Number of batches between measurements; None measures at both ends of a run only.
        source: Source of neutral text, as for ``NeutralText``.
        tokens: Number of its tokens.
        stop: Whether a stream that is broken ends there, after the batch. Its edits stay unless a policy, or
            ``rollback``, takes them back.

    Raises:
        ConfigError: If a limit is of no quantity or no pair, or a number is out of range.
    """

    name = "health"

    def __init__(
        self,
        limits: dict[str, tuple[float, float]] | None = None,
        first: int = 100,
        every: int | None = 1,
        source: Source | None = None,
        tokens: int = 4096,
        stop: bool = False,
    ) -> None:
        super().__init__(every)
        require_count("first", first, 1)
        for name, pair in (limits or {}).items():
            _check_limit(name, pair)
        self.limits: Limits = {**LIMITS, **(limits or {})}
        self.first, self.stop = first, stop
        self._text, self._state = NeutralText(source, tokens), 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the neutral text, so that a bad source stops the run at once."""
        self._text.on_fit_start(trainer, pl_module)
        self._state = 0

    @torch.no_grad()
    def measure(self, module: Any) -> dict[str, float]:
        """Return the quantities and the state of the model as it is now; say so where it got worse."""
        numbers = {**self._answers(module), "kl": self._text.measure(module)["kl"], **_weights(module)}
        state, reasons = judge(numbers, self.limits)
        log.info("health after %d edits: %s", module.journal.edits, STATES[state])
        if state > self._state:
            warnings.warn(
                f"after {module.journal.edits} edits the model is {STATES[state]}: {listed(reasons)}; end the stream, "
                "take the last batches back, or use a recipe with a history, more second moments or a smaller clamp",
                SideEffectWarning,
                stacklevel=2,
            )
        self._state = state
        if self.stop and STATES[state] == "broken":
            module.trainer.should_stop = True
        return {**numbers, "state": float(state)}

    def _answers(self, module: Any) -> dict[str, float]:
        """Return the shares of the last and of the first facts that the model states; nothing without facts."""
        record = [(s.number, s.hashes[i], s.requests[i]) for s, i in facts_on_record(module.journal) if s.requests]
        in_force = {step.hashes[i] for step, i in facts_in_force(module.journal)}
        batches, newest = dict[str, int](), dict[str, tuple[str, EditRequest] | None]()
        for number, name, request in record:
            batches.setdefault(name, number)  # a fact belongs to the batch that wrote it first, not to a repair
            newest[request.text] = (name, request) if name in in_force else newest.get(request.text)
        facts = [each for each in newest.values() if each]
        if not facts:
            return {}
        number = max(batches[name] for name, _ in facts)
        last = [replace(request, probes=()) for name, request in facts if batches[name] == number]
        first = [replace(request, probes=()) for _, request in facts[: self.first]]
        correct = score_records(module.lm, last + first, max_bytes=module.max_bytes).correct.double()
        return {"taken": float(correct[: len(last)].mean()), "retention": float(correct[len(last) :].mean())}


def judge(numbers: Mapping[str, float], limits: Limits = LIMITS) -> tuple[int, list[str]]:
    """Return the state that quantities are in, and the reasons why it is not fine.

    Args:
        numbers: Quantity, or ``layer{l}/{quantity}``, to its value; a layer's counts where it is the worst one.
        limits: The limits.

    Example:
        >>> judge({"kl": 0.5, "layer3/growth": 1.1, "layer4/growth": 1.6})
        (1, ['kl is 0.5, must be at most 0.4', 'growth is 1.6, must be at most 1.5'])
    """
    values = worst(numbers)
    states = {name: _state(values[name], pair) for name, pair in limits.items() if name in values}
    state = max(states.values(), default=0)
    reasons = []
    for name in (name for name, each in states.items() if each == state > 0):
        low, bound = limits[name][0] > limits[name][1], limits[name][state - 1]
        reasons.append(f"{name} is {values[name]:.4g}, must be at {'least' if low else 'most'} {bound:.4g}")
    return state, reasons


def worst(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the quantities by name: of layers the largest value, or nan if there is one."""
    groups: dict[str, list[float]] = {}
    for key, value in numbers.items():
        groups.setdefault(key.rpartition("/")[2], []).append(value)
    return {name: float(torch.tensor(each, dtype=torch.float64).max()) for name, each in groups.items()}


def _state(value: float, pair: tuple[float, float]) -> int:
    """Return the number of limits that a value is beyond; all of them if it is not finite."""
    sign = 1 if pair[0] < pair[1] else -1
    return sum(not (math.isfinite(value) and sign * value <= sign * bound) for bound in pair)


def _weights(module: Any) -> dict[str, float]:
    """Return change and growth of every edited weight; nothing of a method that has no second moments."""
    numbers: dict[str, float] = {}
    for layer in module.layers if isinstance(module, LocateThenEdit) else ():
        name = module.lm.weight_name(Site(layer, module.site))
        weight = module.lm.oriented(name, module.lm.masters.get(name)).detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))  # float16 would overflow
        original = module.original_weight(name).to(weight)
        moment = module.covariances[layer].to(weight.device).moment.to(weight.dtype)
        change = _energy(weight - original, moment) / _energy(original, moment)
        growth = float(weight.norm() / original.norm())
        numbers |= {f"layer{layer}/change": change, f"layer{layer}/growth": growth}
    return numbers


def _energy(matrix: Float[Tensor, "d_out d_in"], moment: Float[Tensor, "d_in d_in"]) -> float:
    """Return tr(M C M^T), the mean of |M k|^2 over the keys k of C."""
    return float(((matrix @ moment) * matrix).sum(dtype=torch.float64))


def _check_limit(name: str, pair: object) -> None:
    if name not in LIMITS:
        raise ConfigError(f"no quantity {name!r} to limit; there are {', '.join(LIMITS)}{did_you_mean(name, LIMITS)}")
    numbers = list(pair) if isinstance(pair, (list, tuple)) else []
    falls = LIMITS[name][0] > LIMITS[name][1]
    if len(numbers) != 2 or not (numbers[0] > numbers[1] if falls else numbers[0] < numbers[1]):
        order = "larger" if falls else "smaller"
        raise ConfigError(f"limits.{name} must be two numbers, that of fine {order} than that of wearing; got {pair!r}")
