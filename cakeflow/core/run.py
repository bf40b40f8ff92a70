"""One run: evaluate, edit, evaluate again, and write the run folder."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning as L

from cakeflow import ranks
from cakeflow.core.checkpoint import with_safe_checkpoints
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.folder import run_folder, writing
from cakeflow.core.loggers import log_files, log_settings, with_run_folder
from cakeflow.core.module import EditModule
from cakeflow.core.strategy import check_ranks, jointly, require_same_run
from cakeflow.core.trainer import check_trainer, quiet
from cakeflow.data.images import THUMBNAILS
from cakeflow.errors import ConfigError, PolicyError
from cakeflow.evaluation.evaluation import check_texts
from cakeflow.evaluation.outcome import Outcome
from cakeflow.journal.journal import Journal
from cakeflow.journal.model_state import require_plain_mode
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import EvaluatedRequest, ModelInfo, RunInfo
from cakeflow.journal.store import ANSWERS, JOURNAL, ledger_path
from cakeflow.storage.atomic import pass_on_rights, write_text
from cakeflow.storage.hashing import file_hash
from cakeflow.storage.typed import write_lines

log = logging.getLogger(__name__)
FILES = (
    "before.jsonl", "after.jsonl", ANSWERS, "routes.jsonl", "run.json", "metrics.csv", "config.yaml",
    "hparams.yaml",
)  # fmt: skip
"""Files of a run folder beside the journal."""


@dataclass(frozen=True)
class EvaluationResult:
    """The outcome of one evaluation.

    Attributes:
        metrics: Metric name -> value.
        requests: The answers to all prompts, request by request.
        protocol: Names how the metrics were measured; numbers with different ones are not comparable.
    """

    metrics: dict[str, float]
    requests: list[EvaluatedRequest]
    protocol: str


@dataclass(frozen=True)
class FitResult:
    """The outcome of one ``fit``.

    Attributes:
        before: Metrics of the model as it was, by name.
        after: Metrics of the edited model.
        timings: Seconds per phase.
        timed: Number of facts that these are of: those of the run but for what was repeated from an interrupted one.
        peaks: Most memory in each phase beyond the unedited model, in bytes; nan if it cannot be known.
        logged: Everything that was logged while editing, as of the last batch: what ``report.plot_layers`` draws.
        protocol: Names how the metrics were measured; numbers with different ones are not comparable.
        journal: Every edit batch of this model so far.
        folder: The run folder, if the Trainer's logger has one.
        outcome: What became of every fact, and of what was not edited, in free answers; None where the Trainer has no
            ``OutcomeCheck``, or nothing was evaluated.
    """

    before: dict[str, float]
    after: dict[str, float]
    timings: dict[str, float]
    timed: int
    peaks: dict[str, float]
    logged: dict[str, float]
    protocol: str
    journal: Journal
    folder: Path | None
    outcome: Outcome | None = None


def python_call(folder: Path) -> str:
    """Return the call that goes on with an interrupted run."""
    return f"editor.fit(..., run_dir={str(folder)!r})"


def run_fit(
    trainer: L.Trainer,
    module: EditModule,
    data: EditDataModule,
    *,
    evaluate: bool = True,
    goes_on: Callable[[Path], str] = python_call,
) -> FitResult:
    """Evaluate, edit and evaluate again: what ``Editor.fit`` and ``cakeflow fit`` both do.

    Every batch is on disk when its step ends. Where the folder holds an interrupted run, its batches are repeated from
    there, which takes no search and no solve.

    A run that was stopped, by a callback or ``max_time``, is not marked as complete: the same command goes on with it.
    On several ranks every one of them calls this, and gets the same result; the first alone writes files.

    Args:
        trainer: The Trainer.
        module: The edit method with its model.
        data: The requests.
        evaluate: Whether to evaluate before and after.
        goes_on: What returns the words by which the user goes on with an interrupted run in a folder.

    Raises:
        ConfigError: If the Trainer does not fit (``check_trainer``), or has finished its epoch and would edit nothing;
            or inside ``autocast``.
        ModelChangedError: If somebody else changed the model since its journal did.
        ResumeError: If the folder holds a run that differs, or a finished one.
        LockedError: If another process writes this folder.
        RanksError: If ranks differ in model, settings, data or folders, or one was lost.
    """
    _check_start(trainer)
    check_ranks(module, trainer)
    return jointly(trainer, lambda: _attach_and_fit(trainer, module, data, goes_on, evaluate=evaluate))


def _attach_and_fit(
    trainer: L.Trainer,
    module: EditModule,
    data: EditDataModule,
    goes_on: Callable[[Path], str],
    *,
    evaluate: bool,
) -> FitResult:
    with_safe_checkpoints(with_run_folder(trainer))
    for record in (module.timings, module.peaks, module.metrics_at):
        record.clear()
    module.outcome = None
    data.evaluate = evaluate
    module.setup()
    module.journal.memory.check_all(record=False)
    data.attach(module, edit=True, evaluate=evaluate)
    module.obey(trainer.callbacks)  # type: ignore[attr-defined]
    with writing(trainer) as folder:
        return _fit(trainer, module, data, folder, goes_on, evaluate=evaluate)


def go_on_from(run: Path, module: EditModule, folder: Path | None) -> None:
    """Edit the unedited model as a finished run did, so that a new run goes on from there with all its batches.

    Args:
        run: The folder of the finished run, which stays as it is.
        module: The module of the new run.
        folder: The folder of the new run; where it has a ledger already, that has the earlier batches.

    Raises:
        ResumeError: If it is a run of another model, or the module has edits already.
        LedgerError: If the run's files are not as they were written.
        PolicyError: If the run was stopped before its policy judged it.
    """
    module.setup()
    if folder is None or not ledger_path(folder).exists():
        module.journal.load(run / JOURNAL)
        module.journal.store = None  # the new run is stored elsewhere or, without a folder, nowhere


def _fit(
    trainer: L.Trainer,
    module: EditModule,
    data: EditDataModule,
    folder: Path | None,
    goes_on: Callable[[Path], str],
    *,
    evaluate: bool,
) -> FitResult:
    require_same_run(module, data, trainer, folder)
    if folder is not None:  # before any logger writes: a folder that is refused stays as it is
        module.open_journal(folder, data, trainer)
        facts = {"model": module.name, "edits": len(data.requests), "batch_size": data.batch_size}
        log_settings(trainer, {**facts, **module.settings()})
    before: dict[str, float] = {}
    if evaluate:
        before = run_evaluate(trainer, module, data, "before").metrics
        check_texts(module.answers)
    module.stage = "after"
    with _advice_on_resuming(module, folder, goes_on), quiet(), _interruptible():
        trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if evaluate and module.evaluated != len(module.journal):  # the last validation came before the last batch
        run_evaluate(trainer, module, data, "after")
    module.journal.memory.check_all(record=False)  # callbacks may have the last word: an average is no edit
    after = dict(module.metrics_at.get("after", {}))
    if not module.complete:
        _warn_of_rest(len(module.run_facts), len(data.requests), goes_on(folder) if folder else "")
    if folder is not None:
        ranks.on_first(lambda: write_files(folder, module, len(module.run_facts), {"before": before, "after": after}))
        if module.complete:
            names = ranks.on_first(lambda: {name: file_hash(folder / name) for name in _files(folder)})
            module.journal.close(names)
        ranks.on_first(lambda: log_files(trainer, folder))
    return FitResult(
        before=before,
        after=after,
        timings=dict(module.timings),
        timed=sum(module.run_facts.values()),
        peaks=dict(module.peaks),
        logged=logged,
        protocol=module.protocol,
        journal=module.journal,
        folder=folder,
        outcome=module.outcome,
    )


def _check_start(trainer: L.Trainer) -> None:
    """Check all that can be checked before a model is loaded."""
    require_plain_mode("fit")
    if trainer.current_epoch:
        raise ConfigError(
            "this Trainer has finished its epoch and would edit nothing; give a new one, or its arguments"
        )
    check_trainer(trainer, edits=True)


def run_evaluate(trainer: L.Trainer, module: EditModule, data: EditDataModule, stage: str) -> EvaluationResult:
    """Score the requests through the Trainer and log the metrics as ``stage/...``; called on every rank."""
    check_ranks(module, trainer)
    return jointly(trainer, lambda: _evaluate(trainer, module, data, stage))


def _evaluate(trainer: L.Trainer, module: EditModule, data: EditDataModule, stage: str) -> EvaluationResult:
    module.stage = stage
    with quiet(), _interruptible():
        trainer.validate(module, datamodule=data, verbose=False)
    _write_answers(trainer, module, stage)
    return EvaluationResult(dict(module.metrics_at[stage]), list(module.answers), module.protocol)


def _warn_of_rest(edits: int, requests: int, words: str) -> None:
    advice = f"; go on with: {words}" if words else ""
    warnings.warn(
        f"the run was stopped after {edits} of {requests} facts and is not marked as complete{advice}", stacklevel=3
    )


def write_files(folder: Path, module: EditModule, edits: int, metrics: dict[str, dict[str, float]]) -> None:
    """Write what a run measured: ``run.json``, and the answers of the edited model.

    Args:
        folder: The run folder, whose rights the files get.
        module: The edit method after the run.
        edits: Number of facts of the run.
        metrics: Stage -> metrics.
    """
    outcome = module.outcome
    if metrics["after"]:
        write_lines(folder / "after.jsonl", module.answers)
    if outcome is not None:
        write_lines(folder / ANSWERS, outcome.answers)
    info = RunInfo(
        model=ModelInfo(
            source=module.name,
            fingerprint_before=module.journal.base.fingerprint,
            dtype=str(module.lm.dtype),
            architecture=asdict(module.lm.architecture),
        ),
        settings=module.used_settings(),
        versions=circumstances().versions,
        metrics=metrics,
        protocol=module.protocol,
        edits=edits,
        timed=sum(module.run_facts.values()),
        timings=dict(module.timings),
        peaks=dict(module.peaks),
        verdict=outcome.verdict if outcome else "",
        side_effects=list(outcome.side_effects) if outcome else [],
        convergence=module.convergence,
    )
    write_text(folder / "run.json", info.model_dump_json(indent=1))
    pass_on_rights(folder, [folder / name for name in _files(folder)])  # some are Lightning's
    pass_on_rights(folder, (folder / JOURNAL).iterdir())


def update_outcome(folder: Path, info: RunInfo, outcome: Outcome, edits: int) -> None:
    """Write what became of a run whose facts were taken back since; what it measured of itself stays.

    Args:
        folder: The run folder.
        info: What its ``run.json`` has.
        outcome: The answers of the model as it is now.
        edits: Number of facts in force.
    """
    path = folder / "run.json"
    changes = {"edits": edits, "verdict": outcome.verdict, "side_effects": list(outcome.side_effects)}
    write_text(path, info.model_copy(update=changes).model_dump_json(indent=1))
    write_lines(folder / ANSWERS, outcome.answers)
    pass_on_rights(folder, [path, folder / ANSWERS])


def _files(folder: Path) -> list[str]:
    """Return the names of the files of a run folder beside the journal."""
    pictures = sorted(path.name for path in folder.glob(THUMBNAILS))
    return [*(name for name in FILES if (folder / name).exists()), *pictures]


def _write_answers(trainer: L.Trainer, module: EditModule, stage: str) -> None:
    folder = run_folder(trainer)
    if folder is not None:
        ranks.on_first(lambda: write_lines(folder / f"{stage}.jsonl", module.answers))


@contextmanager
def _advice_on_resuming(module: EditModule, folder: Path | None, goes_on: Callable[[Path], str]) -> Iterator[None]:
    """When a run stops early, say what is safe and how it goes on."""
    try:
        yield
    except BaseException as error:
        if folder is not None and not isinstance(error, PolicyError) and ranks.is_first():
            count, words = len(module.journal), goes_on(folder)
            log.warning("stopped: %d batches are done and stored; go on with: %s", count, words)
        raise


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl+C raise ``KeyboardInterrupt``: Lightning ends the process instead, and ignores Ctrl+C from then on."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler if handler is None else handler)
        raise error.__context__ from None
