"""The commands ``cakeflow trace`` and ``cakeflow facts``."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console

from cakeflow.cli.console import say
from cakeflow.errors import ConfigError, require_count
from cakeflow.models.loading import Loading, load_model
from cakeflow.report.figures import plot_trace, plot_weights, save_plot
from cakeflow.report.tables import trace_table
from cakeflow.storage.atomic import write_text
from cakeflow.tracing.facts import KnownFact, known_facts, known_rows, open_facts, read_facts
from cakeflow.tracing.result import Trace
from cakeflow.tracing.trace import CausalTrace, require_layers
from cakeflow.tracing.window import propose_layers
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
    loading: Loading = Loading(),
) -> Trace:
    """Measure by causal tracing which layers recall facts, and write scores, a heat map and layer weights.

    Facts that the model does not state by itself are left out. The files are ``trace.json``, ``map.png`` and
    ``weights.png``.

    Args:
        model: An embedded name, a hub id, a folder or a GGUF file.
        data: ``builtin``, or a file, URL, folder or hub data set with known facts (ROME's schema) or with requests that
            have a true target.
        layers: Layers to trace; all by default.
        out: Folder for the results.
        limit: Largest number of facts to trace.
        tau: Temperature of the softmax that turns scores into the weights shown.
        normalization: Normalization of the scores before that softmax.
        trace: Settings of the trace, such as its window and number of noise draws.
        split: Split of a data set that has several.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If ``limit`` is below 1.
    """
    require_count("limit", limit, 1, optional=True)
    facts, lm = read_facts(data, split), load_model(model, **loading.arguments())
    traced = require_layers(lm, layers or ())
    rows, tried = known_rows(lm, facts, limit)
    say(f"the model knows {len(rows)} of {tried} facts; the others are left out")
    result = trace.run(lm, rows, traced)
    scores = result.scores
    weights = score_weights(torch.tensor(list(scores.values()), dtype=torch.float64), tau, normalization)
    shares = dict(zip(scores, weights.tolist(), strict=True))
    Console().print(trace_table(result, shares))
    say(f"clean {result.clean.mean():.3f}, corrupted {result.corrupted.mean():.3f}, ", end="")
    say(f"noise {result.settings['noise']:.4g}; N_eff {float(effective_layers(weights)):.2f}")
    if trace.role == "mlp_out" and trace.window > 1 and result.layers == list(range(lm.depth)):
        proposal = propose_layers(result, lm.depth)
        say(f"proposed layers {proposal.layers}: {proposal.reason}")
    result.save(out / "trace.json")
    save_plot(plot_trace(result), out / "map.png")
    save_plot(plot_weights(scores, shares), out / "weights.png")
    say(f"written to {out}")
    return result


def run_facts(
    model: str = "smollm2-135m",
    data: str = "builtin",
    split: str | None = None,
    prompts: list[str] | None = None,
    subjects: list[str] | None = None,
    out: Path = Path("runs/known_facts.json"),
    limit: int | None = None,
    loading: Loading = Loading(),
) -> list[KnownFact]:
    """Write the facts that a model states by itself to a file, which ``cakeflow trace --data`` reads.

    The file has the schema of ROME's ``known_1000``.

    Args:
        model: An embedded name, a hub id, a folder or a GGUF file.
        data: Candidate facts: ``builtin``, or a file, URL, folder or hub data set with known facts (ROME's schema) or
            with requests that have a true target.
        split: Split of a data set that has several.
        prompts: Prompts with one ``{}`` each, used with every subject in place of ``data``; the first name in the
            model's continuation counts as its answer, right or wrong.
        subjects: Subjects of the prompts.
        out: JSON file; with the suffix ``.jsonl``, one fact per line.
        limit: Largest number of facts to write.
        loading: --loading.NAME, how a model is loaded.

    Raises:
        ConfigError: If ``out`` is a folder, or ``limit`` is below 1.
    """
    if out.is_dir():
        raise ConfigError(f"out={str(out)!r} is a folder; name a .json or .jsonl file")
    require_count("limit", limit, 1, optional=True)
    candidates = open_facts(prompts or [], subjects or []) if prompts or subjects else read_facts(data, split)
    facts, tried = known_facts(load_model(model, **loading.arguments()), candidates, limit)
    entries = [fact.to_dict(number) for number, fact in enumerate(facts)]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    write_text(out, lines if out.suffix == ".jsonl" else json.dumps(entries, ensure_ascii=False, indent=1))
    say(f"the model states {len(facts)} of {tried} facts by itself; written to {out}")
    return facts
