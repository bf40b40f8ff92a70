"""Sets of records that are hard for one model, and what recipes make of them.

    python benchmarks/reproduce/challenges.py pick --data COUNTERFACT --out DIR --corpus valid.txt test.txt
    python benchmarks/reproduce/challenges.py edit --out DIR --corpus valid.txt test.txt [--methods NAME NAME]

``pick`` ranks records for the model in hand, as AlphaEdit+ (Liu et al. 2026) did for its own three sets, and writes a
hundred each as ``DIR/NAME.json``. The first ``--earlier`` records are edits that were made before; the others compete.

- ``preserved``: conflict with what is preserved, 1 - |P k|^2 / |k|^2, P the projection on the null space of C;
- ``previous``: conflict with earlier edits, the largest |cos| of a key and one of theirs;
- ``inconsistent``: |z - h| / |h|, how far the searched value is from the present one (slow: one search a record, so
  that ``--searched`` bounds their number);
- ``random``: the control.

Keys are those of the unedited model; the first two are means over the edited layers. A set has each subject once, and
sets may overlap. ``edit`` edits the earlier records and then a set, in two batches, by every method, and reports both.
Rows are kept in ``DIR/rows.json``; rows that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from sweep import Row, Sweep, load, write_table
from torch import Tensor

from cakeflow import EditRequest, LocateThenEdit, read_requests
from cakeflow.forward import FactBatch, choose_tokens, read_keys
from cakeflow.models import Site
from cakeflow.storage import write_text

SETS = ("preserved", "previous", "inconsistent", "random")
METRICS = ("efficacy", "generalization", "specificity", "efficacy_exact")
PASS_TOKENS, AT_ONCE = 4096, 16
"""Most tokens in a pass that looks for the facts' tokens; records in one search for values."""


@dataclass(frozen=True)
class Candidates:
    """Records at the unedited model.

    Attributes:
        module: The edit method, whose layers, statistics and search are those of the model's config.
        facts: The records as tokens, the earlier ones first.
    """

    module: LocateThenEdit
    facts: FactBatch

    @classmethod
    def read(cls, module: LocateThenEdit, requests: Sequence[EditRequest]) -> Candidates:
        """Tokenize the records, and choose the token of each fact."""
        module.setup()
        texts = module.encode(requests)
        keys = module.contexts.keys if module.contexts else None
        return cls(module, choose_tokens(module.lm, texts, module.fact_token, module.layers[0], PASS_TOKENS, keys))

    def conflicts(self, earlier: int) -> dict[str, Tensor]:
        """How much each record's keys conflict with the preserved ones and with those of the first ``earlier``."""
        module, sites = self.module, [Site(layer, "mlp_out") for layer in self.module.layers]
        windows = module.statistics.windows(module.lm, max(map(module.lm.key_width, sites)))
        covariances = module.statistics.collect(module.lm, sites, windows=windows)
        read, first = read_keys(module.lm, self.facts.texts, sites), [owner < earlier for owner in self.facts.owners]
        parts: dict[str, list[Tensor]] = {"preserved": [], "previous": []}
        for site, covariance in covariances.items():
            unit = read[site] / read[site].norm(dim=1, keepdim=True)
            null = covariance.project(unit, covariance.threshold)
            parts["preserved"].append(1 - null.square().sum(1))
            parts["previous"].append((unit @ unit[torch.tensor(first)].T).abs().amax(1))
        return {name: self.by_record(torch.stack(values).mean(0)) for name, values in parts.items()}

    def inconsistency(self, places: Sequence[int]) -> Tensor:
        """|z - h| / |h| of some records, at the last layer; the searches run in parts."""
        module, gaps = self.module, []
        for start in range(0, len(places), AT_ONCE):
            part = self.facts.part(places[start : start + AT_ONCE])
            targets = module.targets.search(module.lm, part.texts, module.layers[-1])
            gap = (targets.values - targets.initial).norm(dim=1) / targets.initial.norm(dim=1)
            gaps.append(Candidates(module, part).by_record(gap.cpu()))
            print(f"searched {min(start + AT_ONCE, len(places))} of {len(places)}", flush=True)
        return torch.cat(gaps)

    def by_record(self, values: Tensor) -> Tensor:
        """The largest value of each record's entries."""
        owners, start = torch.tensor(self.facts.owners), torch.full((len(self.facts),), -torch.inf).to(values.cpu())
        return start.scatter_reduce(0, owners, values.cpu(), "amax")


