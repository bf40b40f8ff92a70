"""Time a causal trace against the plain way: one full forward pass per fact, layer and token, as in ROME's code.

    python benchmarks/bench_trace.py [--json FILE]

Both trace the same facts with the same noise in every layer: ``subject`` restores at the subject's last token only,
``all`` at every token from the subject's first on, ``window`` the outputs of 10 MLPs together at the subject's last
token. The reference runs the clean prompt and the noisy ones as one batch, hooks the restored modules and reads the
probability of the object at the end. ``error`` is the largest difference of an effect, over the largest effect. The
first fact alone warms both ways up.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from paired import compare, parser
from torch import Tensor, nn

from cakeflow.forward import Row
from cakeflow.models import LanguageModel, Site, load_model
from cakeflow.tracing import LAST_SUBJECT, PLACES, CausalTrace, Trace, known_rows, noise_of, place_of, read_facts

TOLERANCE = 1e-4
TRACES = {"subject": CausalTrace(), "all": CausalTrace(tokens="all"), "window": CausalTrace(role="mlp_out", window=10)}


@torch.no_grad()
def chance(lm: LanguageModel, row: Row, noise: Tensor, put: dict[Site, int]) -> Tensor:
    """Probability of the object in the clean run and in the noisy ones, with clean outputs put back in the latter."""
    ids = torch.tensor([row.ids[: row.target]])
    embeds = lm.embedding[ids].repeat(len(noise) + 1, 1, 1)
    embeds[1:] += noise

    def hook(at: int) -> object:
        def restore(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
            output[1:, at] = output[:1, at]
            return output

        return restore

    handles = [lm.module(site).register_forward_hook(hook(at)) for site, at in put.items()]
    logits = lm.model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits[:, -1].softmax(-1)[:, row.ids[row.target]]


def plain(lm: LanguageModel, rows: list[Row], trace: CausalTrace, scale: float) -> Tensor:
    """Effects by fact, place and layer, one restoration at a time."""
    effects = torch.zeros(len(rows), len(PLACES), lm.depth, dtype=torch.float64)
    for i, row in enumerate(rows):
        noise = noise_of(lm, [row], scale, trace)[0]
        low = chance(lm, row, noise, {})[1:].mean()
        tokens = range(row.start, row.target) if trace.tokens == "all" else [row.subject]
        places = [place_of(row, token) for token in tokens]
        for token, place in zip(tokens, places, strict=True):
            for layer in range(lm.depth):
                sites = {Site(each, trace.role): token for each in trace.span(layer, lm.depth)}
                high = chance(lm, row, noise, sites)[1:].mean()
                effects[i, place, layer] += (high - low) / places.count(place)
        absent = [place for place in range(len(PLACES)) if place not in places]
        effects[i, absent] = torch.nan
    return effects


def ours(lm: LanguageModel, rows: list[Row], trace: CausalTrace) -> Trace:
    """The library's trace, nothing cached."""
    with tempfile.TemporaryDirectory() as folder:
        return trace.run(lm, rows, folder=Path(folder))


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference of an effect, over the largest effect; infinite where one of them has none."""
    if not torch.equal(got.isnan(), want.isnan()):
        return float("inf")
    return float((got - want).abs().nan_to_num().max() / want[:, LAST_SUBJECT].abs().max())


def main() -> int:
    """Trace both ways; the exit status."""
    args_of = parser(__doc__, repeats=1)
    args_of.add_argument("--facts", type=int, default=8)
    args_of.add_argument("--only", choices=TRACES, nargs="+", default=[*TRACES])
    args = args_of.parse_args()
    torch.set_num_threads(args.threads)
    lm = load_model("smollm2-135m", dtype="float32")
    rows, _ = known_rows(lm, read_facts("builtin"), args.facts)
    scale = ours(lm, rows[:1], CausalTrace(noise=None)).settings["noise"]
    print(f"{len(rows)} facts, {lm.depth} layers, 10 draws")
    ways = {}
    for name in args.only:
        trace = CausalTrace(**{**vars(TRACES[name]), "noise": scale})
        ways[name] = (
            lambda rows, trace=trace: ours(lm, rows, trace).effects,
            lambda rows, trace=trace: plain(lm, rows, trace, scale),
            difference,
            TOLERANCE,
        )
    return compare(ways, rows, args)


if __name__ == "__main__":
    sys.exit(main())
