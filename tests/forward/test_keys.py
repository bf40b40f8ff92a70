"""The climbing reader gives the keys and values of full forward passes, under the weights as they are when it reads."""

import pytest
import torch

from cakeflow import Contexts
from cakeflow.forward.keys import FactReader, PromptStream, read_keys
from cakeflow.forward.tokens import encode_batch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture

CONTEXTS = Contexts.of(["{}", *(f"{word} then. {{}}" for word in ("The", "I", "You are", "Because", "They"))])


@pytest.fixture
def batch(lm, requests):
    return encode_batch(lm, requests[:6], CONTEXTS)


@torch.no_grad()
def plain(lm, batch, layer, anchor):
    """One row at a time, whole row, whole model."""
    keys, bares, values = [], [], []
    for variants in batch.rows:
        read = []
        for row in variants:
            with capture(lm, [Site(layer, "mlp_out")], side="in") as key, capture(lm, [anchor]) as value:
                lm.model(input_ids=torch.tensor([row.ids]), use_cache=False)
            read.append(key[Site(layer, "mlp_out")][0, row.subject])
            values += [value[anchor][0, row.subject]] if len(read) == 1 else []
        bare, *others = read
        keys.append(bare / 2 + sum(others) / 10)
        bares.append(bare)
    return torch.stack(keys), torch.stack(bares), torch.stack(values)


@pytest.mark.parametrize("max_tokens", [1, 30, 8192])
@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [1, 4], [5], [0, 5]])
def test_equals_full_passes_layer_by_layer(tiny, batch, layers, max_tokens):
    reader, anchor = FactReader(tiny, batch, max_tokens), Site(layers[-1])
    for layer in layers:
        keys, bare, values = reader.read(Site(layer, "mlp_out"), anchor)
        wanted_keys, wanted_bare, wanted_values = plain(tiny, batch, layer, anchor)
        torch.testing.assert_close(keys, wanted_keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(bare, wanted_bare, rtol=0, atol=1e-12)
        torch.testing.assert_close(values, wanted_values, rtol=0, atol=1e-12)


def test_keys_alone_at_several_projections(tiny, batch):
    sites = [Site(4, "mlp_out"), Site(1, "attn_out"), Site(1, "mlp_out")]
    keys = read_keys(tiny, batch, sites, max_tokens=30)
    assert [site.layer for site in keys] == [1, 1, 4]
    for layer in (1, 4):
        expected, *_ = plain(tiny, batch, layer, Site(4))
        torch.testing.assert_close(keys[Site(layer, "mlp_out")], expected, rtol=0, atol=1e-12)
    assert not torch.allclose(keys[sites[1]], keys[sites[2]][:, : keys[sites[1]].shape[1]])


def test_sees_weights_that_were_changed_on_the_way(tiny, batch):
    reader, anchor = FactReader(tiny, batch), Site(4)
    generator = torch.Generator().manual_seed(0)
    for layer in (1, 2, 4):
        stale, *_ = plain(tiny, batch, layer, anchor)
        if layer > 1:
            with torch.no_grad():
                previous = tiny.weight(Site(layer - 1 if layer == 2 else 2, "mlp_out"))
                previous += 0.3 * torch.randn(previous.shape, dtype=previous.dtype, generator=generator)
        keys, bare, values = reader.read(Site(layer, "mlp_out"), anchor)
        wanted_keys, wanted_bare, wanted_values = plain(tiny, batch, layer, anchor)
        torch.testing.assert_close(keys, wanted_keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(bare, wanted_bare, rtol=0, atol=1e-12)
        torch.testing.assert_close(values, wanted_values, rtol=0, atol=1e-12)
        assert layer == 1 or not torch.allclose(keys, stale, atol=1e-3)


@pytest.mark.parametrize("role", ["block", "mlp_out", "attn_out"])
def test_values_at_the_layer_itself(tiny, batch, role):
    reader = FactReader(tiny, batch)
    for layer in (1, 4):
        anchor = Site(layer, role)
        *_, values = reader.read(Site(layer, "mlp_out"), anchor)
        torch.testing.assert_close(values, plain(tiny, batch, layer, anchor)[-1], rtol=0, atol=1e-12)


def test_weights_of_the_mean(lm, batch):
    """Half for the bare prompt, a tenth for each of five contexts; without contexts the bare prompt alone."""
    assert all(weights == pytest.approx((0.5, *[0.1] * 5)) for weights in batch.weights)
    bare = encode_batch(lm, batch.requests, Contexts())
    reader, anchor = FactReader(lm, bare), Site(3)
    keys, *_ = reader.read(Site(3, "mlp_out"), anchor)
    assert reader.others == []
    with torch.no_grad(), capture(lm, [Site(3, "mlp_out")], side="in") as seen:
        lm.model(input_ids=torch.tensor([bare.rows[2][0].ids]), use_cache=False)
    torch.testing.assert_close(keys[2], seen[Site(3, "mlp_out")][0, bare.rows[2][0].subject], rtol=0, atol=1e-12)


def test_float32_models_are_read_in_float64(lm, batch):
    expected, *_ = FactReader(lm, batch).read(Site(2, "mlp_out"), Site(2))
    lm.model.float()
    keys, _, values = FactReader(lm, batch).read(Site(2, "mlp_out"), Site(2))
    assert keys.dtype == values.dtype == torch.float64
    torch.testing.assert_close(keys, expected, rtol=0, atol=1e-5)


def test_a_stream_keeps_the_order_of_its_prompts(tiny):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 600, (n,), generator=generator).tolist() for n in (3, 11, 3, 7, 1, 5)]
    keys, nothing = PromptStream(tiny, prompts, max_tokens=12).read(Site(2, "mlp_out"))
    assert nothing is None
    for key, prompt in zip(keys, prompts, strict=True):
        alone, _ = PromptStream(tiny, [prompt]).read(Site(2, "mlp_out"))
        torch.testing.assert_close(key, alone[0], rtol=0, atol=1e-12)


def test_reading_leaves_the_model_alone(tiny, batch):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    keys, _, values = FactReader(tiny, batch).read(Site(3, "mlp_out"), Site(4))
    assert not keys.requires_grad
    assert not values.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())


@pytest.mark.parametrize("max_tokens", [1, 8192])
def test_a_replaced_output_is_carried_as_by_a_plain_pass(tiny, batch, max_tokens):
    rows, above = [variants[0] for variants in batch.rows], [Site(3), Site(5, "mlp_out")]
    stream = PromptStream(tiny, [row.ids[: row.fact + 1] for row in rows], max_tokens)
    new = torch.randn(len(rows), tiny.width, dtype=tiny.dtype)
    block = tiny.module(Site(1))
    for value in (new, None):
        carried = stream.carry(Site(1), value, above)
        for i, row in enumerate(rows):

            def put(_module, _args, output, i=i, row=row, value=value):
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                if value is not None:
                    hidden[0, row.fact] = value[i]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handle = block.register_forward_hook(put)
            with torch.no_grad(), capture(tiny, above) as outputs:
                tiny.model(input_ids=torch.tensor([row.ids]), use_cache=False)
            handle.remove()
            for site in above:
                torch.testing.assert_close(carried[site][i], outputs[site][0, row.fact].double(), rtol=1e-9, atol=1e-12)
