"""One run: measure, edit, measure again, and keep the account that it can be resumed from and audited by."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L

from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.data.contexts import Contexts
from cakeflow.errors import PolicyError
from cakeflow.evaluation.evaluation import check_texts, warn_of_known
from cakeflow.forward.tokens import encode_batch
from cakeflow.journal.journal import Journal
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import EndBody, ModelInfo, RunInfo
from cakeflow.journal.store import run_folder
from cakeflow.storage.atomic import write_text
from cakeflow.storage.hashing import digest

log = logging.getLogger(__name__)


FILES = ("before.jsonl", "after.jsonl", "run.json", "metrics.csv", "config.yaml", "hparams.yaml")
"""What a run folder has beside the journal."""


@dataclass(frozen=True)
class FitResult:
    """What one ``fit`` did.

    Attributes:
        before: Metrics of the model as it was, by name.
        after: Metrics of the edited model.
        timings: Seconds per phase.
        peaks: Most memory in each phase beyond the unedited model, in bytes; nan where it cannot be known.
        logged: Everything that was logged while editing, as of the last batch: what ``report.plot_layers`` draws.
        protocol: Names how the metrics were measured; numbers with different ones are not comparable.
        journal: Every edit batch of this model so far.
        folder: Where metrics, config and journal lie, if the Trainer's logger has a folder.
    """

    before: dict[str, float]
    after: dict[str, float]
    timings: dict[str, float]
    peaks: dict[str, float]
    logged: dict[str, float]
    protocol: str
    journal: Journal
    folder: Path | None


def run_fit(trainer: L.Trainer, module: LocateThenEdit, data: EditDataModule, *, evaluate: bool = True) -> FitResult:
    """Measure, edit and measure again: what ``Editor.fit`` and ``cakeflow fit`` both do.

    Every batch is on disk when its step ends. Where the folder holds an interrupted run, its batches are done again
    from there, which takes no search and no solve.

    Raises:
        ResumeError: If the folder holds a run that differs, or a finished one.
    """
    module.timings.clear()
    module.peaks.clear()
    module.measured.clear()
    module.setup()
    encode_batch(module.lm, data.requests, module.contexts or Contexts())  # refuses what cannot be edited
    if evaluate:
        module.check_records(data.requests)
    folder = run_folder(trainer)
    if folder is not None:
        module.open(folder / "journal", data.requests, data.batch_size)
    before: dict[str, float] = {}
    if evaluate:
        before = run_evaluate(trainer, module, data, "before")
        check_texts(module.outcomes)
        warn_of_known(module.outcomes)
    module.stage = "after"
    with _expected_warnings(), _told_how_to_go_on(module, folder):
        trainer.fit(
            module,
            train_dataloaders=data.train_dataloader(),
            val_dataloaders=data.val_dataloader() if evaluate else None,
        )
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if evaluate and module.evaluated != len(module.journal):  # the last validation came before the last batch
        run_evaluate(trainer, module, data, "after")
    after, timings, peaks = _metrics(trainer, "after"), dict(module.timings), dict(module.peaks)
    if folder is not None:
        if evaluate:
            _write_outcomes(folder, "after", module)
        info = RunInfo(
            **describe(module),
            metrics={"before": before, "after": after},
            protocol=module.evaluation.id,
            edits=len(data.requests),
            timings=timings,
            peaks=peaks,
        )
        write_text(folder / "run.json", json.dumps(info.to_dict(), indent=1, ensure_ascii=False))
        _end(module, folder)
    return FitResult(before, after, timings, peaks, logged, module.evaluation.id, module.journal, folder)


def run_evaluate(trainer: L.Trainer, module: LocateThenEdit, data: EditDataModule, stage: str) -> dict[str, float]:
    """Score the records through the Trainer and log the metrics as ``stage/...``."""
    module.check_records(data.requests)
    module.stage = stage
    with _expected_warnings():
        trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
    folder = run_folder(trainer)
    if folder is not None:
        _write_outcomes(folder, stage, module)
    return _metrics(trainer, stage)


def describe(module: LocateThenEdit) -> dict[str, Any]:
    """Return the model, everything that decides the outcome of its edits, and versions: the first fields of RunInfo."""
    return {
        "model": ModelInfo(
            source=module.name,
            fingerprint_before=module.journal.base["fingerprint"],
            dtype=str(module.lm.dtype),
            architecture=asdict(module.lm.architecture),
        ),
        "settings": module.settings(),
        "versions": circumstances()["versions"],
    }


@contextmanager
def _told_how_to_go_on(module: LocateThenEdit, folder: Path | None) -> Iterator[None]:
    """Say what is safe when a run stops early."""
    try:
        yield
    except BaseException as error:
        if folder is not None and not isinstance(error, PolicyError):
            done = len(module.journal)
            log.warning("stopped: %d batches are done and kept; the same command with run=%s goes on", done, folder)
        raise


def _end(module: LocateThenEdit, folder: Path) -> None:
    """The record's last entry: the run is complete, and these are its files."""
    assert module.journal.record is not None
    files = {name: digest(folder / name) for name in FILES if (folder / name).exists()}
    module.journal.record.append(EndBody(files=files))


def _write_outcomes(folder: Path, stage: str, module: LocateThenEdit) -> None:
    """What every record answered, one line each."""
    lines = (json.dumps(row.to_dict(), ensure_ascii=False) for row in module.outcomes)
    write_text(folder / f"{stage}.jsonl", "".join(f"{line}\n" for line in lines))


def _metrics(trainer: L.Trainer, stage: str) -> dict[str, float]:
    prefix = f"{stage}/"
    return {
        name.removeprefix(prefix): float(v) for name, v in trainer.callback_metrics.items() if name.startswith(prefix)
    }


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silences what Lightning rightly says of training and is meant here: no optimizer, no workers, evaluation mode."""
    with warnings.catch_warnings():
        for message in (
            "configure_optimizers",
            "does not have many workers",
            "in eval mode",
            "have no `val_dataloader`",
            "training_step. returned",
            ".isinstance.treespec, LeafSpec",
            "Experiment logs directory",  # the journal is there already; of a resumed run every row is logged again
        ):
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield
