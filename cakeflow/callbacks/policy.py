"""A policy file: what may be edited, and what must hold afterwards, or else the edits are taken back."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, PolicyError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """Rules for the edits of a run. CAKE's authors ask for such guards around any model editor (ethics statement).

    Attributes:
        models: Names or fingerprints of the models that may be edited; any model where there are none.
        max_edits: Most facts in a run.
        denied_subjects: Regular expressions; a subject in which one is found may not be edited.
        minimum: Metric -> the least value after the edits: ``efficacy`` and so on, of 1, or anything that was logged.
        maximum: Metric -> the largest value, such as ``neutral/kl``.
        max_drop: Metric -> by how much it may fall below its value before the edits.

    Raises:
        ConfigError: If a rule is not of its form.
    """

    models: tuple[str, ...] = ()
    max_edits: int | None = None
    denied_subjects: tuple[str, ...] = ()
    minimum: Mapping[str, float] = field(default_factory=dict)
    maximum: Mapping[str, float] = field(default_factory=dict)
    max_drop: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("models", "denied_subjects"):
            _require(name, getattr(self, name), "a list of texts", _are_texts)
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("minimum", "maximum", "max_drop"):
            _require(name, getattr(self, name), "a mapping from metrics to numbers", _are_numbers)
        _require("max_edits", self.max_edits, "a number of facts above 0", _is_count)
        for pattern in self.denied_subjects:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"policy, denied_subjects: {pattern!r} is no regular expression: {error}") from error

    @classmethod
    def read(cls, path: str | Path) -> Policy:
        """Read a YAML file.

        Raises:
            ConfigError: If it is missing, no YAML, or has unknown rules.
        """
        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"policy {str(path)!r} cannot be read: {error}") from error
        known = [each.name for each in fields(cls)]
        if not isinstance(found, dict) or (unknown := [name for name in found if name not in known]):
            what = f"unknown rule {unknown[0]!r}" if isinstance(found, dict) else f"expected rules, found {found!r}"
            raise ConfigError(f"policy {str(path)!r}: {what}; rules are {', '.join(known)}")
        return cls(**found)

    @property
    def hash(self) -> str:
        """SHA-256 of the rules."""
        return hashlib.sha256(repr(asdict(self)).encode()).hexdigest()

    def refusals(self, names: Sequence[str], requests: Sequence[EditRequest]) -> Iterator[str]:
        """Why these facts may not be edited in this model.

        Args:
            names: The model's name and fingerprint.
            requests: All facts of the run.
        """
        if self.models and not set(names) & set(self.models):
            yield f"model {names[0]!r} may not be edited, only {', '.join(self.models)}"
        if self.max_edits is not None and len(requests) > self.max_edits:
            yield f"{len(requests)} edits in a run, at most {self.max_edits} are allowed"
        for index, request in enumerate(requests):
            if found := [pattern for pattern in self.denied_subjects if re.search(pattern, request.subject)]:
                yield f"entry {index}, subject = {request.subject!r}: denied by {found[0]!r}"

    def violations(self, before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
        """What does not hold after the edits; what was not measured does not hold."""
        unknown = {name: float("nan") for rules in (self.minimum, self.maximum, self.max_drop) for name in rules}
        before, after = {**unknown, **before}, {**unknown, **after}
        for name in unknown:
            if after[name] != after[name]:
                yield f"{name} was not measured after the last edit"
            elif after[name] < self.minimum.get(name, float("-inf")):
                yield f"{name} is {after[name]:.4g}, must be at least {self.minimum[name]:.4g}"
            elif after[name] > self.maximum.get(name, float("inf")):
                yield f"{name} is {after[name]:.4g}, must be at most {self.maximum[name]:.4g}"
            elif name in self.max_drop and not before[name] - after[name] <= self.max_drop[name]:
                change = f"went from {before[name]:.4g} to {after[name]:.4g}"
                yield f"{name} {change}, may fall by at most {self.max_drop[name]:.4g}"


class PolicyGuard(L.Callback):
    """Enforces a policy: refuses a run that it forbids, and takes back one whose outcome breaks it.

    What it did becomes an entry of the run's ledger.

    Args:
        policy: The rules, or a YAML file with them.

    Raises:
        ConfigError: If the file cannot be read as a policy.
        PolicyError: While the Trainer runs: for every rule that is broken; the model is as it was before the run.
    """

    def __init__(self, policy: Policy | str) -> None:
        self.policy = policy if isinstance(policy, Policy) else Policy.read(policy)
        self._first = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run before its model is measured."""
        if getattr(pl_module, "stage", "") == "before":
            self._require_permission(pl_module, trainer.val_dataloaders)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that was not measured first."""
        self._require_permission(pl_module, trainer.train_dataloader)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: object, batch_idx: int) -> None:
        """Note where the run begins."""
        if batch_idx == 0:
            self._first = len(pl_module.journal)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Take back what broke a rule."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        after = (
            logged if pl_module.evaluated != len(pl_module.journal) else logged | pl_module.measured.get("after", {})
        )
        faults = list(self.policy.violations(pl_module.measured.get("before", {}), after))
        if faults:
            pl_module.journal.rollback(len(pl_module.journal) - self._first)
        self._tell(pl_module, "broken, taken back" if faults else "held", faults)

    def _require_permission(self, module: Any, loader: Any) -> None:
        requests = [request for records in loader or () for request in records.requests]
        refusals = list(self.policy.refusals([module.name, module.journal.base["fingerprint"]], requests))
        if refusals:
            self._tell(module, "refused", refusals)

    def _tell(self, module: Any, what: str, faults: list[str]) -> None:
        log.log(logging.WARNING if faults else logging.INFO, "policy %s %s", what, "; ".join(faults))
        if module.journal.record:
            module.journal.record.append("policy", {"outcome": what, "faults": faults, "policy": self.policy.hash})
        if faults:
            state = "nothing was changed" if what == "refused" else "the edits of this run were taken back"
            raise PolicyError("\n  ".join([f"the policy is not kept; {state}:", *faults]))


def _require(name: str, value: object, form: str, check: Any) -> None:
    if not check(value):
        raise ConfigError(f"policy, {name} = {value!r}: expected {form}")


def _are_texts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and type(each) in (int, float) and each == each for name, each in value.items()
    )


def _is_count(value: object) -> bool:
    return value is None or (type(value) is int and value > 0)
