"""Rules for the edits of a run: what may be edited, and the metrics that must hold afterwards."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cakeflow.core.callback import EditCallback
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, PolicyError
from cakeflow.journal.schema import PolicyBody
from cakeflow.storage.typed import first_fault

log = logging.getLogger(__name__)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return text


Texts = Annotated[tuple[str, ...], Field(strict=False)]
"""A tuple of texts; YAML gives a list."""
Patterns = Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], Field(strict=False)]
Bounds = dict[str, Annotated[float, Field(ge=-math.inf)]]
"""Metric -> bound; nan is refused, because every metric would pass it."""


class Policy(BaseModel):
    """Rules for the edits of a run. CAKE's authors ask for such guards around any model editor (ethics statement).

    Attributes:
        models: Names or fingerprints of the models that may be edited; empty for any model.
        max_edits: Largest number of facts in a run.
        denied_subjects: Regular expressions; a subject in which one matches may not be edited.
        minimum: Metric -> its least value after the edits: ``efficacy`` and so on, at most 1, or anything logged.
        maximum: Metric -> its largest value after the edits, for example ``neutral/kl``.
        max_drop: Metric -> the most by which it may fall below its value before the edits.

    Raises:
        ConfigError: If a rule is unknown or its value is not of the right type.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    models: Texts = ()
    max_edits: Annotated[int, Field(gt=0)] | None = None
    denied_subjects: Patterns = ()
    minimum: Bounds = {}
    maximum: Bounds = {}
    max_drop: Bounds = {}

    def __init__(self, **rules: Any) -> None:
        try:  # not in a validator: ConfigError is a ValueError, which pydantic would wrap in its own error
            super().__init__(**rules)
        except ValidationError as invalid:
            raise ConfigError(
                f"policy, {first_fault(invalid)}; rules are {', '.join(type(self).model_fields)}"
            ) from invalid

    @classmethod
    def read(cls, path: str | Path) -> Policy:
        """Read a YAML file.

        Raises:
            ConfigError: If it is missing, no YAML, or has unknown rules.
        """
        try:
            rules = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"policy {str(path)!r} cannot be read: {error}") from error
        if not isinstance(rules, dict):
            raise ConfigError(f"policy {str(path)!r}: expected rules ({', '.join(cls.model_fields)}), got {rules!r}")
        try:
            return cls(**{str(name): value for name, value in rules.items()})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def hash(self) -> str:
        """SHA-256 of the rules."""
        return hashlib.sha256(repr(self.model_dump()).encode()).hexdigest()

    def refusals(self, names: Sequence[str], requests: Sequence[EditRequest]) -> Iterator[str]:
        """Yield the reasons why these facts may not be edited in this model.

        Args:
            names: Name and fingerprint of the model.
            requests: All facts of the run.
        """
        if self.models and not set(names) & set(self.models):
            yield f"model {names[0]!r} may not be edited, only {', '.join(self.models)}"
        if self.max_edits is not None and len(requests) > self.max_edits:
            yield f"{len(requests)} edits in a run, at most {self.max_edits} are allowed"
        for index, request in enumerate(requests):
            if matches := [pattern for pattern in self.denied_subjects if re.search(pattern, request.subject)]:
                yield f"entry {index}, subject = {request.subject!r}: denied by {matches[0]!r}"

    def violations(self, before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
        """Yield the rules that are broken after the edits; a rule about a metric that was not measured is broken."""
        unmeasured = {name: math.nan for rules in (self.minimum, self.maximum, self.max_drop) for name in rules}
        before, after = {**unmeasured, **before}, {**unmeasured, **after}
        for name in unmeasured:
            if math.isnan(after[name]):
                yield f"{name} was not measured after the last edit"
            elif after[name] < self.minimum.get(name, -math.inf):
                yield f"{name} is {after[name]:.4g}, must be at least {self.minimum[name]:.4g}"
            elif after[name] > self.maximum.get(name, math.inf):
                yield f"{name} is {after[name]:.4g}, must be at most {self.maximum[name]:.4g}"
            elif name in self.max_drop and not before[name] - after[name] <= self.max_drop[name]:
                change = f"went from {before[name]:.4g} to {after[name]:.4g}"
                yield f"{name} {change}, may fall by at most {self.max_drop[name]:.4g}"


class PolicyGuard(EditCallback):
    """Enforces a policy: refuses a run that it forbids, and rolls back one whose outcome breaks it.

    The decision becomes an entry of the run's ledger.

    Args:
        policy: The rules, or a YAML file of them.

    Raises:
        ConfigError: If the file cannot be read as a policy.
        PolicyError: While the Trainer runs, naming every broken rule; the model is as it was before the run.
    """

    def __init__(self, policy: Policy | str) -> None:
        self.policy = policy if isinstance(policy, Policy) else Policy.read(policy)
        self._first = 0

    def inputs(self) -> dict[str, str]:
        """The hash of the rules."""
        return {"policy": self.policy.hash}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run before its model is measured."""
        if getattr(pl_module, "stage", "") == "before":
            self._require_permission(pl_module, trainer.val_dataloaders)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that was not measured first."""
        self._require_permission(pl_module, trainer.train_dataloader)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: object, batch_idx: int) -> None:
        """Remember the number of batches before the run."""
        if batch_idx == 0:
            self._first = len(pl_module.journal)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Roll the run back if it broke a rule."""
        after = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if pl_module.evaluated == len(pl_module.journal):  # else the metrics are those of an earlier batch
            after |= pl_module.metrics_at.get("after", {})
        faults = list(self.policy.violations(pl_module.metrics_at.get("before", {}), after))
        if faults:
            pl_module.journal.rollback(len(pl_module.journal) - self._first)
        self._decide(pl_module, "broken, taken back" if faults else "held", faults)

    def _require_permission(self, module: Any, loader: Any) -> None:
        requests = [request for records in loader or () for request in records.requests]
        refusals = list(self.policy.refusals([module.name, module.journal.base.fingerprint], requests))
        if refusals:
            self._decide(module, "refused", refusals)

    def _decide(self, module: Any, outcome: str, faults: list[str]) -> None:
        """Write the outcome to the log and the ledger; raise the faults."""
        log.log(logging.WARNING if faults else logging.INFO, "policy %s %s", outcome, "; ".join(faults))
        if module.journal.store:
            module.journal.store.append(PolicyBody(outcome=outcome, faults=faults, policy=self.policy.hash))
        if faults:
            state = "nothing was changed" if outcome == "refused" else "the edits of this run were taken back"
            raise PolicyError("\n  ".join([f"the policy is broken; {state}:", *faults]))
