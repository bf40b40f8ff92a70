"""Time the learning of a side memory against the plain way: every step a pass of the whole model with gradients.

    python benchmarks/bench_sidememory.py [--layer 25] [--steps 10] [--facts 2]

SmolLM2-135M, the rows of ``wise`` (eleven contexts and an irrelevant text), both ways one after another in this
process, with the same losses: exits 1 where they differ by more than 1e-3, or the ratio is below 4.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from cakeflow_sidememory import LearningProblem, LearningRule, learn, original_weight
from cakeflow_sidememory.distance import Activation, activation_name, activation_of, row_distances, token_distances
from cakeflow_sidememory.objective import likelihood_loss
from cakeflow_sidememory.rows import edit_rows, sampled_contexts
from torch import Tensor
from torch.func import functional_call

from cakeflow.data import builtin_facts
from cakeflow.forward import encode_batch, encode_texts
from cakeflow.models import LanguageModel, Site, capture, load_model

BAR, TOLERANCE = 4.0, 1e-3


def plain(
    lm: LanguageModel, problem: LearningProblem, mask: Tensor, rule: LearningRule, activation: Activation
) -> list[float]:
    """Losses of an edit that is learned by whole passes, with all logits."""
    rows, name = problem.rows, lm.weight_name(problem.site)
    base = original_weight(lm, problem.site)
    weight, losses = base.clone(), []
    inputs = {"input_ids": rows.ids, "attention_mask": rows.mask.long(), "use_cache": False}
    row, column, label = rows.places
    assert rule.margin is not None
    for _ in range(rule.steps):
        leaf = weight.clone().requires_grad_()
        with capture(lm, [problem.site], side="in") as keys, capture(lm, [problem.site]) as answers, lm.running():
            logits = functional_call(lm.model, {name: leaf}, (), inputs, tie_weights=False).logits
        main = torch.nn.functional.linear(keys[problem.site], base)
        distances = row_distances(token_distances(answers[problem.site], main, activation), rows.counted)
        each = torch.nn.functional.cross_entropy(logits[row, column].float(), label, reduction="none")
        margin = rule.margin(distances[: rows.edited], distances[rows.edited :])
        loss = likelihood_loss(each, row, rows.edited) + margin
        (gradient,) = torch.autograd.grad(loss, leaf)
        losses.append(float(loss.detach()))
        weight = weight - rule.lr * (gradient * mask + rule.decay * weight * mask)
        if rule.clamp is not None:
            weight = torch.minimum(torch.maximum(weight, base - rule.clamp), base + rule.clamp)
    return losses


def main() -> int:
    """Print seconds and ratio; the exit status."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--layer", type=int, default=25)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--facts", type=int, default=2)
    args = options.parse_args()
    lm, facts = load_model("smollm2-135m"), builtin_facts()[: args.facts]
    site, activation = Site(args.layer, "mlp_out"), activation_of(activation_name(lm))
    batch = encode_batch(lm, facts, sampled_contexts(lm))
    (other,) = encode_texts(lm.tokenizer, [f"{builtin_facts()[30].text} {builtin_facts()[30].target_true}"])
    rule, base = LearningRule(steps=args.steps), original_weight(lm, site)
    mask = torch.rand(base.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    seconds, difference = {"ours": 0.0, "plain": 0.0}, 0.0
    for variants in batch.rows:
        rows = edit_rows(variants, other, "right", 0)
        start = time.perf_counter()
        problem = LearningProblem(lm, site, rows, activation)
        learned = learn(problem, base.clone(), mask, rule)
        middle = time.perf_counter()
        theirs = plain(lm, problem, mask, rule, activation)
        seconds["ours"] += middle - start
        seconds["plain"] += time.perf_counter() - middle
        ours = [one + two for one, two in zip(learned.losses, learned.margins, strict=True)]
        difference = max(difference, *(abs(a - b) for a, b in zip(ours, theirs, strict=True)))
    ratio = seconds["plain"] / seconds["ours"]
    each = {name: value / len(facts) for name, value in seconds.items()}
    print(f"block {args.layer} of {lm.depth}, {args.steps} steps, {torch.get_num_threads()} threads")
    print(f"seconds a fact: plain {each['plain']:.2f}, ours {each['ours']:.2f}, {ratio:.1f} times")
    print(f"losses {difference:.1e} apart")
    return int(ratio < BAR or difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
