"""Edit CounterFact records in one batch, once per method and setting, and report the metrics before and after.

    python benchmarks/counterfact.py --data verbatim_300.json --corpus valid.txt test.txt [--json FILE]
    python benchmarks/counterfact.py --data verbatim_300.json --corpus valid.txt test.txt --first 100 \
        --methods alphaedit --settings benchmarks/sweep.yaml --json FILE

Target values of the unedited model are the same for every method, so they are found once per setting of their own; the
time that this took is counted for each. Between rows the model is rolled back. With --json, rows that the file already
holds are not run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cakeflow import Contexts, Editor, EditRequest, TargetOptimizer, read_requests
from cakeflow.batch import EditBatch
from cakeflow.model import LanguageModel, load_model
from cakeflow.targets import Targets

SHOWN = ("efficacy", "generalization", "specificity", "editscore", "efficacy_exact", "generalization_exact")


@dataclass(frozen=True)
class Remembered(TargetOptimizer):
    """A target optimiser that finds the values of a batch on the same weights only once."""

    known: dict[tuple[object, ...], Targets] = field(default_factory=dict, compare=False, repr=False)

    def optimize(
        self, lm: LanguageModel, batch: EditBatch, layer: int, progress: Callable[[int], object] = lambda done: None
    ) -> Targets:
        """See ``TargetOptimizer.optimize``."""
        key = (lm.fingerprint(), batch, layer, self)
        if key not in self.known:
            self.known[key] = super().optimize(lm, batch, layer, progress)
        return self.known[key]


class Sweep:
    """One model, edited and rolled back row by row.

    Args:
        requests: The records of the one batch.
        corpus: Texts for the second moments; None samples them from the model.
        tokens: Budget of the second moments.
    """

    def __init__(self, requests: list[EditRequest], corpus: list[str] | None, tokens: int) -> None:
        self.lm = load_model("smollm2-135m")
        self.requests = requests
        self.statistics = {"source": corpus, "tokens": tokens} if corpus else {}
        self.known: dict[tuple[object, ...], Targets] = {}
        self.search: dict[str, float] = {}
        self.contexts: Contexts | None = None

    def editor(self, method: str, setting: dict[str, Any]) -> Editor:
        """An editor with a setting's overrides, whose targets and contexts outlive it."""
        setting = {"contexts": self.contexts, **setting}
        setting["statistics"] = {**self.statistics, **setting.get("statistics", {})}
        editor = Editor.from_pretrained(
            self.lm.model,
            method,
            tokenizer=self.lm.tokenizer,
            config="smollm2-135m",
            trainer={"logger": False},
            **setting,
        )
        editor.module.targets = Remembered(**asdict(editor.module.targets), known=self.known)
        return editor

    def unedited(self) -> dict[str, float]:
        """Metrics of the model as it is."""
        return self.editor("memit", {}).evaluate(self.requests)

    def row(self, method: str, setting: dict[str, Any]) -> dict[str, float]:
        """Metrics after one batch, and seconds per edit; the model is as before when this returns."""
        editor = self.editor(method, setting)
        module = editor.module
        run = editor.fit(self.requests, evaluate=False)
        self.contexts = self.contexts or module.contexts
        key = repr((module.targets, module.layers, module.contexts))
        self.search[key] = max(self.search.get(key, 0.0), run.timings["targets"])
        seconds = self.search[key] + sum(run.timings[phase] for phase in ("keys", "allocate", "solve"))
        figures = {**editor.evaluate(self.requests), "seconds_per_edit": seconds / len(self.requests)}
        editor.rollback()
        return figures


def show(name: str, row: dict[str, float]) -> None:
    """Print one row, in %."""
    numbers = "".join(f"{100 * row[metric]:22.1f}" for metric in SHOWN)
    print(f"{numbers}{row.get('seconds_per_edit', 0):20.2f}  {name}", flush=True)


def main() -> None:
    """Print one row per method and setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--corpus", nargs="+", help="texts for the second moments; default: sampled from the model")
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["memit", "alphaedit", "cake"])
    parser.add_argument("--settings", type=Path, help="YAML list of arguments of EditModule, one setting each")
    parser.add_argument("--json", type=Path, help="write the figures here, after every row")
    args = parser.parse_args()
    requests = read_requests(args.data)[args.first : args.first + args.records]
    settings = yaml.safe_load(args.settings.read_text()) if args.settings else [{}]
    sweep = Sweep(requests, args.corpus, args.tokens)
    figures = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    rows = [
        (f"{method} {json.dumps(each)}".removesuffix(" {}"), method, each)
        for each in settings
        for method in args.methods
    ]
    print(f"{len(requests)} records from {args.first}, in %")
    print("".join(f"{name:>22s}" for name in SHOWN) + f"{'seconds per edit':>20s}")
    for name, method, setting in [("before", "", {}), *rows]:
        if name not in figures:
            figures[name] = sweep.row(method, setting) if method else sweep.unedited()
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1))
        show(name, figures[name])


if __name__ == "__main__":
    main()
