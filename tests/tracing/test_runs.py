"""Clean, corrupted and restored runs against one full forward pass per fact, layer and token."""

from dataclasses import replace

import pytest
import torch
from conftest import random_model

from cakeflow.models.architecture import Site
from cakeflow.tracing import PLACES, CausalTrace
from cakeflow.tracing.result import LAST_SUBJECT, place_of
from cakeflow.tracing.trace import noise_of


def with_first(output, value):
    return (value, *output[1:]) if isinstance(output, tuple) else value


@torch.no_grad()
def plain(lm, row, trace, scale, layer, tokens):
    """Effects of restorations at single tokens, by full passes of this fact alone."""
    noise = noise_of(lm, [row], scale, trace)[0]
    ids = torch.tensor([row.ids[: row.target]])
    embeds = lm.model.get_input_embeddings()(ids)
    sites = [Site(each, trace.role) for each in trace.span(layer, lm.depth)]
    clean = {}

    def chance(values, put):
        handles = []
        for site in sites:

            def hook(_module, _args, output, site=site):
                value = output[0] if isinstance(output, tuple) else output
                if put is None:
                    clean[site] = value.clone()
                    return None
                changed = value.clone()
                changed[:, put] = clean[site][0, put]
                return with_first(output, changed)

            if put is not False:
                handles.append(lm.module(site).register_forward_hook(hook))
        logits = lm.model(inputs_embeds=values, use_cache=False).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits.softmax(-1)[:, row.ids[row.target]].mean()

    high = chance(embeds, None)
    noisy = embeds + noise.to(embeds)
    low = chance(noisy, False)
    return float(high), float(low), [float(chance(noisy, token) - low) for token in tokens]


@pytest.mark.parametrize(("role", "window"), [("block", 1), ("block", 2), ("mlp_out", 3), ("attn_out", 1)])
def test_equals_full_passes(tiny, rows, tmp_path, role, window):
    trace = CausalTrace(role=role, window=window, tokens="all", draws=2, noise=0.5)
    result = trace.run(tiny, rows, folder=tmp_path)
    for i, row in enumerate(rows):
        expected = torch.zeros(len(PLACES), tiny.depth, dtype=torch.float64)
        count = torch.zeros(len(PLACES), 1)
        tokens = range(row.start, row.target)
        layers = [plain(tiny, row, trace, 0.5, layer, tokens) for layer in range(tiny.depth)]
        for token, effects in zip(
            tokens, torch.tensor([each[2] for each in layers], dtype=torch.float64).T, strict=True
        ):
            expected[place_of(row, token)] += effects
            count[place_of(row, token)] += 1
        assert result.clean[i] == pytest.approx(layers[0][0], rel=1e-9)
        assert result.corrupted[i] == pytest.approx(layers[0][1], rel=1e-9)
        torch.testing.assert_close(result.effects[i], expected / count, rtol=0, atol=1e-12, equal_nan=True)
    subject = replace(trace, tokens="subject").run(tiny, rows, folder=tmp_path)
    at_subject = [i for i in range(len(PLACES)) if not subject.effects[:, i].isnan().all()]
    assert at_subject == [LAST_SUBJECT]
    torch.testing.assert_close(subject.effects[:, LAST_SUBJECT], result.effects[:, LAST_SUBJECT], rtol=0, atol=1e-12)


def test_restoring_the_last_block_at_the_end_of_the_prompt_restores_everything(tiny, rows, tmp_path):
    """With the subject at the end, the last block's output decides the prediction alone."""
    result = CausalTrace(noise=0.5).run(tiny, rows[3:], [tiny.depth - 1], tmp_path)
    expected = float(result.clean - result.corrupted)
    assert abs(expected) > 1e-6
    assert result.scores[tiny.depth - 1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("role", ["block", "mlp_out"])
def test_models_that_cannot_go_on_from_cached_keys(lm, rows, tmp_path, role):
    """ALiBi: whole rows run again, from the restored layer on."""
    sizes = {"vocab_size": 600, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    bloom = random_model("bloom", lm.tokenizer, **sizes, initializer_range=0.5)
    bloom.model.double()
    trace = CausalTrace(role=role, draws=2, noise=0.5)
    result = trace.run(bloom, rows, folder=tmp_path)
    for i, row in enumerate(rows):
        expected = [plain(bloom, row, trace, 0.5, layer, [row.subject])[2][0] for layer in range(bloom.depth)]
        assert result.effects[i, LAST_SUBJECT].tolist() == pytest.approx(expected, abs=1e-6)
    assert float(result.effects.nan_to_num().abs().max()) > 1e-4
