"""Compare A3E's parts with numbers recorded from its official code; called by ``parity_memory.py``.

``edits``: trained from the recorded beginning, as one batch. ``states``: what is stored for retrieval. ``composed``:
retrieval, composition and answers of a model with the recorded factors in place. ``composed_anew``: the same under
factors of our own training. ``paper_rule``: sums without conflicts, as the paper has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cakeflow_sidememory import ComposedProjection, ComposedSettings, Retrieval
from cakeflow_sidememory.composition import (
    Representations,
    compose,
    conflicts,
    outermost,
    read_representations,
)
from cakeflow_sidememory.decoding import answer, comma_tokens
from cakeflow_sidememory.factors import FactorLoss, Factors, FactorTraining, TrainedFactors, cosines, train_factors
from parity import error, worst_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cakeflow.forward import Row, encode
from cakeflow.models import LanguageModel, Site, capture

BARS = {
    "direction": 1e-5, "output": 1e-5, "gradient_direction": 1e-5, "gradient_output": 1e-5, "losses": 1e-5,
    "neurons_unequal": 0, "tokens_unequal": 0, "state": 1e-10, "similarity": 1e-10, "input": 1e-10,
    "activation": 1e-10, "delta": 1e-10, "logits": 1e-10, "delta_anew": 1e-5, "logits_anew": 1e-5,
    "retrieved_unequal": 0, "used_unequal": 0, "conflicts_unequal": 0, "generated_unequal": 0,
}  # fmt: skip
"""Largest errors, relative but for losses; the official loss runs in float32. Every choice has to be the same."""

Figures = dict[str, float]


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


def put_memory(lm: LanguageModel, near: Site, site: Site, factors: Factors, states: Representations, part: Any) -> None:
    """Put the edits beside the projection, in place of others that are there."""
    base = lm.module(site)
    settings = ComposedSettings(lm.architecture.path(near), Retrieval(part=part), "outermost")
    arguments = (settings, factors, getattr(states, part), torch.arange(len(factors)))
    base = base.base if isinstance(base, ComposedProjection) else base
    lm.put(lm.architecture.path(site), ComposedProjection.around(base, *arguments))


def retrieval_figures(
    lm: LanguageModel, near: Site, site: Site, factors: Factors, states: Representations, info: Any, tensors: Any
) -> Iterator[tuple[str, float]]:
    """(name, figure) of every question that retrieves by itself."""
    for part in ("relation", "answer", "subject"):
        put_memory(lm, near, site, factors, states, part)
        module = lm.module(site)
        for case in info["composed"]:
            if case["select"] == "search":
                lm(input_ids=torch.tensor([case["ids"]]), use_cache=False)
                yield "similarity", error(module.similarity[0], tensors[f"composed/{case['name']}/cos_{part}"].amax(0))
                if part == "subject":
                    recorded = torch.tensor(case["similarity"], dtype=torch.float64)
                    yield "similarity", error(module.similarity[0], recorded)
                    yield "retrieved_unequal", float(module.decision[0].nonzero()[:, 0].tolist() != case["retrieved"])


def composed_figures(
    lm: LanguageModel,
    factors: Factors,
    states: Representations,
    info: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    site: Site,
    suffix: str = "",
) -> Iterator[tuple[str, float]]:
    """(name, figure) of every composed answer, by the module in its place; an oracle names the edits of some."""
    near = Site(layer_of(info, "similarity_module"), "mlp_out")
    yield from retrieval_figures(lm, near, site, factors, states, info, tensors)
    module = lm.module(site)
    assert isinstance(module, ComposedProjection)
    for case in info["composed"]:
        if case["generated"] is None:
            continue
        index = case["index"] if isinstance(case["index"], list) else [case["index"]]
        with module.oracle(index) if case["select"] != "search" else nullcontext():
            yield from answer_figures(lm, module, case, tensors, site, suffix)
    lm.put(lm.architecture.path(site), module.base)


def answer_figures(
    lm: LanguageModel, module: ComposedProjection, case: Mapping[str, Any], tensors: Any, site: Site, suffix: str
) -> Iterator[tuple[str, float]]:
    """(name, figure) of one composed answer."""
    length, stem = len(case["ids"]), f"composed/{case['name']}"
    tokens, logits = answer(lm, case["ids"], len(case["generated"]) - length, comma_tokens(lm))
    yield "generated_unequal", float([*case["ids"], *tokens] != case["generated"])
    yield f"logits{suffix}", error(logits[:3], tensors[f"{stem}/logits"])
    with capture(lm, [site], side="in") as inputs, capture(lm, [site]) as outputs, torch.no_grad():
        lm(input_ids=torch.tensor([case["ids"]]), use_cache=False)
    x = inputs[site][0, -1]
    factors, chosen = module.factors, outermost(module.decision[0].nonzero()[:, 0].tolist(), len(module))
    yield "used_unequal", float(sorted(set(chosen)) != case["used"])
    with torch.no_grad():
        changes, delta = factors.part(chosen).changes(x), outputs[site][0] - module.base(inputs[site][0])
    yield "conflicts_unequal", float(conflicts(changes).sum() != case["conflicts"])
    yield f"delta{suffix}", error(delta[-1], tensors[f"{stem}/delta"])
    yield f"delta{suffix}", float(delta[:-1].abs().sum())
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
