"""What the scripts of this folder share: one model, edited and rolled back row by row, every row kept in a file.

A row holds the metrics, N_eff of the weights, seconds per edit, the version of cakeflow and, under ``records``, each
record's outcomes, so that two rows on the same records can be compared record by record.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from safetensors.torch import load_file

from cakeflow import (
    Contexts,
    Editor,
    EditRequest,
    Evaluation,
    GradientSearch,
    LocateThenEdit,
    read_requests,
)
from cakeflow.core import EditCallback, LayerEdit, find_config
from cakeflow.evaluation import Answers
from cakeflow.forward import TextBatch
from cakeflow.journal import circumstances
from cakeflow.metrics import KINDS, Consistency, fluency, record_means, success
from cakeflow.models import LanguageModel, load_model
from cakeflow.storage import cache_folder, write_tensors, write_text
from cakeflow.targets import Targets, TargetSearch
from cakeflow.weighters import effective_layers

Row = dict[str, Any]
SHOWN = ("efficacy", "generalization", "specificity", "editscore", "efficacy_exact", "generalization_exact")


@dataclass(frozen=True)
class Remembered(TargetSearch):
    """A target search whose results are kept in the cache: one search per batch, weights and settings.

    Attributes:
        inner: Search to remember.
        seconds: Seconds that each search took, when it was done.
    """

    inner: TargetSearch = GradientSearch()
    seconds: list[float] = field(default_factory=list, compare=False, repr=False)

    def search(self, lm: LanguageModel, batch: TextBatch, layer: int, **options: Any) -> Targets:
        """Return the cached targets of the batch, or search for them."""
        return self._cached("search", lm, batch, layer, **options)

    def measure(self, lm: LanguageModel, batch: TextBatch, layer: int, **options: Any) -> Targets:
        """Return the cached present values of the batch, or measure them."""
        return self._cached("measure", lm, batch, layer, **options)

    def _cached(
        self, how: str, lm: LanguageModel, batch: TextBatch, layer: int, max_tokens: int | None = None, **options: Any
    ) -> Targets:
        parts = (lm.fingerprint(), lm.dtype, batch, layer, max_tokens, how, self)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()
        path = cache_folder() / "targets" / f"{key[:24]}.safetensors"
        if not path.exists():
            start = time.perf_counter()
            targets = vars(getattr(self.inner, how)(lm, batch, layer, max_tokens=max_tokens, **options))
            write_tensors(path, {**targets, "seconds": torch.tensor(time.perf_counter() - start)})
        tensors = load_file(path)
        self.seconds.append(float(tensors.pop("seconds")))
        return Targets(**tensors)


class Watcher(EditCallback):
    """Keeps N_eff of each batch's weights."""

    def __init__(self) -> None:
        self.effective: list[float] = []

    def on_layer_solved(self, module: L.LightningModule, edit: LayerEdit) -> None:
        """Note N_eff at the first layer of a batch."""
        if edit.context.index == 0:
            self.effective.append(float(effective_layers(edit.context.weights).mean()))


