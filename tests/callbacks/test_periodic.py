"""Measurements along a stream of edits: when they are made, and where they are logged."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger

from cakeflow.callbacks import PeriodicCallback
from cakeflow.errors import ConfigError
from cakeflow.models import Site

from .conftest import fit


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


@pytest.mark.parametrize("every", [0, 1.5, True, "2"])
def test_every_must_be_a_positive_whole_number(every):
    with pytest.raises(ConfigError, match=f"every must be a whole number of at least 1, got {every!r}"):
        Steps(every)
