"""The tables of CAKE's paper that compare metrics, by one command each.

    python benchmarks/reproduce/tables.py table1 --counterfact FILE --zsre FILE --corpus valid.txt test.txt
    python benchmarks/reproduce/tables.py table1 --scale full --model gpt2-xl --counterfact FILE --zsre FILE

``tables.yaml`` holds arms, data sets and what the paper reports. At the embedded scale SmolLM2-135M is edited, 100
records per seed in one batch (two for table 9); the full scale is the paper's, 2,000 in batches of 100, on the models
of ``configs/model``. Every seed draws its own records. The official protocol is used throughout, with free texts for
every tenth record (``--texts-every 1``: all, as in the paper). Figures are means over the records of all seeds, with
95 % intervals (1.96 standard errors). Rows are kept in ``tables.json`` under ``--out`` and not run again, whichever
table asks (those of table 3, which are timed, in a file of their own); beside it ``TABLE.csv``, ``.md`` and ``.png``.
Consistency needs ``--snippets``: the official file, or that of ``snippets.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from sweep import Row, Sweep, interval, load, markdown, outcomes, write_table

from cakeflow import EditDataModule, EditRequest, Evaluation
from cakeflow.models import LanguageModel
from cakeflow.report import save_plot

SCALES = {"embedded": (100, 100), "full": (2000, 100)}
"""Records of a seed, and edits in a batch."""
COLUMNS = {
    "counterfact": {
        "Eff": ("rewrite", 100), "Gen": ("paraphrase", 100), "Spe": ("neighborhood", 100),
        "Flu": ("fluency", 100), "Cons": ("consistency", 100),
    },
    "zsre": {"Eff": ("rewrite_tokens", 100), "Gen": ("paraphrase_tokens", 100), "Spe": ("neighborhood_tokens", 100)},
}  # fmt: skip
"""Data set -> column of the table -> outcome of each record, and its scale."""


@dataclass(frozen=True)
class Cell:
    """A mean over n records, with the half width of its 95 % interval."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, rows: list[Row], outcome: str, scale: float, base: list[Row] | None = None) -> Cell:
        """Over the records of all seeds; with a base, how far they are from it, record by record."""
        values = outcomes(rows, outcome) - (outcomes(base, outcome) if base else 0)
        return cls(*interval(scale * values), len(values))

    def __str__(self) -> str:
        return "" if self.mean != self.mean else f"{self.mean:.1f} ± {self.half:.1f}"


def draw(args: argparse.Namespace, data: str, seed: int) -> list[EditRequest]:
    """The records of a seed; those that contradict others are left out."""
    module = EditDataModule(
        str(getattr(args, data)),
        limit=args.records,
        shuffle_seed=seed,
        conflicts="drop",
        snippets=args.snippets if data == "counterfact" else None,
    )
    return module.requests


def run_all(args: argparse.Namespace, table: dict[str, Any], lm: LanguageModel) -> dict[tuple[str, str], list[Row]]:
    """(data, arm) -> a row per seed."""
    rows: dict[tuple[str, str], list[Row]] = {}
    for data in table["data"]:
        for seed in args.seeds:
            texts = args.texts_every if data == "counterfact" else 0
            evaluation = Evaluation(protocol="official", texts_every=texts)
            requests, path = draw(args, data, seed), args.out / f"{args.table if table.get('timed') else 'tables'}.json"
            sweep = Sweep(requests, args.corpus, args.tokens, path, args.batch_size, lm, args.model, evaluation)
            prefix = f"{args.model}, {data}, {len(requests)} in batches of {args.batch_size}, seed {seed}"
            arms = {"unedited": {}, **{name: table["arms"][name] for name in args.arms or table["arms"]}}
            for name, setting in arms.items():
                row = sweep(f"{prefix}, {json.dumps(setting, sort_keys=True)}", **setting)
                rows.setdefault((data, name), []).append(row)
                line = "  ".join(f"{c} {Cell.of([row], *w)}" for c, w in COLUMNS[data].items())
                print(f"{prefix}, {name:24s} {line}", flush=True)
    return rows


def lines(table: dict[str, Any], rows: dict[tuple[str, str], list[Row]]) -> Iterator[dict[str, str]]:
    """The table's rows, column by column."""
    for arm in dict.fromkeys(arm for _, arm in rows):
        line = {"method": arm}
        for data in table["data"]:
            seeds = rows.get((data, arm), [])
            line |= {f"{data} {name}": str(Cell.of(seeds, *which)) for name, which in COLUMNS[data].items()}
            if arm != "unedited" and seeds:
                line[f"{data} N_eff"] = f"{sum(row['n_eff'] for row in seeds) / len(seeds):.3f}"
                if table.get("timed"):
                    line[f"{data} s/edit"] = f"{sum(row['seconds_per_edit'] for row in seeds) / len(seeds):.2f}"
        yield line


