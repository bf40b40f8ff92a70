"""Time the keys and values that a batch of edits needs at five layers, against the forward passes of the official code.

    python benchmarks/bench_keys.py [--json FILE]

Ours is ``FactReader``: prompts cut after the subject, whose hidden states climb the model once. The reference is what
AlphaEdit's code runs: per layer a forward pass with logits over all facts in all contexts (keys) and one over the bare
prompts (values); after the last layer the key passes of all layers again, for the history. Both take token ids. Between
layers both change the layer's weight by the same random matrix of rank one, as an edit would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from paired import alternate, parser, report
from torch import Tensor

from cakeflow import GradientSearch
from cakeflow.data import builtin_facts
from cakeflow.forward import FactReader, TextBatch, encode_batch, generate_contexts
from cakeflow.models import LanguageModel, Site, load_model

LAYERS = [9, 10, 11, 12, 13]
TOLERANCE = 1e-4
PROMPTS_AT_ONCE = 128

Walk = list[tuple[Tensor, Tensor]]


@torch.no_grad()
def walk(lm: LanguageModel, read: Callable[[int], tuple[Tensor, Tensor]], after: Callable[[], None]) -> Walk:
    """Read every layer, change it, go on; the weights are put back."""
    gen = torch.Generator().manual_seed(0)
    kept = {layer: lm.weight(Site(layer, "mlp_out")).detach().clone() for layer in LAYERS}
    seen = []
    try:
        for layer in LAYERS:
            seen.append(read(layer))
            weight = lm.weight(Site(layer, "mlp_out"))
            left, right = (torch.randn(size, generator=gen) for size in weight.shape)
            weight.add_(torch.outer(left, right), alpha=0.02 * float(weight.norm() / left.norm() / right.norm()))
        after()
    finally:
        for layer, weight in kept.items():
            lm.weight(Site(layer, "mlp_out")).copy_(weight)
    return seen


@torch.no_grad()
def at_subjects(lm: LanguageModel, rows: list[tuple[tuple[int, ...], int]], site: Site, side: str) -> Tensor:
    """What enters or leaves a module at one position of each prompt: full forward passes, as in the official code."""
    keys: list[Tensor] = []
    for start in range(0, len(rows), PROMPTS_AT_ONCE):
        part = rows[start : start + PROMPTS_AT_ONCE]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
        seen: list[Tensor] = []
        handle = lm.module(site).register_forward_hook(
            lambda _m, inputs, out, seen=seen: seen.append(inputs[0] if side == "in" else out)
        )
        lm.model(input_ids=ids, attention_mask=mask, use_cache=False)
        handle.remove()
        keys.append(seen[0][torch.arange(len(part)), torch.tensor([last for _, last in part])])
    return torch.cat(keys)


def official(lm: LanguageModel, batch: TextBatch, value_site: Site) -> Walk:
    """Keys and values with full forward passes."""
    prompts = [(row.ids[: row.target], row.subject) for rows in batch.rows for row in rows]
    bare = [(rows[0].ids[: rows[0].target], rows[0].subject) for rows in batch.rows]

    def keys(layer: int) -> Tensor:
        each = at_subjects(lm, prompts, Site(layer, "mlp_out"), "in").unflatten(0, (len(batch), -1))
        return (each[:, 0] + each[:, 1:].mean(1)) / 2

    def for_history() -> None:
        for layer in LAYERS:
            again.append(keys(layer))

    again: list[Tensor] = []
    seen = walk(lm, lambda layer: (keys(layer), at_subjects(lm, bare, value_site, "out")), for_history)
    if not all(torch.equal(key, late) for (key, _), late in zip(seen, again, strict=True)):
        raise AssertionError("keys of the history differ from those that were read before the layer changed")
    return seen


def ours(lm: LanguageModel, batch: TextBatch, value_site: Site) -> Walk:
    """Keys and values in one climb; the history takes the keys that were read."""
    reader = FactReader(lm, batch)
    return walk(lm, lambda layer: reader.read(Site(layer, "mlp_out"), value_site)[::2], lambda: None)


def difference(got: Walk, want: Walk) -> float:
    """Largest relative Frobenius error of a layer's keys or values."""
    pairs = [pair for mine, other in zip(got, want, strict=True) for pair in zip(mine, other, strict=True)]
    return max(float((mine - other).norm() / other.norm()) for mine, other in pairs)


def main() -> int:
    """Read both ways; the exit status."""
    args_of = parser(__doc__, repeats=2)
    args_of.add_argument("--n", type=int, default=24, help="facts")
    args = args_of.parse_args()
    torch.set_num_threads(args.threads)
    lm = load_model("smollm2-135m", dtype="float32")
    batch = encode_batch(lm, builtin_facts()[: args.n], generate_contexts(lm))
    value_site = GradientSearch().value_site(LAYERS[-1])
    print(f"{len(batch)} facts in {len(batch.weights)} contexts, layers {LAYERS}")
    times = alternate(
        lambda _number: ours(lm, batch, value_site),
        lambda _number: official(lm, batch, value_site),
        difference,
        args.repeats,
        TOLERANCE,
    )
    return report({"keys": times}, args.json)


if __name__ == "__main__":
    sys.exit(main())
