"""The rows of a suite: one for each arm, written when its run ends; an interrupted suite goes on behind them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import copy
from pathlib import Path
from typing import Any

from cakeflow.core.folder import is_finished
from cakeflow.core.run import run_fit
from cakeflow.data.files import read_text
from cakeflow.editor import Editor
from cakeflow.errors import (
    ConfigError,
    EditError,
    LockedError,
    ModelChangedError,
    ResumeError,
    RunFolderError,
    listed,
)
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.steps import request_hash
from cakeflow.models.loading import load_model
from cakeflow.report.folder import RunFolder
from cakeflow.report.views import peak_memory, seconds_per_edit
from cakeflow.storage.cache import content_key
from cakeflow.storage.hashing import file_hash
from cakeflow.storage.locks import locked
from cakeflow.storage.typed import Count, Json, Number, Schema, parse_lines, write_lines
from cakeflow.suites.suite import Arm

ROWS, RUNS = "rows.jsonl", "runs"
"""File of the rows, and folder of the runs, in the folder of a suite."""
FATAL = (LockedError, ModelChangedError, ResumeError, RunFolderError)
"""Errors that say nothing of a method: they end the suite, which goes on when they are mended."""


class Row(Schema):
    """The result of one arm.

    Attributes:
        arm: Its name, also the folder of its run below ``runs``.
        settings: Everything that decides it, by name: hashes of recipe, model's numbers and facts, and the rest as the
            suite has it. A suite goes on only where these are the same.
        fingerprint: SHA-256 of the unedited model.
        protocol: Protocol of the metrics; only numbers under the same one are comparable.
        metrics: Metrics of the edited model, those of callbacks included, by the names in logs.
        before: The same of the unedited model.
        edits: Number of facts.
        seconds: Sum over the phases of the run, evaluations included.
        seconds_per_edit: Seconds of search, keys, allocation and solve for each fact.
        peak: Most bytes that editing took beyond the model.
        machine: The machine.
        versions: Versions of packages.
        threads: Number of threads.
        verdict: What became of the facts, in words.
        head: Hash of the last entry of the run's ledger.
        fault: The error that ended the run, if one did: a result as well.
    """

    arm: str
    settings: dict[str, Json]
    fingerprint: str = ""
    protocol: str = ""
    metrics: dict[str, Number]
    before: dict[str, Number]
    edits: Count
    seconds: Number
    seconds_per_edit: Number
    peak: Number
    machine: dict[str, str]
    versions: dict[str, str]
    threads: Count
    verdict: str = ""
    head: str = ""
    fault: str = ""


def settings_of(arm: Arm) -> dict[str, Any]:
    """Return everything that decides an arm's numbers beside the model's weights, by name."""
    data = arm.suite.data[arm.data]
    return {
        "model": arm.suite.model,
        "recipe and numbers": content_key(*(file_hash(path) for path in arm.configs)),
        "overrides": dict(arm.overrides),
        "facts": content_key(*map(request_hash, arm.requests.requests)),
        "batch_size": arm.batch_size,
        "evaluation": dict(arm.suite.evaluation),
        "callbacks": [*arm.suite.callbacks, *data.get("callbacks", [])],  # type: ignore[misc]
    }


class Rows:
    """The rows of a suite in a folder.

    Args:
        folder: The folder; it may be there already, with rows of an earlier start.
        notify: Called with every arm's row as it is measured.
        again: What goes on with a suite that is interrupted, for the message that says so.

    Raises:
        ConfigError: If its file of rows is damaged.
    """

    def __init__(
        self,
        folder: Path,
        notify: Callable[[Arm, Row], Any] = lambda arm, row: None,
        again: str = "Rows(folder).measure(arms)",
    ) -> None:
        self.folder, self.path, self.notify, self.again = folder, folder / ROWS, notify, again
        self._unedited: dict[str, Any] = {}
        self.stored = self._read()

    def _read(self) -> dict[str, Row]:
        remedy = "delete the line, and its arm is read from its run folder or measured again"
        rows = parse_lines(Row, read_text(self.path), self.path, ConfigError, remedy) if self.path.exists() else []
        return {row.arm: row for row in rows}

    def check(self, arms: Sequence[Arm]) -> None:
        """Check that the rows which are there are those of these arms.

        Raises:
            ResumeError: Naming each arm that was measured with other settings, and the settings.
        """
        faults = []
        for arm in arms:
            if (row := self.stored.get(arm.name)) is not None:
                names = [name for name, value in settings_of(arm).items() if row.settings.get(name) != value]
                faults += [f"{arm.name} ({', '.join(names)})"] if names else []
        if faults:
            raise ResumeError(
                f"{self.path} has rows of another suite: {listed(faults, 3)} changed; go on with the suite as it was, "
                "measure into another folder, --out, or delete these rows and the folders of their runs"
            )

    def measure(self, arms: Sequence[Arm]) -> list[Row]:
        """Return the row of every arm; those that are not there yet are measured and written one by one.

        A run that was interrupted goes on where it stopped, or begins again if it had not edited anything. Several
        processes share the work: each measures the arms that no other one has begun, and waits for the others' last.

        Raises:
            ConfigError: If there is no such model.
            ResumeError: As ``check``, and if the model is not the one of the rows that are there.
            LockedError: If another process edits in the folder of a run.
        """
        self.check(arms)
        if any(arm.name not in self.stored for arm in arms):
            self._check_model(arms[0])
        for wait in (False, True):
            for arm in arms:
                self._take(arm, wait=wait)
        self.check(arms)  # rows that others stored meanwhile
        return [self.stored[arm.name] for arm in arms]

    def _take(self, arm: Arm, *, wait: bool) -> None:
        """Measure an arm that has no row, unless another process is at it; or ``wait`` for that one, and then."""
        with ExitStack() as lock:
            try:
                lock.enter_context(locked(self.folder / RUNS / arm.name, wait=wait))
            except LockedError:
                return
            self.stored = self._read()
            if arm.name not in self.stored:
                self._store(self._measured(arm))
                self.notify(arm, self.stored[arm.name])

    def _store(self, row: Row) -> None:
        with locked(self.path, wait=True):
            self.stored = {**self._read(), row.arm: row}
            write_lines(self.path, self.stored.values())

    def _measured(self, arm: Arm) -> Row:
        folder = self.folder / RUNS / arm.name
        try:
            if not is_finished(folder):
                self._run(arm, folder)
        except EditError as error:
            if isinstance(error, FATAL):
                raise
            return self._row(arm, fault=f"{type(error).__name__}: {error}")
        finally:
            gc.collect()  # the model of an arm, before that of the next is loaded
        return self._of_run(arm, RunFolder.read(folder))

    def _run(self, arm: Arm, folder: Path) -> None:
        trainer = {"callbacks": arm.callbacks(), "enable_progress_bar": False}
        editor = Editor(arm.module(), trainer)
        editor.module.unedited = self._unedited  # every arm asks the same unedited model the same
        facts = copy(arm.requests)  # a run leaves its model with them, and arms outlive their runs
        run_fit(editor.trainer(folder), editor.module, facts, goes_on=lambda _: self.again)

    def _check_model(self, arm: Arm) -> None:
        """Load the model once, since what is wrong with it is no result of a method, and compare it with the rows."""
        model = arm.suite.model
        fingerprint = load_model(model, **arm.loading.arguments()).fingerprint()
        others = {row.fingerprint for row in self.stored.values()} - {fingerprint, ""}
        if others:
            raise ResumeError(
                f"{self.path}: the rows are of a model with the hash {min(others)[:12]}, and {model!r} now has "
                f"{fingerprint[:12]}; measure into another folder, --out"
            )

    def _of_run(self, arm: Arm, run: RunFolder) -> Row:
        info, logged = run.info, logged_by_callbacks(run)
        return self._row(
            arm,
            fingerprint=info.model.fingerprint_before,
            protocol=info.protocol,
            metrics={**run.metrics("after"), **{name: values[-1] for name, values in logged.items()}},
            before={**run.metrics("before"), **{name: values[0] for name, values in logged.items()}},
            seconds=sum(info.timings.values()) if info.timed in (None, info.edits) else float("nan"),
            seconds_per_edit=seconds_per_edit(run),
            peak=peak_memory(run),
            versions=info.versions,
            verdict=info.verdict,
            head=run.ledger[-1].hash if run.ledger else "",
        )

    def _row(self, arm: Arm, **values: Any) -> Row:
        now = circumstances()
        unknown = {"metrics": {}, "before": {}, "seconds": float("nan"), "seconds_per_edit": float("nan")}
        here = {"machine": now.machine, "threads": now.threads, "versions": now.versions, "peak": float("nan")}
        row = {**unknown, **here, "edits": arm.size, **values}
        return Row(arm=arm.name, settings=settings_of(arm), **row)


def logged_by_callbacks(run: RunFolder) -> dict[str, list[float]]:
    """Return the numbers that ``PeriodicCallback``s logged along a run: name -> values, in order.

    What one measurement left out, since there was nothing to judge, is nan.
    """
    measured: dict[str, list[dict[str, float]]] = {}
    for cells in run.log:
        for prefix in {name.partition("/")[0] for name in cells if name.endswith("/edits")}:
            own = {name: value for name, value in cells.items() if name.startswith(f"{prefix}/")}
            measured.setdefault(prefix, []).append(own)
    names = {name: rows for rows in measured.values() for row in rows for name in row if not name.endswith("/edits")}
    return {name: [row.get(name, math.nan) for row in rows] for name, rows in names.items()}
