"""Compare A3E's parts with numbers recorded from its official code; called by ``parity_memory.py``.

``edits``: trained from the recorded beginning, as one batch. ``states``: what is stored for retrieval. ``composed``:
retrieval, composition and answers under the recorded factors. ``composed_anew``: the same under factors of our own
training. ``paper_rule``: sums without conflicts, as the paper has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from cakeflow_sidememory.composition import (
    Representations,
    Retrieval,
    answer,
    comma_tokens,
    compose,
    composed_change,
    conflicts,
    outermost,
    read_representations,
    similarities,
)
from cakeflow_sidememory.factors import FactorLoss, Factors, FactorTraining, TrainedFactors, cosines, train_factors
from parity import error
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cakeflow.forward import Row, encode
from cakeflow.models import LanguageModel, Site

BARS = {
    "direction": 1e-5, "output": 1e-5, "gradient_direction": 1e-5, "gradient_output": 1e-5, "losses": 1e-5,
    "neurons_unequal": 0, "tokens_unequal": 0, "state": 1e-10, "similarity": 1e-10, "input": 1e-10,
    "activation": 1e-10, "delta": 1e-10, "logits": 1e-10, "delta_anew": 1e-5, "logits_anew": 1e-5,
    "retrieved_unequal": 0, "used_unequal": 0, "conflicts_unequal": 0, "generated_unequal": 0,
}  # fmt: skip
"""Largest errors, relative but for losses; the official loss runs in float32. Every choice has to be the same."""

Figures = dict[str, float]


def worst_of(pairs: Iterator[tuple[str, float]]) -> Figures:
    """The largest figure of each name."""
    worst: Figures = {}
    for name, value in pairs:
        worst[name] = max(worst.get(name, 0.0), value)
    return worst


def rows_of(lm: LanguageModel, info: Mapping[str, Any]) -> list[Row]:
    """The edits' rows, subjects at the recorded tokens."""
    texts = [f"{edit['prompt']} {edit['answer']}" for edit in info["edits"]]
    rows = encode(lm.tokenizer, texts, [0] * len(texts), [len(edit["prompt"]) for edit in info["edits"]])
    pairs = zip(rows, info["edits"], strict=True)
    return [Row(row.ids, edit["subject_token"], row.target) for row, edit in pairs]


def training_of(info: Mapping[str, Any], neurons: int) -> FactorTraining:
    """The recorded constants."""
    setup = info["_setup"]
    weights, share = setup["weights"], setup["kept_neurons_per_token"] / neurons
    if setup["schedule"] != "halved every 20 steps" or weights["ce"] != 1:
        raise SystemExit(f"a3e: a schedule or weights of another kind: {setup['schedule']}, {weights}")
    return FactorTraining(
        setup["steps"], setup["lr"], 20, setup["blocks"], share, others=weights["others"], last=weights["last"]
    )


def compare_edits(
    lm: LanguageModel, rows: list[Row], info: Mapping[str, Any], tensors: Mapping[str, Tensor], site: Site
) -> tuple[TrainedFactors, Figures]:
    """Train all edits, and compare losses, gradients, neurons and factors."""
    training, start = training_of(info, len(lm.oriented(site))), tensors["A_init"].T
    result = train_factors(lm, rows, site, training, start)
    return result, worst_of(edit_figures(lm, rows, result, info, tensors, site))


def edit_figures(
    lm: LanguageModel,
    rows: list[Row],
    result: TrainedFactors,
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    site: Site,
) -> Iterator[tuple[str, float]]:
    """(name, figure) of every number of every edit."""
    training, names = training_of(info, len(lm.oriented(site))), ("ce", "others", "last", "total")
    for i, (row, edit) in enumerate(zip(rows, info["edits"], strict=True)):
        factors = result.factors
        yield "tokens_unequal", float((list(row.ids), row.target) != (edit["input_ids"], edit["answer_starts"]))
        yield "neurons_unequal", float((factors.neurons[i] != tensors[f"edit/{i}/kept"].bool()).sum())
        yield "direction", error(factors.direction[i], tensors[f"edit/{i}/A"])
        yield "output", error(factors.output[i], tensors[f"edit/{i}/B"])
        a = tensors["A_init"].T[i : i + 1].clone().requires_grad_()
        b = torch.zeros_like(factors.output[i : i + 1]).requires_grad_()
        FactorLoss.of(lm, [row], site, training)(a, b).total.sum().backward()
        yield "gradient_direction", error(a.grad[0], tensors[f"edit/{i}/gradient_A"])
        yield "gradient_output", error(b.grad[0], tensors[f"edit/{i}/gradient_B"])
        recorded = torch.tensor([[step[name] for step in edit["steps"]] for name in names], dtype=torch.float64)
        off = (torch.stack([each[i] for each in result.losses]) - recorded).abs().max()
        yield "losses", float(off) if bool(off.isfinite()) else float("inf")


def compare_states(
    lm: LanguageModel, rows: list[Row], info: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Representations, Figures]:
    """Read what is stored for each edit, and compare it."""
    states = read_representations(lm, rows, layer_of(info, "key_module"), layer_of(info, "similarity_module"))
    keys = torch.stack([tensors[f"edit/{i}/key"] for i in range(len(rows))])
    parts = [(states.key, keys)]
    parts += [(getattr(states, part), tensors[f"representation/{part}"]) for part in ("subject", "relation", "answer")]
    return states, worst_of(("state", error(*pair)) for pair in parts)


