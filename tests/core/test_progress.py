"""The bars of a run: facts over batches, none where there is one batch, none left behind."""

import io
import sys
from contextlib import suppress

import lightning as L
import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from tiny_runs import StopAfter, module_of

from cakeflow import Editor
from cakeflow.core.progress import EditProgressBar, as_list, with_progress_bar
from cakeflow.forward import progress


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


def screen_of(lm, requests, batch_size, monkeypatch, callbacks=(), **options):
    """What a run writes to a terminal where bars appear at once."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    editor = Editor(module_of(lm), {"accelerator": "cpu", "logger": False, "callbacks": list(callbacks), **options})
    with suppress(KeyboardInterrupt):
        editor.fit(requests, batch_size)
    return screen.getvalue()


class Counts(L.Callback):
    """The count of a bar after each batch."""

    def __init__(self, bar):
        self.bar, self.counts = bar, []

    def on_train_batch_end(self, *_):
        self.counts.append(self.bar._bars["edit"].n)


def test_facts_are_counted_over_batches(lm, requests, monkeypatch):
    bar = EditProgressBar()
    screen = screen_of(lm, requests[:4], 2, monkeypatch, callbacks=[bar, counts := Counts(bar)])
    assert counts.counts == [2, 4]
    assert "editing:   0%" in screen
    assert "0/4" in screen
    assert "target values, layer 3" in screen
    assert "Epoch" not in screen
    assert "evaluating" not in screen  # 4 requests are one batch of questions


def test_one_batch_has_the_bars_of_its_phases_only(lm, requests, monkeypatch):
    screen = screen_of(lm, requests[:4], None, monkeypatch)
    assert "editing" not in screen
    assert "target values, layer 3" in screen


def test_questions_are_counted_by_their_stage(lm, requests, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    editor = Editor(module_of(lm), {"accelerator": "cpu", "logger": False})
    editor.evaluate(requests[:4], batch_size=2)
    assert "evaluating (now):   0%" in screen.getvalue()
    assert "0/4" in screen.getvalue()


def test_an_interrupt_leaves_no_bar(lm, requests, monkeypatch):
    bar = EditProgressBar()
    screen_of(lm, requests[:4], 2, monkeypatch, callbacks=[bar, StopAfter(1)])
    assert bar._bars == {}


@pytest.mark.parametrize("enabled", [True, False, None])
def test_the_users_bar_stays_alone(enabled):
    own = TQDMProgressBar()
    assert with_progress_bar([own], enabled) == [own]
    assert [type(each) for each in with_progress_bar(None, enabled)] == [EditProgressBar] * (enabled is not False)


def test_callbacks_may_be_one_or_none():
    own = TQDMProgressBar()
    assert (as_list(own), as_list(None), as_list([own])) == ([own], [], [own])
