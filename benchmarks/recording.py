"""Compare our official evaluation protocol, prompt by prompt, with a recording of the official evaluation code."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from cakeflow.data import EditRequest, parse_requests, read_entries
from cakeflow.evaluation import official_token_reads, score_records, scored_prompts
from cakeflow.forward import predict
from cakeflow.metrics import KINDS, fluency
from cakeflow.models import LanguageModel, load_model

BARS = {"nll": 1e-4, "flags": 0, "entropy": 1e-9}
"""Largest difference of a mean negative log-likelihood, number of unequal flags, largest difference of an entropy."""


def select(path: Path, cases: Sequence[int]) -> list[EditRequest]:
    """The records of a recording: by ``case_id``, or by their place in a file that has none."""
    entries = read_entries(path)
    place = {entry.get("case_id", index): index for index, entry in enumerate(entries)}
    if missing := [case for case in cases if case not in place]:
        raise SystemExit(f"{path}: no record {missing[0]}, which the recording has")
    return parse_requests([entries[place[case]] for case in cases])


def counterfact(lm: LanguageModel, records: list[EditRequest], recorded: list[dict[str, Any]]) -> Iterator[Any]:
    """(name, ours, recorded) of every likelihood and flag of CounterFact."""
    scores = score_records(lm, records, "official")
    left = [{kind: list(range(len(case[f"{kind}_prompts_probs"]))) for kind in KINDS} for case in recorded]
    rows = zip(scored_prompts(records), scores.expected, scores.rival, scores.correct, strict=True)
    for (record, kind, *_), expected, rival, correct in rows:
        case, name = recorded[record], f"{KINDS[kind]}_prompts"
        place = left[record][KINDS[kind]].pop(0)
        right, wrong = ("target_true", "target_new") if kind == 2 else ("target_new", "target_true")
        yield "nll", -float(expected), case[f"{name}_probs"][place][right]
        yield "nll", -float(rival), case[f"{name}_probs"][place][wrong]
        yield "flags", bool(correct), case[f"{name}_correct"][place]
    if any(chain.from_iterable(each.values() for each in left)):
        raise SystemExit("the recording has prompts that the records lack")


def zsre(lm: LanguageModel, records: list[EditRequest], recorded: list[dict[str, Any]]) -> Iterator[Any]:
    """(name, ours, recorded) of every token's flag of zsRE."""
    asked = list(scored_prompts(records))
    special = [KINDS[question.kind] == "neighborhood" for question in asked]
    prompts, expected = [question.prompt for question in asked], [question.expected for question in asked]
    reads = official_token_reads(lm.tokenizer, prompts, expected, special)
    _, hits = predict(lm, *zip(*chain.from_iterable(reads), strict=True))
    answers: list[dict[str, list[bool]]] = [{kind: [] for kind in KINDS} for _ in records]
    said = iter(hits.tolist())
    for question, each in zip(asked, reads, strict=True):
        answers[question.record][KINDS[question.kind]] += [next(said) for _ in each]
    for ours, case in zip(answers, recorded, strict=True):
        for kind in KINDS:
            yield from (("flags", *pair) for pair in zip(ours[kind], case[f"{kind}_prompts_correct"], strict=True))


def compare(args: argparse.Namespace) -> tuple[dict[str, dict[str, float]], bool]:
    """Figures per part of the recording, and whether one is above its bar or nothing was compared."""
    recording = json.loads(args.evaluation.read_text(encoding="utf-8"))
    lm, figures = load_model(args.model), {}
    for name, ways, path in (("counterfact", counterfact, args.counterfact), ("zsre", zsre, args.zsre)):
        if path and recording.get(name):
            records = select(path, [case["case_id"] for case in recording[name]])
            figures[name] = summary(ways(lm, records, recording[name]))
    texts = [
        ("entropy", sum(map(fluency, e["texts"])) / len(e["texts"]), e["ngram_entropy"])
        for e in recording.get("fluency", ())
    ]
    if texts:
        figures["fluency"] = summary(texts)
    for name, values in figures.items():
        print(f"{name:12s} " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()))
    above = any(values.get(name, 0) > bar for values in figures.values() for name, bar in BARS.items())
    return figures, above or not figures


def summary(pairs: Any) -> dict[str, float]:
    """What was compared, and by how much it differs."""
    values: dict[str, float] = {}
    for name, ours, theirs in pairs:
        values[f"compared_{name}"] = values.get(f"compared_{name}", 0) + 1
        off = (
            float(ours != theirs) + values.get(name, 0)
            if name == "flags"
            else max(abs(ours - theirs), values.get(name, 0))
        )
        values[name] = off if off == off else float("inf")
    return values
