"""Repetition of a run by a stranger: searched and solved anew, and compared with the record batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cakeflow.core.config_parser import import_words
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.folder import run_folder
from cakeflow.core.module import EditModule
from cakeflow.core.recorded import RecordedRun
from cakeflow.core.run import run_fit
from cakeflow.core.sizes import Sizes
from cakeflow.errors import ConfigError, ResumeError, command_line, listed
from cakeflow.journal.ledger import Entry
from cakeflow.journal.schema import Arithmetic, BatchBody, FactBody, RunBody
from cakeflow.journal.steps import with_completions
from cakeflow.journal.store import differences, ledger_path
from cakeflow.storage.atomic import write_text
from cakeflow.storage.typed import SHA256, Count, Number, Schema

RESULT = "reproduce.json"
"""File of the comparison, in the folder of the repetition."""
CLOSE = 1e-6
"""Difference up to which metrics count as equal: facts are scored in parts, whose size is not on record."""
MOST_THREADS = 512


class PlaceResult(Schema):
    """One edited place after one batch.

    Attributes:
        place: Name of the parameter or module.
        recorded: SHA-256 of its content on record; empty if the batch does not change it there.
        repeated: SHA-256 now.
        update: Frobenius norm of the difference between the batch's changes, over that of the recorded one; 0 where the
            hashes are equal, null where it cannot be told.
        weight: The same of the whole weight, over the norm of the unedited one.
    """

    place: str
    recorded: str
    repeated: str
    update: Number
    weight: Number


class NumberResult(Schema):
    """A logged number that differs; null where one side has none."""

    name: str
    recorded: Number
    repeated: Number

    @property
    def relative(self) -> float:
        """The difference over the larger of both; infinite where one side has no number."""
        difference = abs(self.recorded - self.repeated)
        return math.inf if math.isnan(difference) else difference / max(abs(self.recorded), abs(self.repeated))


class FactResult(Schema):
    """A fact whose outcome differs, by the hash of its request."""

    fact: SHA256
    prompt: str
    recorded: str
    repeated: str


class BatchResult(Schema):
    """One batch on record and repeated.

    Attributes:
        batch: Its number on record.
        equal: Whether facts, weights, numbers and outcomes are the same.
        places: Every place that one of both changed.
        numbers: The logged numbers that differ, the largest relative difference first.
        facts: The facts whose outcome differs.
        faults: Other differences in words: other facts, a batch that one side lacks, other inputs of the solver.
    """

    batch: Count
    equal: bool
    places: list[PlaceResult]
    numbers: list[NumberResult]
    facts: list[FactResult]
    faults: list[str]


class Reproduction(Schema):
    """The outcome of a repetition: ``reproduce.json``.

    Attributes:
        equal: Whether all batches and metrics are as recorded.
        same_weights: Whether every edited place has the recorded SHA-256 after every batch.
        run: The ledger that was repeated.
        folder: The folder of the repetition.
        batches: The run's batches.
        metrics: Metrics of the evaluations that differ by more than ``CLOSE``, as ``stage/name``.
        environment: Differences of versions, machine, threads and arithmetic that may explain others.
        settings: Differences of the method's settings.
        notes: What was not repeated.
    """

    equal: bool
    same_weights: bool
    run: str
    folder: str
    batches: list[BatchResult]
    metrics: list[NumberResult]
    environment: list[str]
    settings: list[str]
    notes: list[str]

    @property
    def apart(self) -> list[BatchResult]:
        """The batches that are not as recorded."""
        return [batch for batch in self.batches if not batch.equal]


def reproduce(run: RecordedRun, module: EditModule, trainer: L.Trainer) -> Reproduction:
    """Search and solve a run anew on the unedited model, and compare what comes out with what is on record.

    ``Journal.load`` and ``cakeflow replay`` apply recorded changes; here none of the run's own is read before all are
    made again. Threads and precision of float32 products are those on record. Callbacks and loggers of the run are
    not on record and do not run; they measure, and decide no weight.

    Args:
        run: The run.
        module: The edit method with its unedited model.
        trainer: A Trainer whose logger has a new folder, for the repetition.

    Returns:
        The comparison, which is also written to ``reproduce.json`` in the folder.

    Raises:
        ConfigError: If the Trainer has no folder, or one inside the run.
        ResumeError: If the model is another one, or the folder holds another run.
    """
    folder = run_folder(trainer)
    if folder is None or folder.resolve().is_relative_to(_home(run).resolve()):
        raise ConfigError(f"the repetition needs a folder outside of {_home(run)}, got {folder}; name another run_dir")
    module.setup()
    _require_model(run, module)
    with computed_as(run.start.arithmetic):
        if run.base.earlier and not ledger_path(folder).exists():
            _apply_earlier(run, module)
        data = EditDataModule(run.requests, run.start.batch_size, conflicts="keep")
        run_fit(trainer, module, data, evaluate=bool(run.evaluations), goes_on=partial(_command, run))
    result = compare(run, RecordedRun.read(folder, run.requests), folder)
    write_text(folder / RESULT, result.model_dump_json(indent=1))
    return result


def compare(run: RecordedRun, repeated: RecordedRun, folder: Path) -> Reproduction:
    """Compare two recorded runs of the same requests.

    Args:
        run: The run.
        repeated: Its repetition.
        folder: The folder of the repetition.
    """
    sizes = Sizes.of(run, repeated)
    pairs = list(zip_longest(run.own, repeated.own))
    batches = [_batch(index, one, other, sizes) for index, (one, other) in enumerate(pairs)]
    metrics, missing = _metrics(run), sorted(set(_metrics(run)) - set(_metrics(repeated)))
    shared = {name: value for name, value in metrics.items() if name not in missing}
    others = [each for each in _numbers(shared, _metrics(repeated)) if not abs(each.recorded - each.repeated) <= CLOSE]
    notes = [f"metrics of callbacks, which do not run, are not measured: {listed(missing)}"] if missing else []
    same = all(each.recorded == each.repeated for batch in batches for each in batch.places)
    return Reproduction(
        equal=all(batch.equal for batch in batches) and not others,
        same_weights=same and all(one and other for one, other in pairs),
        run=str(run.path),
        folder=str(folder),
        batches=batches,
        metrics=others,
        environment=differences(_environment(run.start), _environment(repeated.start)),
        settings=differences(run.start.settings, repeated.start.settings),
        notes=[*run.notes, *notes],
    )


@contextmanager
def computed_as(how: Arithmetic | None) -> Iterator[None]:
    """Use the recorded number of threads, and precision of float32 products, in the body."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    recorded = how.products.partition(",")[0] if how else precision
    torch.set_num_threads(min(max(how.threads, 1), MOST_THREADS) if how else threads)
    torch.set_float32_matmul_precision(recorded if recorded in ("highest", "high", "medium") else precision)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def _command(run: RecordedRun, folder: Path) -> str:
    """The command that goes on with an interrupted repetition."""
    return command_line(["reproduce", *import_words(run.start.method), str(run.path), "--run_dir", str(folder)])


