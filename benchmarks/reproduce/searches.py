"""What target searches cost and bring: operations per fact, and outcomes paired by record with those of the first one.

    python benchmarks/reproduce/searches.py --data verbatim_300.json --records 300 --json FILE \
        --searches '{"lr": 1.0}' '{"stride": 0.33, "betas": [0.8, 0.9]}' short

Every hundred of the records is a batch of its own on the unedited model. A search is a shipped one by name, or settings
as JSON; ``--options`` are those of the method. Operations are those of the matrix products while searching, by count:
further walks are in them, the one full pass over the prompts is not. Differences are in points, with 95 % intervals.
``--dtypes float32 bfloat16`` runs every search in these types.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from sweep import Row, Sweep, interval, outcomes, parser

from cakeflow import EditRequest, read_requests
from cakeflow.forward import Suffixes
from cakeflow.models import LanguageModel, Site, load_model

OUTCOMES = {
    "taken": "all tokens of the new target are the most likely ones after the prompt",
    "rewrite_tokens": "share of them that are",
    "paraphrase": "paraphrases answered with the new target",
    "paraphrase_tokens": "share of its tokens that are the most likely ones",
    "neighborhood": "prompts about other subjects with their answer unchanged",
}


@contextmanager
def counting(lm: LanguageModel) -> Iterator[list[float]]:
    """Count the operations of the matrix products of suffix passes, and their gradients by the inputs, in a list."""
    blocks = [sum(each.numel() for each in lm.module(Site(i)).parameters() if each.dim() == 2) for i in range(lm.depth)]
    counts: list[float] = []
    plain = Suffixes.logits

    def logits(part: Suffixes, *args: torch.Tensor) -> torch.Tensor:
        products = part.tokens[..., 0].numel() if part.tokens.is_floating_point() else part.tokens.numel()
        products = products * sum(blocks[part.first :]) + len(part.label) * lm.embedding.numel()
        counts.append(2.0 * products * (2 if torch.is_grad_enabled() else 1))
        return plain(part, *args)

    with mock.patch.object(Suffixes, "logits", logits):
        yield counts


class Searches(Sweep):
    """A sweep whose searches are not remembered, so that they can be counted."""

    def run(self, method: str, setting: Row) -> Row:
        """Outcomes after one batch, operations per fact, and seconds of its searches."""
        editor = self.editor(method, setting)
        editor.module.targets = editor.module.targets.inner
        start = time.perf_counter()
        try:
            with counting(self.lm) as counts:
                editor.fit(self.requests, evaluate=False)
            row = self.judge(editor.module)
        finally:
            editor.rollback()
        row["records"]["taken"] = [float(share == 1) for share in row["records"]["rewrite_tokens"]]
        facts, timings = len(self.requests), editor.module.timings
        spent = {"targets, s per fact": timings["targets"] / facts, "all, s": time.perf_counter() - start}
        return {**row, "GFLOP per fact": sum(counts) / facts / 1e9, **spent}


def hundreds(requests: list[EditRequest]) -> list[list[EditRequest]]:
    """The records in batches of a hundred."""
    return [requests[i : i + 100] for i in range(0, len(requests), 100)]


def main() -> None:
    """Print a table of searches, and one of differences from the first."""
    options = parser(__doc__)
    options.add_argument("--method", default="cake")
    options.add_argument("--options", type=json.loads, default={}, help="of the method, as JSON")
    options.add_argument("--searches", nargs="+", default=["{}", "short"])
    options.add_argument("--dtypes", nargs="+", default=["auto"])
    args = options.parse_args()
    parts = hundreds(read_requests(args.data)[args.first : args.first + args.records])
    rows: dict[str, list[Row]] = {}
    for dtype in args.dtypes:
        lm = load_model("smollm2-135m", dtype=dtype)
        for number, part in enumerate(parts):
            sweep = Searches(part, args.corpus, args.tokens, args.json, lm=lm)
            for name in args.searches:
                arm = name if dtype == "auto" else f"{dtype} {name}"
                key = f"{args.data.name} {args.first + 100 * number} {args.method} {json.dumps(args.options)} {arm}"
                targets = json.loads(name) if name.startswith("{") else name
                row = sweep(key, args.method, **args.options, targets=targets)
                rows.setdefault(arm, []).append(row)
                numbers = {each: round(value, 4) for each, value in row.items() if isinstance(value, float)}
                print(key, numbers, flush=True)
    show(rows)


def show(rows: dict[str, list[Row]]) -> None:
    """Print means of each search in percent, and differences from the first in points."""
    base = next(iter(rows))
    for name, words in OUTCOMES.items():
        print(f"{name}: {words}")
    for search, records in rows.items():
        cost = sum(row["GFLOP per fact"] for row in records) / len(records)
        whole = sum(row["GFLOP per fact"] for row in rows[base]) / len(records)
        print(f"{search}: {cost:.0f} GFLOP per fact, {100 * cost / whole:.0f} % of those of {base}")
        for name in OUTCOMES:
            values = 100 * outcomes(records, name)
            mean, half = interval(values - 100 * outcomes(rows[base], name))
            print(f"  {name:20s}{float(values.mean()):8.1f}   difference {mean:+6.1f} +- {half:.1f}")


if __name__ == "__main__":
    main()
