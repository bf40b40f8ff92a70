"""Compare WISE's parts with numbers recorded from its official code; called by ``parity_memory.py``.

Every flow is learned from its recorded rows and masks, fact by fact, and put into the model as shards: the weight after
each edit, thresholds, losses, distances and joins, then for each probe the distances, the shard that answers and the
logits. ``functions`` are joins and distances alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cakeflow_sidememory import (
    EditRows,
    LearningProblem,
    LearningRule,
    Margin,
    Rehearsal,
    ShardChange,
    ShardedProjection,
    ShardEnd,
    ShardSettings,
    join,
    learn,
    original_weight,
)
from cakeflow_sidememory.distance import activation_name, activation_of, row_distances, token_distances
from parity import error, worst_of
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cakeflow.models import LanguageModel, Site

BARS = {
    "change": 1e-8, "joined": 1e-8, "loss": 1e-8, "margin": 1e-8, "distance": 1e-8, "replay": 1e-8,
    "threshold": 1e-8, "route_distance": 1e-8, "logits": 1e-8, "routes_unequal": 0, "tokens_unequal": 0,
    "joins": 1e-7, "distances": 1e-12,
}  # fmt: skip
"""Largest errors, relative but for losses and distances; every route has to be the same. ``slerp`` was in float32."""
PADDED = "padded"
"""On GPT-2 this flow depends on an old version of transformers (README of the recordings)."""

Figures = dict[str, float]


def figures_of(info: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Figures]:
    """The largest error of each figure, by flow.

    Args:
        info: The recording.
        tensors: Its tensors.
        folder: The tiny models.
    """
    arch = info["_setup"]["model"]
    flows = [name for name in info if name != "_setup" and (name, arch) != (PADDED, "gpt2")]
    figures = {flow: Flow(info, tensors, folder, flow).figures() for flow in flows}
    return figures | ({"functions": worst_of(functions(tensors))} if "merge_function/base" in tensors else {})


def functions(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield the errors of joins and distances."""
    base, memories = tensors["merge_function/base"], tensors["merge_function/memories"]
    for name, joined in tensors.items():
        if name.startswith("merge_function/") and name.count("/") == 2:
            _, how, count = name.split("/")
            k = int(count)
            yield "joins", error(join(base, list(memories[:k]), [1 / k] * k, how), joined)  # type: ignore[arg-type]
    every = {name: tensors[f"distance_function/{name}"] for name in ("side", "main", "long_side", "long_main")}
    short = token_distances(every["side"], every["main"], activation_of("silu"))
    long = token_distances(every["long_side"], every["long_main"], activation_of("silu"))
    all_short, all_long = torch.ones_like(short).bool(), torch.ones_like(long).bool()
    yield "distances", error(row_distances(short, all_short), tensors["distance_function/mean"])
    masked = row_distances(short, tensors["distance_function/mask"].bool())
    yield "distances", error(masked, tensors["distance_function/masked"])
    yield "distances", error(row_distances(long, all_long, 100), tensors["distance_function/long_infer"])
    yield "distances", error(row_distances(long, all_long), tensors["distance_function/long_train"])


