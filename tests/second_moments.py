"""Corpora, sites and interrupted passes for tests of second moments."""

import torch
from safetensors.torch import load_file

from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.storage.atomic import write_tensors
from cakeflow.storage.hashing import tensor_hashes

SENTENCE = "the sea was calm and every small boat came home before night while the old town slept under rain"
WORDS = SENTENCE.split()
TEXT = " ".join(WORDS[(7 * i + i * i // 3) % len(WORDS)] for i in range(400))


MLP = {layer: Site(layer, "mlp_out") for layer in range(4)}


def at(*layers):
    """The MLP output projections of layers."""
    return [MLP[layer] for layer in layers]


def passes(lm):
    """Count forward passes of the real model."""
    count = []
    lm.model.register_forward_pre_hook(lambda *_a: count.append(1))
    return count


@torch.no_grad()
def direct(lm, layer, tokens=500, window=20):
    ids = lm.tokenizer(TEXT)["input_ids"][:tokens]
    total, n = 0, 0
    for start in range(0, len(ids) - window + 1, window):
        with capture(lm, [Site(layer, "mlp_out")], side="in") as seen:
            lm.model(input_ids=torch.tensor([ids[start : start + window]]), use_cache=False)
        for key in seen[Site(layer, "mlp_out")][0]:
            total, n = total + torch.outer(key, key), n + 1
    return total / n


def interrupt_after(lm, passes_done, error):
    count = []

    def hook(*_args):
        count.append(1)
        if len(count) == passes_done + 1:
            raise error

    return lm.model.register_forward_pre_hook(hook)


def rewritten(path, **changes):
    """Other tensors in a file, with the hashes that fit them."""
    tensors = {**load_file(path), **changes}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    write_tensors(path, tensors, tensor_hashes(tensors))
