"""``cakeflow trace`` and ``cakeflow facts``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from cakeflow.errors import ConfigError
from cakeflow.models.loading import load_model
from cakeflow.report import (
    plot_trace,
    plot_weights,
    save_plot,
    trace_table,
)
from cakeflow.storage.atomic import write_text
from cakeflow.tracing import (
    CausalTrace,
    KnownFact,
    Trace,
    known_facts,
    known_rows,
    open_facts,
    propose_layers,
    read_facts,
)
from cakeflow.tracing.trace import require_layers
from cakeflow.weighters.base import effective_layers
from cakeflow.weighters.scores import Normalization, score_weights


def run_trace(
    model: str = "smollm2-135m",
    data: str = "builtin",
    layers: list[int] | None = None,
    out: Path = Path("runs/trace"),
    limit: int | None = None,
    tau: float = 0.1,
    normalization: Normalization = "none",
    trace: CausalTrace = CausalTrace(),
    split: str | None = None,
) -> Trace:
    """Find out which layers recall what a model knows: scores, heat map and weights.

    Facts that the model does not state by itself are left out. Writes ``trace.json``, ``map.png`` and ``weights.png``.

    Args:
        model: An embedded name, a hub id, a folder or a GGUF file.
        data: ``builtin``, or a file, URL, folder or hub data set of known facts (ROME's schema) or of requests with a
            true target.
        layers: Layers to trace; all by default.
        out: Folder for the results.
        limit: Most facts to trace.
        tau: Temperature of the weights shown.
        normalization: Of the scores, before the weights.
        trace: How it is done.
        split: Of a data set that has several.
    """
    console, facts, lm = Console(), read_facts(data, split), load_model(model)
    traced = require_layers(lm, layers or ())
    known, asked = known_rows(lm, facts, limit)
    console.print(f"the model knows {len(known)} of {asked} facts; the others are left out")
    found = trace.run(lm, known, traced)
    scores = found.scores
    weights = score_weights(torch.tensor(list(scores.values()), dtype=torch.float64), tau, normalization)
    shares = dict(zip(scores, weights.tolist(), strict=True))
    console.print(trace_table(found, shares))
    console.print(f"clean {found.clean.mean():.3f}, corrupted {found.corrupted.mean():.3f}, ", end="")
    console.print(f"noise {found.settings['noise']:.4g}; N_eff {float(effective_layers(weights)):.2f}")
    if trace.role == "mlp_out" and trace.window > 1 and found.layers == list(range(lm.depth)):
        proposal = propose_layers(found, lm.depth)
        console.print(f"proposed layers {proposal.layers}: {proposal.reason}", soft_wrap=True)
    found.save(out / "trace.json")
    save_plot(plot_trace(found), out / "map.png")
    save_plot(plot_weights(scores, shares), out / "weights.png")
    console.print(f"written to {out}", soft_wrap=True)
    return found


def run_facts(
    model: str = "smollm2-135m",
    data: str = "builtin",
    split: str | None = None,
    prompts: list[str] | None = None,
    subjects: list[str] | None = None,
    out: Path = Path("runs/known_facts.json"),
    limit: int | None = None,
) -> list[KnownFact]:
    """Write down which facts a model states by itself, in ROME's ``known_1000`` schema: ``cakeflow trace`` reads it.

    Args:
        model: An embedded name, a hub id, a folder or a GGUF file.
        data: Facts to ask for: ``builtin``, or a file, URL, folder or hub data set of known facts (ROME's schema) or of
            requests with a true target.
        split: Of a data set that has several.
        prompts: Texts with one ``{}`` each, asked about every subject instead of ``data``: the first name that the
            model gives is taken for the answer, right or wrong.
        subjects: What the prompts are about.
        out: The file; with the suffix ``.jsonl`` one fact a line, otherwise one JSON list.
        limit: Most facts to write.
    """
    if out.is_dir():
        raise ConfigError(f"out={str(out)!r} is a folder; name a .json or .jsonl file")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    console = Console()
    asking = open_facts(prompts or [], subjects or []) if prompts or subjects else read_facts(data, split)
    known, asked = known_facts(load_model(model), asking, limit)
    entries = [each.to_dict(number) for number, each in enumerate(known)]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    write_text(out, lines if out.suffix == ".jsonl" else json.dumps(entries, ensure_ascii=False, indent=1))
    console.print(f"the model states {len(known)} of {asked} facts by itself; written to {out}", soft_wrap=True)
    return known