def _home(run: RecordedRun) -> Path:
    """The run folder, or the ledger itself where it lies alone."""
    return run.path.parent.parent if run.has_tensors else run.path


def _require_model(run: RecordedRun, module: EditModule) -> None:
    if module.journal.steps:
        raise ResumeError(f"{module.name} has {len(module.journal)} edited batches; give the unedited model")
    if module.journal.base.fingerprint != run.base.fingerprint:
        raise ResumeError(
            f"{module.name} ({module.journal.base.dtype}, SHA-256 {module.journal.base.fingerprint[:12]}) is not the "
            f"model of the run, {run.start.model} ({run.base.dtype}, SHA-256 {run.base.fingerprint[:12]}); name that "
            "one: --model NAME, and its revision, --loading.revision"
        )


def _apply_earlier(run: RecordedRun, module: EditModule) -> None:
    """Edit the model as the runs before this one did, as ``go_on_from`` does."""
    journal = module.journal
    journal.load(run.path.parent, judged=False)
    journal.store = None
    first = min((body.batch for body in run.batches), default=len(journal))
    earlier = [step for step in journal.steps if step.number < first]
    if len(earlier) != run.base.earlier:
        raise ResumeError(
            f"{run.path}: {run.base.earlier - len(earlier)} of its {run.base.earlier} earlier batches were taken back "
            "after it; reproduce it from a copy of the folder that was made before that"
        )
    journal.rollback(len(with_completions(journal.steps)) - len(with_completions(earlier)))


