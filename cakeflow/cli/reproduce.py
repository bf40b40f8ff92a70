"""``cakeflow reproduce``: a run searched and solved anew, and compared with its record."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from cakeflow.cli.console import say
from cakeflow.cli.editors import editor_for
from cakeflow.core.recorded import RecordedRun
from cakeflow.core.reproduction import RESULT, BatchResult, NumberResult, Reproduction, reproduce
from cakeflow.models.loading import Loading
from cakeflow.report.tables import rows_table

MOST = 40
"""Rows of a table in the terminal; the file has all of them."""
FEW = 3
"""Numbers of a batch in the terminal, those that differ most."""


def run_reproduce(
    run: Path,
    run_dir: Path | None = None,
    data: str | None = None,
    model: str | None = None,
    method: str | None = None,
    model_config: str | None = None,
    layers: list[int] | None = None,
    loading: Loading = Loading(),
) -> Reproduction:
    """Search and solve a run anew, and compare the result with its record: cakeflow reproduce RUN.

    Exit status 0 if all is as recorded, 1 if not. Callbacks, loggers and policies of the run do not run.

    Args:
        run: A run folder, or its file journal/ledger.jsonl alone (then no size of a weight's difference is known).
        run_dir: Folder of the repetition, with reproduce.json; by default a new one under runs/.
        data: The facts, where the ledger has no texts or pixels.
        model: The unedited model, if it cannot be loaded by the name that the run was started with.
        method: A recipe or a YAML file, where the run was built in Python and does not name its method.
        model_config: Tuned numbers for the model, with --method.
        layers: Layers to edit, with --method.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        RunFolderError: If there is no ledger, or it was changed after it was written.
        ResumeError: If the run has not ended, or the model is another one.
        ConfigError: If texts, pictures or the method are not on record, or a plugin of the method is missing.
    """
    record = RecordedRun.read(run, data)
    trainer = {"accelerator": _accelerator(record)}
    editor = editor_for(record.entries, model, method, model_config, layers, loading, trainer)
    result = reproduce(record, editor.module, editor.trainer(run_dir))
    show_reproduction(result)
    if not result.equal:
        sys.exit(1)
    return result


def _accelerator(run: RecordedRun) -> str:
    """The recorded kind of device, where it is there; else what Lightning finds."""
    device = run.start.arithmetic.device if run.start.arithmetic else "auto"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return device if there.get(device) else "auto"


def show_reproduction(result: Reproduction) -> None:
    """Print the batches, what differs in them, what may explain it, and the verdict last.

    Args:
        result: The comparison.
    """
    console = Console()
    console.print(rows_table([_row(batch) for batch in result.batches][:MOST], "Batches, as recorded and repeated"))
    if rows := [row for batch in result.apart for row in _details(batch)]:
        console.print(rows_table(rows[:MOST], "What differs"))
    if result.metrics:
        console.print(rows_table([_of_number("", each) for each in result.metrics][:MOST], "Metrics that differ"))
    for title, lines in (("environment", result.environment), ("settings", result.settings), ("note", result.notes)):
        for line in lines:
            say(f"{title}: {line}")
    places = {place.place for batch in result.batches for place in batch.places}
    what = f"{len(result.batches)} batches in {len(places) or 'no'} places of the model"
    weights = ("the same SHA-256" if places else "nothing to change there") if result.same_weights else "other weights"
    apart = f"{len(result.apart)} batches and {len(result.metrics)} metrics differ"
    rest = "all numbers and outcomes as recorded" if result.equal else apart
    say(f"{result.run}: {what}: {weights}, {rest}")
    say(f"all of it: {Path(result.folder) / RESULT}")


def _row(batch: BatchResult) -> dict[str, str]:
    apart = [place for place in batch.places if place.recorded != place.repeated]
    number = batch.numbers[0] if batch.numbers else None
    return {
        "batch": str(batch.batch),
        "same SHA-256": f"{len(batch.places) - len(apart)} of {len(batch.places)}",
        "most of a weight": _most([place.weight for place in apart]),
        "of an update": _most([place.update for place in apart]),
        "of a number": f"{number.relative:.2g} ({number.name})" if number else "0",
        "facts": str(len(batch.facts)),
        "other": str(len(batch.faults)),
    }


def _most(sizes: list[float]) -> str:
    """The largest size in words."""
    known = [size for size in sizes if size == size]
    return f"{max(known):.2g}" if known else "unknown" if sizes else "0"


def _details(batch: BatchResult) -> Iterator[dict[str, str]]:
    for place in batch.places:
        if place.recorded != place.repeated:
            size = f"{_most([place.update])} of the update, {_most([place.weight])} of the weight"
            yield _detail(batch.batch, place.place, place.recorded[:12], place.repeated[:12], size)
    distinct = {(each.recorded, each.repeated): each for each in reversed(batch.numbers)}  # a layer's has two names
    yield from (_of_number(str(batch.batch), each) for each in [*reversed(distinct.values())][:FEW])
    for fact in batch.facts:
        yield _detail(batch.batch, fact.prompt or fact.fact[:12], fact.recorded, fact.repeated, "")
    for fault in batch.faults:
        yield _detail(batch.batch, fault, "", "", "")


def _of_number(batch: str, each: NumberResult) -> dict[str, str]:
    return _detail(batch, each.name, f"{each.recorded:.8g}", f"{each.repeated:.8g}", f"{each.relative:.2g}")


def _detail(batch: int | str, item: str, recorded: str, repeated: str, size: str) -> dict[str, str]:
    return {"batch": str(batch), "item": item, "recorded": recorded, "repeated": repeated, "difference": size}