class Sweep:
    """One model, edited and rolled back row by row.

    Args:
        requests: The records to edit.
        corpus: Texts for the second moments; None samples them from the model.
        tokens: Budget of the second moments.
        path: Where rows are kept as JSON; those that it holds are not run again.
        batch_size: Edits in a batch; all by default.
        lm: The model, unedited; loaded by default.
        config: Its config: a shipped name, or a YAML file.
        evaluation: What is asked of it after every row.
    """

    def __init__(
        self,
        requests: list[EditRequest],
        corpus: list[str] | None,
        tokens: int,
        path: Path | None = None,
        batch_size: int | None = None,
        lm: LanguageModel | None = None,
        config: str = "smollm2-135m",
        evaluation: Evaluation = Evaluation(),
    ) -> None:
        self.lm, self.config, self.evaluation = lm or load_model(config), config, evaluation
        self.requests, self.batch_size = requests, batch_size
        self.statistics = {"source": corpus, "tokens": tokens} if corpus else {}
        self.contexts: Contexts | None = None
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text()) if path and path.exists() else {}

    def __call__(self, name: str, method: str = "", **setting: Any) -> Row:
        """A row by its name, from the file or run now; no method: the unedited model."""
        if name not in self.rows:
            self.rows[name] = self.run(method, setting) if method else self.unedited()
            if self.path:
                write_rows(self.path, self.rows)
        return self.rows[name]

    def editor(self, method: str, setting: dict[str, Any], *callbacks: L.Callback, logger: bool = False) -> Editor:
        """An editor with a setting's overrides, whose targets and contexts outlive it."""
        setting = {"contexts": self.contexts, **setting}
        setting["statistics"] = {**self.statistics, **setting.get("statistics", {})}
        editor = Editor.from_pretrained(
            self.lm.model,
            method,
            tokenizer=self.lm.tokenizer,
            config=self.config,
            evaluation=self.evaluation,
            trainer={"logger": logger, "callbacks": list(callbacks)},
            **setting,
        )
        editor.module.targets = Remembered(editor.module.targets)
        return editor

    def unedited(self) -> Row:
        """Outcomes of the model as it is."""
        return self.judge(self.editor("memit", {}).module)

    def run(self, method: str, setting: dict[str, Any]) -> Row:
        """Outcomes after all batches; the model is as before when this returns. A setting may name its batch size."""
        watcher, setting = Watcher(), dict(setting)
        size = setting.pop("batch_size", self.batch_size)
        editor = self.editor(method, setting, watcher)
        module = editor.module
        try:
            run = editor.fit(self.requests, size, evaluate=False)
            self.contexts = self.contexts or module.contexts
            seconds = sum(run.timings[phase] for phase in ("keys", "allocate", "solve")) + sum(module.targets.seconds)
            row = self.judge(module)
        finally:
            editor.rollback()
        n_eff = sum(watcher.effective) / len(watcher.effective)
        return {**row, "n_eff": n_eff, "seconds_per_edit": seconds / len(self.requests)}

    def judge(self, module: LocateThenEdit) -> Row:
        """Metrics, and each record's outcomes.

        Of each kind of prompt: success, the margin of the wanted target in log-probability, the share of right tokens;
        of the records with free texts their fluency and consistency.
        """
        module.setup()
        if torch.accelerator.is_available():  # a run leaves the model on the CPU
            self.lm.model.to(torch.accelerator.current_accelerator())
        answers = self.evaluation.ask(self.lm, self.requests)
        module.metrics.reset()
        module.metrics.update(**answers.fields())
        row: Row = {"version": circumstances().versions["cakeflow"]}
        row |= {name: float(value) for name, value in module.metrics.compute().items()}
        scores = answers.scores
        hits = success("probability", scores.expected, scores.rival, scores.correct)
        outcomes = {"": hits, "_margin": scores.expected - scores.rival, "_tokens": scores.tokens}
        row["records"] = {
            kind + ending: _rounded(record_means(each[scores.kind == index], scores.record[scores.kind == index]))
            for index, kind in enumerate(KINDS)
            for ending, each in outcomes.items()
        }
        row["records"] |= {name: _rounded(each) for name, each in texts_by_record(answers).items()}
        return row


def texts_by_record(answers: Answers) -> dict[str, torch.Tensor]:
    """Fluency and consistency of every record that has free texts (and a reference)."""
    pairs = [(texts, record.reference) for texts, record in zip(answers.texts, answers.records, strict=True) if texts]
    near = Consistency()
    return {
        "fluency": torch.tensor([sum(map(fluency, texts)) / len(texts) for texts, _ in pairs]),
        "consistency": torch.tensor([float(near([texts], [reference])) for texts, reference in pairs if reference]),
    }


def outcomes(rows: list[Row], name: str) -> torch.Tensor:
    """One outcome of all records of all seeds; empty where it was not asked for."""
    return torch.tensor([value for row in rows for value in row["records"].get(name, ())], dtype=torch.float64)


def interval(values: torch.Tensor) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval; nan of fewer than two values."""
    if len(values) < 2:
        return math.nan, math.nan
    return float(values.mean()), 1.96 * float(values.std()) / len(values) ** 0.5


def write_table(path: Path, title: str, rows: Sequence[Mapping[str, str]], more: Sequence[str] = ()) -> None:
    """Print rows, and write them as CSV and, with more lines below them, as Markdown; empty columns are left out."""
    names = list(dict.fromkeys(name for row in rows for name, text in row.items() if text))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path.with_suffix(".csv"), buffer.getvalue())
    text = "\n".join([title, "", *markdown(names, [[row.get(name, "") for name in names] for row in rows]), *more])
    write_text(path.with_suffix(".md"), f"{text}\n")
    print(text)


def write_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """Write rows by name as JSON, one a line."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    write_text(path, f"{{\n{lines}\n}}\n")


def load(config: str) -> LanguageModel:
    """The model of a config."""
    return load_model(yaml.safe_load(find_config("model", config).read_text())["model"].get("base", "smollm2-135m"))


def markdown(names: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *cells)]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every script."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="CounterFact records")
    options.add_argument("--corpus", nargs="+", help="texts for the second moments; default: sampled from the model")
    options.add_argument("--tokens", type=int, default=98_304)
    options.add_argument("--records", type=int, default=100)
    options.add_argument("--first", type=int, default=0)
    options.add_argument("--json", type=Path, help="keep rows here, as they are done; those it holds are not run again")
    return options


def start(args: argparse.Namespace) -> Sweep:
    """The sweep that the options ask for."""
    requests = read_requests(args.data)[args.first : args.first + args.records]
    print(f"{len(requests)} records from {args.first}, in %")
    print("".join(f"{name:>22s}" for name in SHOWN) + f"{'seconds per edit':>20s}")
    return Sweep(requests, args.corpus, args.tokens, args.json)


def show(name: str, row: Row) -> None:
    """Print one row, in %."""
    numbers = "".join(f"{100 * row[metric]:22.1f}" for metric in SHOWN)
    print(f"{numbers}{row.get('seconds_per_edit', 0):20.2f}  {name}", flush=True)
