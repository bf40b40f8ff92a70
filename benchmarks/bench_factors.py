"""Time the training of A3E's factors against the plain way.

    python benchmarks/bench_factors.py [--edits 8] [--reference 2] [--steps 50] [--json FILE]

Both sides train the same edits of the last block's up projection from the same beginnings in the same process. The
plain way is the official loop: one edit at a time and its batch of twelve rows (eleven copies and one with the answer
masked), each with one token more; every step runs every block over whole rows and computes all logits. ``ratio`` is
its time per edit over ours, ``ratio_alone`` the same with our edits one by one. Exits 1 if a loss differs by more than
a thousandth, or a ratio is below 8.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cakeflow_sidememory.factors import FactorTraining, answer_loss, initial_directions, train_factors
from cakeflow_sidememory.neurons import neuron_scores, select_neurons
from torch import Tensor
from torch.nn.functional import normalize

from cakeflow import Contexts
from cakeflow.data import builtin_facts
from cakeflow.forward import Row, encode_batch
from cakeflow.models import LanguageModel, Site, load_model

COPIES = 11
"""Rows of the official batch with the answer; one more has it masked."""
BAR = 8.0


def plain(lm: LanguageModel, row: Row, site: Site, training: FactorTraining, start: Tensor) -> Tensor:
    """Train one edit the plain way; the losses before each step, CE, O, C and total."""
    tokens = torch.tensor(row.ids)
    masked = tokens.clone()
    masked[row.target :] = lm.tokenizer.eos_token_id or 0
    ids = torch.stack([*[tokens] * COPIES, masked])
    with torch.no_grad():
        following = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].argmax(-1)
    ids = torch.cat([ids, following[:, None]], 1)
    scores = neuron_scores(lm, site.layer, tokens[row.target :])
    neurons = select_neurons(scores, training.share, training.select)
    a = start.float().clone().requires_grad_()
    b = torch.zeros(len(neurons)).requires_grad_()
    adam = torch.optim.Adam([a, b], lr=training.lr)
    schedule = torch.optim.lr_scheduler.StepLR(adam, training.halve_every, 0.5)
    reach: list[Tensor] = []

    def change(_module: object, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        reach[:] = [normalize(args[0].float(), dim=-1) @ normalize(a, dim=0)]
        delta = training.scale * reach[0][..., None] * (b * neurons)
        return output + torch.cat([torch.zeros_like(delta[:, : row.target - 1]), delta[:, row.target - 1 :]], 1)

    end, history = len(row.ids) - 1, []
    handle = lm.module(site).register_forward_hook(change)
    try:
        for _ in range(training.steps):
            logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            read = logits[:COPIES, row.target - 1 : end].flatten(0, 1)
            likelihood, others = (
                each.mean() for each in answer_loss(read, ids[:COPIES, row.target : end + 1].flatten())
            )
            last = reach[0][:COPIES, end].abs().mean() / 2
            total = likelihood + training.others * others + training.last * last
            adam.zero_grad()
            total.backward()
            adam.step()
            schedule.step()
            history.append(torch.stack([likelihood, others, last, total]).detach())
    finally:
        handle.remove()
    return torch.stack(history, 1)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def main() -> int:
    """Run both sides; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--reference", type=int, default=2, help="edits that are trained the plain way as well")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    lm = load_model("smollm2-135m")
    lm.model.requires_grad_(False)
    training, site = FactorTraining(args.steps), Site(lm.depth - 1, "mlp.up_proj")
    rows = [variants[0] for variants in encode_batch(lm, builtin_facts()[: args.edits], Contexts()).rows]
    start = initial_directions(range(len(rows)), lm.width, training.blocks)
    short = FactorTraining(2)
    train_factors(lm, rows, site, short, start)  # warm-up
    plain(lm, rows[0], site, short, start[0])
    ours, seconds = timed(lambda: train_factors(lm, rows, site, training, start))
    _, alone = timed(lambda: [train_factors(lm, [row], site, training, start[i : i + 1]) for i, row in enumerate(rows)])
    count = min(args.reference, len(rows))
    theirs, plain_seconds = timed(lambda: [plain(lm, rows[i], site, training, start[i]) for i in range(count)])
    off = torch.stack(list(ours.losses), 1)[:count] - torch.stack(theirs)
    figures = {
        "ratio": plain_seconds / count / (seconds / len(rows)),
        "ratio_alone": plain_seconds / count / (alone / len(rows)),
        "seconds_per_edit": seconds / len(rows),
        "seconds_per_edit_alone": alone / len(rows),
        "reference_seconds_per_edit": plain_seconds / count,
        "loss_error_max": float(off.abs().max()),
        "likelihood_first": float(ours.losses.likelihood[:, 0].mean()),
        "likelihood_last": float(ours.losses.likelihood[:, -1].mean()),
    }
    print(f"{len(rows)} edits, {args.steps} steps, {torch.get_num_threads()} threads")
    for name, value in figures.items():
        print(f"{name:28s} {value:10.4g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return int(not (figures["loss_error_max"] <= 1e-3 and min(figures["ratio"], figures["ratio_alone"]) >= BAR))


if __name__ == "__main__":
    sys.exit(main())