def layer_of(info: Mapping[str, Any], module: str) -> int:
    """The block of a recorded module path."""
    return int(info["_setup"][module].split(".")[2])


def edits_of(
    lm: LanguageModel, case: Mapping[str, Any], states: Representations, tensors: Mapping[str, Tensor], layer: int
) -> tuple[tuple[int, ...], list[tuple[str, float]]]:
    """The edits of one composed answer, retrieved where the recording retrieves them, and what differs."""
    index = case["index"]
    if case["select"] != "search":
        return tuple(index) if isinstance(index, list) else (index,), []
    question = Row(tuple(case["ids"]), -1, len(case["ids"]))
    similarity = similarities(lm, [question], states, layer)[0]
    recorded = torch.tensor(case["similarity"], dtype=torch.float64)
    edits = Retrieval().choose(similarity)
    figures = [
        ("similarity", error(similarity, recorded)),
        ("retrieved_unequal", float(list(edits) != case["retrieved"])),
    ]
    for part in ("subject", "relation", "answer"):
        cosine = tensors[f"composed/{case['name']}/cos_{part}"]
        figures.append(("similarity", error(similarities(lm, [question], states, layer, part)[0], cosine.amax(0))))
    return edits, figures


def composed_figures(
    lm: LanguageModel,
    factors: Factors,
    states: Representations,
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    site: Site,
    suffix: str = "",
) -> Iterator[tuple[str, float]]:
    """(name, figure) of every composed answer."""
    for case in info["composed"]:
        edits, figures = edits_of(lm, case, states, tensors, layer_of(info, "similarity_module"))
        yield from figures
        if case["generated"] is not None:
            yield from answer_figures(lm, factors, edits, case, tensors, site, suffix)


def answer_figures(
    lm: LanguageModel,
    factors: Factors,
    edits: tuple[int, ...],
    case: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    site: Site,
    suffix: str,
) -> Iterator[tuple[str, float]]:
    """(name, figure) of one composed answer."""
    inputs: list[Tensor] = []

    def change(x: Tensor) -> Tensor:
        inputs.append(x)
        return composed_change(factors, edits, x, "outermost")

    length, stem = len(case["ids"]), f"composed/{case['name']}"
    count = len(case["generated"]) - length
    tokens, logits = answer(lm, case["ids"], site, change, count, comma_tokens(lm))
    yield "generated_unequal", float([*case["ids"], *tokens] != case["generated"])
    yield f"logits{suffix}", error(logits[:3], tensors[f"{stem}/logits"])
    x, chosen = inputs[0][0], outermost(edits, len(factors))
    yield "used_unequal", float(sorted(set(chosen)) != case["used"])
    changes = factors.part(chosen).changes(x)
    yield "conflicts_unequal", float(conflicts(changes).sum() != case["conflicts"])
    yield f"delta{suffix}", error(composed_change(factors, edits, x, "outermost"), tensors[f"{stem}/delta"])
    for number, each in enumerate(changes, 1):
        yield f"delta{suffix}", error(each, tensors[f"{stem}/delta_{number}"])
    if not suffix:
        yield "input", error(torch.nn.functional.normalize(x, dim=-1), tensors[f"{stem}/x"])
        reach = torch.zeros(len(factors), dtype=x.dtype)
        reach[list(chosen)] = cosines(x, factors.direction)[list(chosen)]
        yield "activation", error(reach, tensors[f"{stem}/activation"])


def figures_of(info: Mapping[str, Any], tensors: Mapping[str, Tensor], tiny: Path) -> dict[str, Figures]:
    """Figures of each part of a recording.

    Args:
        info: Setup, edits and composed answers.
        tensors: The recorded tensors.
        tiny: The folder of the models.
    """
    setup = info["_setup"]
    model = AutoModelForCausalLM.from_pretrained(tiny / setup["model"], dtype=getattr(torch, setup["dtype"]))
    lm = LanguageModel.wrap(model, AutoTokenizer.from_pretrained(tiny / "tokenizer"))
    rows, site = rows_of(lm, info), Site(layer_of(info, "lora_module"), "mlp.up_proj")
    trained, edits = compare_edits(lm, rows, info, tensors, site)
    states, stored = compare_states(lm, rows, info, tensors)
    parts = [torch.stack([tensors[f"edit/{i}/{name}"] for i in range(len(rows))]) for name in ("A", "B", "kept")]
    recorded = Factors(parts[0], parts[1], parts[2].bool(), trained.factors.scale)
    arguments = (states, info, tensors, site)
    rule = {
        "delta": max(
            error(compose(tensors[f"paper_rule/{name}/deltas"]), tensors[f"paper_rule/{name}/sum"])
            for name in info["paper_rule"]
        )
    }
    return {
        "edits": edits,
        "states": stored,
        "composed": worst_of(composed_figures(lm, recorded, *arguments)),
        "composed_anew": worst_of(composed_figures(lm, trained.factors, *arguments, "_anew")),
        "paper_rule": rule,
    }