def pick(args: argparse.Namespace) -> None:
    """Write the sets and the earlier records, with the score of every record that was picked."""
    requests = read_requests(args.data)[: args.pool]
    sweep = Sweep(requests, args.corpus, args.tokens, lm=load(args.model), config=args.model)
    candidates = Candidates.read(sweep.editor("alphaedit", {}).module, requests)
    places = list(range(args.earlier, len(requests)))
    order = random.Random(args.seed).sample(places, len(places))
    scores = {
        name: {i: float(values[i]) for i in places} for name, values in candidates.conflicts(args.earlier).items()
    }
    searched = order[: args.searched]
    scores["inconsistent"] = dict(zip(searched, candidates.inconsistency(searched).tolist(), strict=True))
    scores["random"] = {place: -float(rank) for rank, place in enumerate(order)}
    _write(args.out / "earlier.json", requests, range(args.earlier), {})
    for name, each in scores.items():
        chosen = distinct(requests, sorted(each, key=lambda i: -each[i]), args.count)
        _write(args.out / f"{name}.json", requests, chosen, each)
        mean = sum(each.values()) / len(each)
        if name != "random":
            print(
                f"{name:14s} {len(chosen)} records of {len(each)}, from {each[chosen[-1]]:.3f}, mean of all {mean:.3f}"
            )


def distinct(requests: Sequence[EditRequest], order: Sequence[int], count: int) -> list[int]:
    """The first places whose subjects differ."""
    chosen: dict[str, int] = {}
    for place in order:
        chosen.setdefault(requests[place].subject, place)
    return list(chosen.values())[:count]


def _write(path: Path, requests: Sequence[EditRequest], places: Sequence[int], scores: dict[int, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps([requests[i].to_dict() for i in places], indent=1, ensure_ascii=False) + "\n")
    if scores:
        text = json.dumps({str(requests[i].case_id): round(scores[i], 6) for i in places}, indent=1)
        write_text(path.with_suffix(".scores.json"), f"{text}\n")


def edit(args: argparse.Namespace) -> None:
    """Edit every set behind the earlier records by every method, and write a table."""
    lm = load(args.model)
    earlier = Sweep(read_requests(args.out / "earlier.json"), args.corpus, args.tokens, lm=lm, config=args.model)
    path, table = args.out / "rows.json", []
    rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}
    for name in args.sets:
        sweep = Sweep(read_requests(args.out / f"{name}.json"), args.corpus, args.tokens, lm=lm, config=args.model)
        for method in ("unedited", *args.methods):
            if (label := f"{name}, {method}") not in rows:
                rows[label] = outcome(earlier, sweep, method)
                write_text(path, json.dumps(rows, indent=1) + "\n")
            figures = {f"{part}: {metric}": value for part, row in rows[label].items() for metric, value in row.items()}
            table.append(
                {"set": name, "method": method} | {key: f"{100 * value:.1f}" for key, value in figures.items()}
            )
    write_table(args.out / "challenges", "Hard sets, each edited behind the earlier records; %", table)


def outcome(earlier: Sweep, sweep: Sweep, method: str) -> Row:
    """Metrics of a set and of the earlier records when both are edited; the model is as before when this returns."""
    editor = sweep.editor("memit" if method == "unedited" else method, {"contexts": earlier.contexts})
    try:
        if method != "unedited":
            for part in (earlier, sweep):
                editor.fit(part.requests, len(part.requests), evaluate=False)
            earlier.contexts = editor.module.contexts
        judged = {"set": sweep.judge(editor.module), "earlier": earlier.judge(editor.module)}
    finally:
        editor.rollback()
    return {part: {metric: row[metric] for metric in METRICS} for part, row in judged.items()}


def main() -> None:
    """Pick or edit."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("task", choices=["pick", "edit"])
    options.add_argument("--out", type=Path, required=True, help="folder of the sets and of the outcomes")
    options.add_argument("--data", type=Path, help="CounterFact records to pick from")
    options.add_argument("--model", default="smollm2-135m", help="a shipped model config, or a YAML file")
    options.add_argument("--corpus", nargs="+", help="texts for the second moments; default: the model config's")
    options.add_argument("--tokens", type=int, default=98_304)
    options.add_argument("--pool", type=int, help="records that are read; default: all")
    options.add_argument("--earlier", type=int, default=100, help="records that were edited before")
    options.add_argument("--count", type=int, default=100, help="records in a set")
    options.add_argument("--searched", type=int, help="records whose value is searched, at random; default: all")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    options.add_argument("--methods", nargs="+", default=["alphaedit", "alphaedit_plus"])
    args = options.parse_args()
    if args.task == "pick" and args.data is None:
        options.error("pick needs --data")
    (pick if args.task == "pick" else edit)(args)


if __name__ == "__main__":
    main()
