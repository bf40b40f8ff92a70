"""Causal scores of a model's layers: where the vector in ``configs/model/smollm2-135m.yaml`` comes from.

    python benchmarks/trace_scores.py [--facts 150] [--draws 10]

ROME's indirect effect, averaged (AIE; CAKE section 3.1): the subject's embeddings are corrupted with Gaussian noise of
three standard deviations, one block's output at the subject's last token is restored to its clean value, and the score
is the gain in probability of the answer's first token. Facts are built-in ones that the model answers correctly; the
same noise is used for every layer (a paired comparison). A stopgap until tracing is part of the library.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from cakeflow.architecture import Site
from cakeflow.batch import encode, join
from cakeflow.data import builtin_facts
from cakeflow.model import LanguageModel, load_model
from cakeflow.tap import capture


def subject_span(lm: LanguageModel, text: str, start: int, end: int) -> list[int]:
    """Positions of the subject's tokens."""
    offsets = lm.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return [i for i, (left, right) in enumerate(offsets) if left < end and right > start]


def probability(
    lm: LanguageModel, ids: Tensor, embeds: Tensor, answer: int, restore: tuple[Site, int, Tensor] | None
) -> float:
    """Mean probability of the answer over rows of embeddings, with one state restored."""
    handle = None
    if restore is not None:
        site, at, clean = restore

        def put(_module: object, _args: object, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[:, at] = clean
            return changed

        handle = lm.module(site).register_forward_hook(put)
    try:
        logits = lm.model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return float(logits[:, -1].softmax(-1)[:, answer].mean())


@torch.no_grad()
def main() -> None:
    """Print one score per layer, with its standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=150)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(4, 20)))
    args = parser.parse_args()
    lm = load_model("smollm2-135m")
    table = lm.model.get_input_embeddings().weight
    known = []
    for fact in builtin_facts():
        (row,) = encode(lm.tokenizer, [join(fact.text, str(fact.target_true))], [fact.subject_end], [len(fact.text)])
        prompt = torch.tensor([row.ids[: row.target]])
        if int(lm.model(prompt, attention_mask=torch.ones_like(prompt)).logits[0, -1].argmax()) == row.ids[row.target]:
            span = subject_span(lm, fact.text, fact.prompt.index("{}"), fact.subject_end)
            known.append((prompt, span, row.subject, row.ids[row.target]))
        if len(known) == args.facts:
            break
    tokens = torch.cat([table[prompt[0, span]] for prompt, span, _, _ in known])
    scale = 3 * float(tokens.std())
    effects = torch.zeros(len(known), len(args.layers))
    generator = torch.Generator().manual_seed(0)
    for i, (prompt, span, last, answer) in enumerate(known):
        sites = [Site(layer) for layer in args.layers]
        with capture(lm, sites) as clean:
            lm.model(prompt, attention_mask=torch.ones_like(prompt), use_cache=False)
        embeds = table[prompt].repeat(args.draws, 1, 1)
        embeds[:, span] += scale * torch.randn(args.draws, len(span), table.shape[1], generator=generator)
        low = probability(lm, prompt, embeds, answer, None)
        for j, site in enumerate(sites):
            effects[i, j] = probability(lm, prompt, embeds, answer, (site, last, clean[site][0, last])) - low
    print(f"{len(known)} facts, {args.draws} draws, noise {scale:.3f}")
    error = effects.std(0) / len(known) ** 0.5
    for layer, mean, spread in zip(args.layers, effects.mean(0).tolist(), error.tolist(), strict=True):
        print(f"layer {layer:2d}  AIE {mean:.4f} +- {spread:.4f}")


if __name__ == "__main__":
    main()
