"""Side effects on unrelated text, against the definitions."""

import pytest
import torch

from cakeflow.callbacks import NeutralText
from cakeflow.errors import ConfigError
from cakeflow.forward.packing import logits_bytes, pass_bytes

from .conftest import FACTS, fit


@torch.no_grad()
def predictions(lm, ids):
    """Log-probabilities of the next token, in one plain pass per window."""
    return [lm.model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1) for window in ids]


def test_neutral_text(tiny, quiet, tmp_path):
    """Perplexity and divergence against their definitions; the unedited model has diverged by nothing."""
    text = " ".join(fact.reference for fact in FACTS)
    (tmp_path / "text.txt").write_text(text)
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"][:100]
    windows = [ids[start : start + 16] for start in range(0, 96, 16)]
    before = predictions(tiny, windows)
    watcher = NeutralText(tmp_path / "text.txt", tokens=100, window=16, every=3)
    fit(tiny, quiet, [watcher])
    after = predictions(tiny, windows)
    for row, now in ((watcher.rows[0], before), (watcher.rows[-1], after)):
        nll = [-p[range(15), window[1:]] for p, window in zip(now, windows, strict=True)]
        assert row["neutral/perplexity"] == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-5)
        divergence = [(p.exp() * (p - q)).sum(-1) for p, q in zip(before, now, strict=True)]
        assert row["neutral/kl"] == pytest.approx(float(torch.cat(divergence).mean()), rel=1e-3, abs=1e-7)
    assert watcher.rows[-1]["neutral/kl"] > 1e-6


def test_neutral_text_is_read_before_anything_is_edited(lm, quiet, tmp_path):
    before = lm.fingerprint()
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ConfigError, match="a window needs 128"):
        fit(lm, quiet, [NeutralText(tmp_path / "short.txt")])
    with pytest.raises(ConfigError, match="no file or folder"):
        fit(lm, quiet, [NeutralText([tmp_path / "none.txt"])])
    with pytest.raises(ConfigError, match=r"window must be between 2 and tokens \(64\), got 128"):
        NeutralText("x", tokens=64)
    assert lm.fingerprint() == before


def test_windows_keep_to_the_memory_budget(lm, quiet):
    text, passes = {"text": "The Elbe flows into the sea. " * 200}, []
    callback = NeutralText(text, tokens=512, window=32)
    module = fit(lm, quiet, [callback])
    free = callback.measure(module)
    lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    module.max_bytes = 1.5 * 32 * (pass_bytes(lm) + 2 * logits_bytes(lm))
    assert callback.measure(module) == pytest.approx(free)
    assert set(passes) == {1}
    module.max_bytes = 1000
    with pytest.raises(ConfigError, match="a window of 32 tokens of neutral text takes about"):
        callback.measure(module)
