"""Streams of edits: what is measured, when, and against the unedited model."""

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from cakeflow import EditDataModule, GradientSearch, LocateThenEdit
from cakeflow.callbacks import NeutralText, PeriodicCallback, Retention
from cakeflow.data import builtin_facts
from cakeflow.data.contexts import Contexts
from cakeflow.errors import ConfigError, StatisticsError
from cakeflow.evaluation.scoring import score_records

FACTS = builtin_facts()[:5]


class Steps(PeriodicCallback):
    """Counts the batches that it has seen."""

    name = "steps"

    def measure(self, module):
        return {"batches": float(len(module.journal)), "first": float(module.lm.weight(1).detach().sum())}


def fit(lm, quiet, callbacks, batch_size=1, **trainer):
    """Five edits of one layer, some at a time."""
    module = LocateThenEdit(
        lm,
        [1],
        targets=GradientSearch(steps=4, lr=0.5),
        contexts=Contexts.of(["{}"]),
        moments={1: torch.eye(lm.key_width(1), dtype=torch.float64) / 100},
    )
    trainer = L.Trainer(**{**quiet, **trainer}, callbacks=callbacks)
    trainer.fit(module, EditDataModule(FACTS, batch_size).train_dataloader())
    return module


@pytest.mark.parametrize(
    ("every", "size", "expected"),
    [(1, 1, [0, 1, 2, 3, 4, 5]), (2, 1, [0, 2, 4, 5]), (2, 2, [0, 4, 5]), (9, 1, [0, 5]), (1, 5, [0, 5])],
)
def test_milestones(lm, quiet, tmp_path, every, size, expected):
    """The unedited model, every few batches, and the end, once each; logged at the number of batches."""
    steps, logger = Steps(every), CSVLogger(tmp_path)
    before = float(lm.weight(1).detach().sum())
    fit(lm, quiet, [steps], size, logger=logger)
    assert [row["steps/edits"] for row in steps.rows] == expected
    assert steps.rows[0]["steps/first"] == before != steps.rows[-1]["steps/first"]
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        logged = {
            (int(row["step"]), float(row["steps/batches"])) for row in csv.DictReader(file) if row["steps/batches"]
        }
    batches = [-(-edits // size) for edits in expected]
    assert logged == set(zip(batches, batches, strict=True))


def test_every_must_be_positive():
    with pytest.raises(ConfigError, match="every must be at least 1 batch, got 0"):
        Steps(0)


@pytest.mark.parametrize("form", ["exact", "tokens", "probability"])
def test_retention_scores_every_edit_so_far(lm, quiet, form):
    watcher = Retention(every=2, form=form)
    fit(lm, quiet, [watcher], batch_size=1)
    assert [len(curve) for curve in watcher.curves] == [2, 4, 5]
    assert watcher.rows[0] == {"retention/edits": 0.0}
    scores = score_records(lm, FACTS)
    own = scores.kind == 0
    expected = {"exact": scores.correct, "tokens": scores.tokens, "probability": scores.expected > scores.rival}[form][
        own
    ].float()
    assert watcher.curves[-1] == pytest.approx(expected.tolist())
    assert watcher.rows[-1]["retention/mean"] == pytest.approx(float(expected.mean()))
    assert watcher.rows[-1]["retention/first"] == pytest.approx(float(expected[0]))


def test_retention_asks_for_no_free_answers():
    with pytest.raises(ConfigError, match="'exact', 'tokens' or 'probability'"):
        Retention(form="answer")


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
    with pytest.raises(StatisticsError):
        fit(lm, quiet, [NeutralText([tmp_path / "none.txt"])])
    with pytest.raises(ConfigError, match=r"window must be between 2 and tokens \(64\), got 128"):
        NeutralText("x", tokens=64)
    assert lm.fingerprint() == before
