"""The guard of a run: it asks a policy before the first edit, and judges the outcome."""

from __future__ import annotations

from typing import Any

import lightning as L

from cakeflow.errors import PolicyError, with_faults
from cakeflow.journal.policy import BROKEN, HELD, Policy
from cakeflow.journal.steps import with_completions


class PolicyGuard(L.Callback):
    """Enforces a policy: refuses a run that it forbids, and rolls back one whose outcome breaks it.

    From then on the model's journal obeys the policy before every batch, whoever makes it. Every decision becomes an
    entry of the run's ledger.

    Args:
        policy: The rules, or a YAML file of them.

    Raises:
        ConfigError: If the file cannot be read as a policy.
        PolicyError: While the Trainer runs, naming the broken rules; the model is as it was before the run.
    """

    def __init__(self, policy: Policy | str) -> None:
        self.policy = policy if isinstance(policy, Policy) else Policy.read(policy)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run before its model is measured."""
        if getattr(pl_module, "stage", "") == "before":
            self._begin(pl_module, trainer.val_dataloaders)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that was not measured first."""
        self._begin(pl_module, trainer.train_dataloader)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Judge the outcome, and roll the run back if it broke a rule."""
        after = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if pl_module.evaluated == len(pl_module.journal):  # else the metrics are those of an earlier batch
            after |= pl_module.metrics_at.get("after", {})
        faults = list(self.policy.violations(pl_module.metrics_at.get("before", {}), after))
        pl_module.journal.policies.record(self.policy, BROKEN if faults else HELD, faults)
        if faults:  # after the record: a crash in between leaves a run that is known to be broken
            pl_module.journal.rollback(len(with_completions(pl_module.journal[pl_module.first_step :])))
            raise PolicyError(with_faults("the policy is broken; the edits of this run were taken back:", faults))

    def _begin(self, module: Any, loader: Any) -> None:
        policies = module.journal.policies
        policies.begin([request for records in loader or () for request in records.requests])
        policies.start(self.policy)