def _batch(index: int, one: Entry | None, other: Entry | None, sizes: Sizes) -> BatchResult:
    recorded, repeated = (_body(each) for each in (one, other))
    after = [{part.place: part.after for part in body.changes} for body in (recorded, repeated)]
    names = dict.fromkeys([*after[0], *after[1]])
    apart = [name for name in names if after[0].get(name) != after[1].get(name)]
    measured = sizes.of_batch(one, other, apart)
    places = [
        PlaceResult(
            place=name,
            recorded=after[0].get(name, ""),
            repeated=after[1].get(name, ""),
            update=measured.get(name, (0.0, 0.0))[0],
            weight=measured.get(name, (0.0, 0.0))[1],
        )
        for name in names
    ]
    numbers = _numbers(_logged(recorded), _logged(repeated))
    facts, faults = list(_facts(recorded, repeated)), list(_faults(one, other))
    number = recorded.batch if one else index
    equal = not (apart or numbers or facts or faults)
    return BatchResult(batch=number, equal=equal, places=places, numbers=numbers, facts=facts, faults=faults)


def _body(entry: Entry | None) -> BatchBody:
    if entry is not None and isinstance(entry.body, BatchBody):
        return entry.body
    return BatchBody(batch=0, files={}, hashes=[], targets=[], numbers={}, changes=[])


def _faults(one: Entry | None, other: Entry | None) -> Iterator[str]:
    recorded, repeated = _body(one), _body(other)
    if one is None or other is None:
        yield f"{'the record' if one is None else 'the repetition'} has no such batch"
    elif recorded.hashes != repeated.hashes:
        yield f"it has other facts: {len(recorded.hashes)} on record, {len(repeated.hashes)} now"
    inputs = [{name: each for name, each in body.inputs.items() if name != "policy"} for body in (recorded, repeated)]
    if one and other:
        yield from differences({"inputs": inputs[0]}, {"inputs": inputs[1]})


def _logged(body: BatchBody) -> dict[str, float]:
    """All numbers of a batch: its own, those of its changes, of the target search and of the facts."""
    numbers = dict(body.numbers)
    for index, change in enumerate(body.changes):
        numbers |= {f"{change.place}#{index}/{name}": value for name, value in change.numbers.items()}
    for index, target in enumerate(body.targets):
        values = target.to_dict().items()
        numbers |= {f"targets.{index}/{name}": value for name, value in values if name != "layer"}
    for index, fact in enumerate(body.facts):
        numbers |= {f"facts.{index}/{name}": getattr(fact, name) for name in ("probability", "arrived")}
    return numbers


def _numbers(recorded: Mapping[str, float], repeated: Mapping[str, float]) -> list[NumberResult]:
    """The numbers that differ, the largest relative difference first."""
    rows = [
        NumberResult(name=name, recorded=one, repeated=other)
        for name in dict.fromkeys([*recorded, *repeated])
        if not _same(one := _number(recorded, name), other := _number(repeated, name))
    ]
    return sorted(rows, key=lambda row: -row.relative)


def _number(numbers: Mapping[str, Any], name: str) -> float:
    value = numbers.get(name)
    return math.nan if value is None else float(value)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _facts(recorded: BatchBody, repeated: BatchBody) -> Iterator[FactResult]:
    """Yield the facts of both that took on one side only, or failed for another reason."""
    outcomes = dict(zip(repeated.hashes, repeated.facts, strict=False))
    texts = recorded.requests or [{}] * len(recorded.hashes)
    for name, text, fact in zip(recorded.hashes, texts, recorded.facts, strict=False):
        pair = _outcome(fact), _outcome(outcomes.get(name))
        if pair[0] != pair[1]:
            prompt = str(text.get("prompt", "")).replace("{}", str(text.get("subject", "")))
            yield FactResult(fact=name, prompt=prompt, recorded=pair[0], repeated=pair[1])


def _outcome(fact: FactBody | None) -> str:
    if fact is None:
        return "not measured"
    return "taken" if fact.taken else f"not taken ({fact.reason or 'no reason'})"


def _metrics(run: RecordedRun) -> dict[str, float]:
    return {f"{stage}/{name}": value for stage, body in run.evaluations.items() for name, value in body.metrics.items()}


def _environment(start: RunBody) -> dict[str, Any]:
    data = start.to_dict()
    return {name: data[name] for name in ("versions", "machine", "threads", "arithmetic", "loading") if name in data}
