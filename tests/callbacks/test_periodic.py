"""Measurements along a stream of edits: when they are made, and where they are logged."""

import csv

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger

from cakeflow import EditDataModule
from cakeflow.callbacks import KnowledgeCheck, NeighborShift, NeutralText, PeriodicCallback, PolicyGuard
from cakeflow.core import run_evaluate
from cakeflow.errors import ConfigError, PolicyError
from cakeflow.journal import Policy
from cakeflow.models import Site

from .conftest import FACTS, fit


class Steps(PeriodicCallback):
    """Counts the batches so far."""

    name = "steps"

    def measure(self, module):
        return {
            "batches": float(len(module.journal)),
            "first": float(module.lm.weight(Site(1, "mlp_out")).detach().sum()),
        }


@pytest.mark.parametrize(
    ("every", "size", "expected"),
    [(1, 1, [0, 1, 2, 3, 4, 5]), (2, 1, [0, 2, 4, 5]), (2, 2, [0, 4, 5]), (9, 1, [0, 5]), (1, 5, [0, 5])],
)
def test_measurements_come_first_every_few_batches_and_last(lm, quiet, tmp_path, every, size, expected):
    """The unedited model, every few batches, and the end, once each; logged at the number of batches."""
    steps, logger = Steps(every), CSVLogger(tmp_path)
    before = float(lm.weight(Site(1, "mlp_out")).detach().sum())
    fit(lm, quiet, [steps], size, logger=logger)
    assert [row["steps/edits"] for row in steps.rows] == expected
    assert steps.rows[0]["steps/first"] == before != steps.rows[-1]["steps/first"]
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        logged = {
            (int(row["step"]), float(row["steps/batches"])) for row in csv.DictReader(file) if row["steps/batches"]
        }
    batches = [-(-edits // size) for edits in expected]
    assert logged == set(zip(batches, batches, strict=True))


class Once(Steps):
    """Has a number of the unedited model only."""

    def measure(self, module):
        return {} if len(module.journal) else {"first": 1.0}


def test_what_is_not_measured_any_more_is_no_number_for_a_policy(lm, quiet):
    guard = PolicyGuard(Policy(minimum={"steps/first": 0.5}))
    with pytest.raises(PolicyError, match="steps/first"):
        fit(lm, quiet, [Once(), guard], 5)


@pytest.mark.parametrize("every", [0, 1.5, True, "2"])
def test_every_must_be_a_positive_whole_number(every):
    with pytest.raises(ConfigError, match=f"every must be a whole number of at least 1, got {every!r}"):
        Steps(every)


class AsItIs(Steps):
    """Measures in evaluations that belong to no run too."""

    in_evaluations = True

    def __init__(self):
        super().__init__()
        self.calls = []

    def on_fit_start(self, trainer, pl_module):
        self.calls.append("ready")

    def begin(self, module, requests):
        self.calls.append([request.subject for request in requests])

    def can_measure(self, module):
        return module.lm.depth < 100


def test_a_model_is_measured_as_it_is_in_evaluations_of_no_run(lm, quiet):
    module, watcher, other = fit(lm, quiet, []), AsItIs(), Steps()
    trainer = L.Trainer(**quiet, callbacks=[watcher, other])
    result = run_evaluate(trainer, module, EditDataModule(FACTS[:2]), "now")
    assert watcher.calls == ["ready", [fact.subject for fact in FACTS[:2]]]
    assert result.metrics["steps/batches"] == 5
    assert (watcher.rows, other.rows) == ([], [])
    for stage in ("before", "after"):  # these belong to a run, along which it measures
        assert "steps/batches" not in run_evaluate(trainer, module, EditDataModule(FACTS[:2]), stage).metrics


@pytest.mark.parametrize("kind", [KnowledgeCheck, NeighborShift, NeutralText])
def test_those_that_need_no_run_measure_a_model_without_edits(lm, quiet, kind):
    watcher = kind(window=16, tokens=64) if kind is NeutralText else kind()
    trainer, module = L.Trainer(**quiet, callbacks=[watcher]), fit(lm, quiet, [])
    module.journal.rollback(5)
    metrics = run_evaluate(trainer, module, EditDataModule(FACTS), "now").metrics
    own = {name: value for name, value in metrics.items() if name.startswith(f"{watcher.name}/")}
    assert own
    assert all(own[name] == pytest.approx(0, abs=1e-6) for name in own if name.endswith("/kl"))


def test_a_kind_of_model_that_is_not_measured(lm, quiet):
    class Never(Steps):
        def can_measure(self, module):
            return False

    watcher = Never()
    fit(lm, quiet, [watcher])
    assert watcher.rows == []
