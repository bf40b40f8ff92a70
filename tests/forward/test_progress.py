"""Progress bars: on terminals only, and steps are seen before a fact is done."""

import io
import sys

import pytest

from cakeflow.forward import progress
from cakeflow.forward.progress import counting_steps, progress_bar


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self):
        return True


def use(stream, monkeypatch):
    """In a test, not in a fixture: capturing puts its own stream in place in between."""
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_bar_counts_facts_and_shows_steps(monkeypatch):
    terminal = use(Terminal(), monkeypatch)
    with progress_bar(4, "target values", "fact") as bar:
        bar.mininterval = 0.0
        advance = counting_steps(bar)
        for done in (0, 0, 3):
            advance(done)
        assert bar.n == 3
    shown = terminal.getvalue()
    assert "0/4" in shown
    assert "step 2" in shown
    assert "3/4" in shown


def test_a_bar_begins_where_earlier_work_ended(monkeypatch):
    terminal = use(Terminal(), monkeypatch)
    with progress_bar(4, "second moments", "token", initial=2):
        pass
    assert "2/4" in terminal.getvalue()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_file_gets_no_bar(enabled, monkeypatch):
    stream = use(io.StringIO() if enabled else Terminal(), monkeypatch)
    with progress_bar(4, "editing", "fact", enabled=enabled) as bar:
        bar.update(4)
    assert stream.getvalue() == ""


def test_a_notebook_gets_bars_though_its_stream_is_no_terminal(monkeypatch):
    use(io.StringIO(), monkeypatch)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    with progress_bar(4, "editing", "fact") as bar:
        assert not bar.disable