def write(args: argparse.Namespace, table: dict[str, Any], rows: dict[tuple[str, str], list[Row]]) -> None:
    """CSV, Markdown and figure."""
    batches, seeds = f"{args.records} records in batches of {args.batch_size}", max(map(len, rows.values()))
    reported = []
    for model, arms in table["paper"].items():
        cells = [
            [arm, *(" / ".join(map(str, numbers.get(d, ()))) for d in table["data"])] for arm, numbers in arms.items()
        ]
        reported += ["", f"The paper, {model}:", "", *markdown(["method", *table["data"]], cells)]
    versions = sorted({row.get("version", "0.1") for each in rows.values() for row in each})
    title = f"{table['title']}: {args.model}, {batches}, {seeds} seed(s), cakeflow {' and '.join(versions)}"
    write_table(args.out / args.table, title, list(lines(table, rows)), reported)
    (times if table.get("timed") else figure)(table, rows, args.out / f"{args.table}.png")


def differences(table: dict[str, Any], rows: dict[tuple[str, str], list[Row]], base: str) -> list[str]:
    """How far each arm is from another one, paired by record, as a Markdown table."""
    columns = [(data, name, which) for data in table["data"] for name, which in COLUMNS[data].items()]
    cells = [
        [arm, *(str(Cell.of(rows[data, arm], *which, rows[data, base])) for data, _, which in columns)]
        for arm in dict.fromkeys(arm for _, arm in rows)
    ]
    return markdown([f"less {base}", *(f"{data} {name}" for data, name, _ in columns)], cells)


def figure(table: dict[str, Any], rows: dict[tuple[str, str], list[Row]], path: Path) -> None:
    """Every column as a panel, arms below each other, with intervals."""
    columns = [(data, name, which) for data in table["data"] for name, which in COLUMNS[data].items()]
    cells = {c: {arm: Cell.of(seeds, *c[2]) for (data, arm), seeds in rows.items() if data == c[0]} for c in columns}
    panels = {column: by_arm for column, by_arm in cells.items() if any(cell.n > 1 for cell in by_arm.values())}
    arms = list(dict.fromkeys(arm for _, arm in rows))
    size = (1.5 + 1.9 * len(panels), 1 + 0.3 * len(arms))
    _, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="tight")
    for ax, ((data, name, _), by_arm) in zip(axes[0], panels.items(), strict=True):
        for place, arm in enumerate(arms):
            color = "grey" if arm == "unedited" else "tab:blue"
            ax.errorbar(by_arm[arm].mean, place, xerr=by_arm[arm].half, fmt="o", markersize=4, color=color)
        ax.set(title=f"{data}\n{name}", yticks=range(len(arms)), yticklabels=arms)
    ax.invert_yaxis()
    save_plot(ax, path)


def times(table: dict[str, Any], rows: dict[tuple[str, str], list[Row]], path: Path) -> None:
    """Seconds per edit, a panel per data set."""
    _, axes = plt.subplots(1, len(table["data"]), figsize=(7, 2), sharey=True, squeeze=False, layout="tight")
    for ax, data in zip(axes[0], table["data"], strict=True):
        first = {arm: row for (source, arm), (row, *_) in rows.items() if source == data and arm != "unedited"}
        ax.barh(list(first), [row["seconds_per_edit"] for row in first.values()])
        ax.set(title=data, xlabel="seconds per edit")
    ax.invert_yaxis()
    save_plot(ax, path)


def main() -> None:
    """Run what is missing, then write the table."""
    here = Path(__file__)
    tables = yaml.safe_load(here.with_name("tables.yaml").read_text())
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("table", choices=tables)
    options.add_argument("--scale", choices=SCALES, default="embedded")
    options.add_argument("--model", default="smollm2-135m", help="a model config: shipped name, or YAML file")
    options.add_argument("--counterfact", type=Path)
    options.add_argument("--zsre", type=Path)
    options.add_argument("--snippets", help="attribute_snippets.json")
    options.add_argument("--corpus", nargs="+", help="texts for the second moments; default: sampled from the model")
    options.add_argument("--tokens", type=int, default=98_304, help="of the second moments")
    options.add_argument("--records", type=int, help="of each seed")
    options.add_argument("--batch-size", type=int)
    options.add_argument("--texts-every", type=int, default=10, help="records between free texts; 0: none")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--arms", nargs="+", help="only these; default: all")
    options.add_argument("--against", help="also print differences from this arm, paired by record")
    options.add_argument("--out", type=Path, default=here.with_name("results"))
    args = options.parse_args()
    table = tables[args.table]
    if missing := [data for data in table["data"] if getattr(args, data) is None]:
        options.error(f"{args.table} needs --{missing[0]} FILE")
    if args.against not in (None, *(args.arms or table["arms"])):
        options.error(f"{args.table} has no arm {args.against!r}; it has {', '.join(args.arms or table['arms'])}")
    records, batch = SCALES[args.scale]
    batch = table.get("batch_size", {}).get(args.scale, batch)
    args.records, args.batch_size = args.records or records, args.batch_size or batch
    args.out.mkdir(parents=True, exist_ok=True)
    rows = run_all(args, table, load(args.model))
    write(args, table, rows)
    if args.against:
        print("\n".join(differences(table, rows, args.against)))


if __name__ == "__main__":
    main()