@dataclass
class Flow:
    """One recorded flow, repeated.

    Attributes:
        info: The recording.
        tensors: Its tensors.
        folder: The tiny models.
        name: The flow.
        groups: Per finished group the edits that rehearsal draws from.
        current: Those of the present group.
    """

    info: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    folder: Path
    name: str
    groups: list[list[Rehearsal]] = field(default_factory=list)
    current: list[Rehearsal] = field(default_factory=list)

    def __post_init__(self) -> None:
        setup, self.flow = self.info["_setup"], self.info[self.name]
        self.h = self.flow["hyperparameters"]
        model = AutoModelForCausalLM.from_pretrained(
            self.folder / setup["model"], dtype=torch.float64, attn_implementation=setup["attention"]
        )
        self.lm = LanguageModel.wrap(model, AutoTokenizer.from_pretrained(self.folder / "tokenizer"))
        module = self.flow["layer_path"].split("].")[-1].removesuffix(".weight")
        self.site = Site(setup["layer"], module.split(f"{setup['layer']}.", 1)[-1])
        self.rule = LearningRule(
            self.h["edit_lr"], self.h["n_iter"], Margin(self.h["alpha"], self.h["beta"], self.h["gamma"]),
            setup["weight_decay"], True, self.h["norm_constraint"], 1, self.h["replay"],
        )  # fmt: skip
        self.settings = ShardSettings(
            "retrieve" if self.h["retrieve"] else "merge", "sequence", self.h["act_ratio"], self.h["save_freq"],
            self.h["merge_freq"], self.h["merge_alg"], self.h["densities"], 100,
            activation=activation_name(self.lm), unjoined=False,
        )  # fmt: skip

    @property
    def memory(self) -> ShardedProjection:
        """The side memory now."""
        return ShardedProjection.around(self.lm.module(self.site), self.settings)

    def oriented(self, name: str) -> Tensor:
        """A recorded tensor of a weight's shape, d_out x d_in."""
        tensor = self.tensors[f"{self.name}/{name}"]
        return tensor.T if self.info["_setup"]["model"] == "gpt2" else tensor

    def figures(self) -> Figures:
        """The largest error of each figure."""
        return worst_of(self.errors())

    def errors(self) -> Iterator[tuple[str, float]]:
        """Yield the errors of all edits, then of the routes."""
        base, place = original_weight(self.lm, self.site).clone(), self.lm.architecture.path(self.site)
        mask = torch.ones_like(base).bool()
        for number, edit in enumerate(self.flow["edits"]):
            if f"{self.name}/mask/{number}" in self.tensors:
                mask = self.oriented(f"mask/{number}").bool()
            problem = self.problem(edit)
            self.current.append(problem.rehearsal)
            replayed = [self.current[index] for index in edit["replayed"]]
            memory = self.memory
            learned = learn(problem, memory.shards[0].detach(), mask, self.rule, self.groups, replayed)
            yield from self.step_errors(learned, edit["steps"])
            yield "change", error(learned.weight - base, self.oriented(f"side/{number}") - base)
            least = min(float(memory.least[0]), learned.activation)
            if edit["least_activation"] is not None:
                yield "threshold", abs(least - edit["least_activation"])
            self.put(ShardChange.of(place, memory, learned.weight, None, least, 1))
            if (number + 1) % self.settings.save_every == 0:
                self.put(ShardEnd(place, self.settings))
            if (number + 1) % self.settings.join_every == 0:
                self.groups, self.current = [*self.groups, self.current], []
                newest = self.memory.shards[1 if self.settings.rule == "merge" else -1]
                yield "joined", error(newest.detach() - base, self.oriented(f"merged/{number}") - base)
        yield from self.route_errors("routing")
        if "routing_after_call" in self.flow:
            self.join_unfinished(base)
            yield "joined", error(self.memory.shards[1].detach() - base, self.oriented("merged_by_call") - base)
            yield from self.route_errors("routing_after_call")

    def put(self, change: ShardChange | ShardEnd) -> None:
        """Make a change."""
        self.lm.put(change.place, change.build(self.lm.module(change.place)))

    def join_unfinished(self, base: Tensor) -> None:
        """Do what a call of the official wrapper does: join the unfinished shard, and begin another."""
        memory = self.memory
        parts = [memory.shards[0].detach(), memory.shards[1].detach()]
        joined = join(base, parts, [0.4, 0.6], self.settings.join, self.settings.density)
        new = memory.changed([base, joined], [float(memory.least[0]), float(memory.least[1])], int(memory.edits))
        self.lm.put(self.lm.architecture.path(self.site), new)

    def problem(self, edit: Mapping[str, Any]) -> LearningProblem:
        """The rows of an edit as recorded."""
        ids, mask, labels = (torch.tensor(edit[name]) for name in ("input_ids", "attention_mask", "labels"))
        counted = torch.ones_like(ids).bool()
        if edit["in_mask"] is None:
            rows = EditRows(ids, mask.bool(), labels, counted)
        else:
            count = len(ids) - 1
            inside = counted.clone()
            inside[:count] = torch.tensor(edit["in_mask"]).bool()[:count]
            rows = EditRows(ids, mask.bool(), labels, inside, torch.tensor(edit["out_mask"]).bool()[:count], counted)
        return LearningProblem(self.lm, self.site, rows, activation_of(self.settings.activation))

    def step_errors(self, learned: Any, steps: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
        """Yield the errors of losses and distances of one edit."""
        if len(learned.losses) != len(steps):
            yield "loss", math.inf
        for i, step in enumerate(steps):
            yield "loss", abs(learned.losses[i] - step["ft"][0])
            yield "margin", abs(learned.margins[i] - step["act"][0])
            for ours, theirs in ((learned.distances, "in_scope"), (learned.irrelevant, "out_scope")):
                yield "distance", max(abs(a - b) for a, b in zip(ours[i], step[theirs], strict=True))
            if "replay_neg" in step:
                yield "replay", abs(learned.rehearsals[i][0] - step["replay_neg"][0])
                yield "replay", abs(learned.rehearsals[i][1] - step["replay_pos"][0])

    def route_errors(self, name: str) -> Iterator[tuple[str, float]]:
        """Yield the errors of the routes of all probes."""
        last = self.tensors.get(f"{self.name}/{name}/last_logits")
        for number, probe in enumerate(self.flow.get(name, ())):
            ids = torch.tensor([probe["ids"]])
            with torch.no_grad():
                logits = self.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
            module = self.lm.module(self.site)
            assert isinstance(module, ShardedProjection)
            assert module.distances is not None
            names = ["side", *self.finished_names(module)]
            distances = dict(zip(names, module.distances[:, 0].tolist(), strict=True))
            for candidate, distance in probe["distances"].items():
                yield "route_distance", abs(distances.get(candidate, math.inf) - distance)
            yield "routes_unequal", float(["main", *names][int(module.decision[0])] != probe["chosen"])  # type: ignore[index]
            yield "tokens_unequal", float(logits.argmax(-1).tolist() != probe["argmax"])
            if last is not None:
                yield "logits", error(logits[-1], last[number])

    def finished_names(self, module: ShardedProjection) -> list[str]:
        """Names of the candidates beside the shard being written, as the recording has them."""
        count = len(module.candidates()) - 1
        return ["merged"] * count if self.settings.rule == "merge" else [f"memory{index}" for index in range(count)]
