"""Edit CounterFact records in one batch, once per method, and report the metrics before and after.

    python benchmarks/counterfact.py --data verbatim_300.json --corpus valid.txt test.txt [--json FILE]

Target values of the unedited model are the same for every method, so they are found once; the time that this took is
counted for each. Between methods the model is rolled back.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cakeflow import Editor, TargetOptimizer, read_requests
from cakeflow.batch import EditBatch
from cakeflow.model import LanguageModel, load_model
from cakeflow.targets import Targets

SHOWN = ("efficacy", "generalization", "specificity", "editscore", "efficacy_exact", "generalization_exact")


@dataclass(frozen=True)
class Remembered(TargetOptimizer):
    """A target optimiser that finds the values of a batch on the same weights only once."""

    known: dict[tuple[str, EditBatch, int], Targets] = field(default_factory=dict, compare=False, repr=False)

    def optimize(
        self, lm: LanguageModel, batch: EditBatch, layer: int, progress: Callable[[int], object] = lambda done: None
    ) -> Targets:
        """See ``TargetOptimizer.optimize``."""
        key = (lm.fingerprint(), batch, layer)
        if key not in self.known:
            self.known[key] = super().optimize(lm, batch, layer, progress)
        return self.known[key]


def main() -> None:
    """Print one row per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--corpus", nargs="+", help="texts for the second moments; default: sampled from the model")
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--records", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=["memit", "alphaedit", "cake"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    requests = read_requests(args.data)[args.first : args.first + args.records]
    statistics = {"source": args.corpus, "tokens": args.tokens} if args.corpus else {}
    lm = load_model("smollm2-135m")
    figures: dict[str, dict[str, float]] = {}
    known, contexts, search = {}, None, 0.0
    for method in args.methods:
        editor = Editor.from_pretrained(
            lm.model, method, tokenizer=lm.tokenizer, config="smollm2-135m", statistics=statistics, contexts=contexts,
            trainer={"logger": False},
        )  # fmt: skip
        module = editor.module
        module.targets = Remembered(**asdict(module.targets), known=known)
        if not figures:
            figures["before"] = editor.evaluate(requests)
        run = editor.fit(requests, evaluate=False)
        search = max(search, run.timings["targets"])
        seconds = (search + run.timings["keys"] + run.timings["solve"]) / len(requests)
        figures[method] = {**editor.evaluate(requests), "seconds_per_edit": seconds}
        contexts = module.contexts
        editor.rollback()
    print(f"{len(requests)} records from {args.first}, in %")
    print(f"{'':16s}" + "".join(f"{name:>22s}" for name in SHOWN) + f"{'seconds per edit':>20s}")
    for name, row in figures.items():
        numbers = "".join(f"{100 * row[metric]:22.1f}" for metric in SHOWN)
        print(f"{name:16s}{numbers}{row.get('seconds_per_edit', 0):20.2f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
