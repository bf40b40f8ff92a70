"""Small edits through a journal alone, for tests of journals."""

import torch
from tiny_runs import name_of

from cakeflow import Update
from cakeflow.data.request import EditRequest
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.schema import RunBody
from cakeflow.models import Site

RUN = RunBody(model="tiny", settings={}, edits=0, batch_size=1, data="", who="", versions={}, threads=1)
FACTS = [EditRequest("{} plays", "Ann", "tennis")]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def bits(lm):
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same(lm, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def draw(lm, layer, seed, scale=1.0, n=2):
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = lm.oriented(Site(layer, "mlp_out")).shape
    left, right = (torch.randn(n, width, dtype=torch.float64, generator=generator) for width in (d_out, d_in))
    return Update(scale * right, left)


def apply(journal, step, layer, seed, scale=1.0):
    update = draw(journal.model, layer, seed, scale, len(step.hashes) or 2)
    journal.apply(step, WeightChange(name_of(journal.model, layer), update, update.right.clone()), {"update": 1.0})


def keys_at(journal, layer):
    """Keys of the committed batches at a layer."""
    return [change.keys for change in journal.changes if change.place == name_of(journal.model, layer)]


def history(journal, layer):
    return journal.history(name_of(journal.model, layer))


def edit(journal, requests, seed, layers=(1, 3), scale=1.0, last=None):
    with journal.batch(requests) as step:
        for layer in layers[:-1]:
            apply(journal, step, layer, seed + layer, scale)
        apply(journal, step, layers[-1], seed + layers[-1], last or scale)
