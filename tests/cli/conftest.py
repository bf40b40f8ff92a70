"""Fixtures of the commands."""

import pytest


@pytest.fixture
def quick(workplace):
    """A quick recipe for the tiny model."""
    path = workplace / "quick.yaml"
    path.write_text(
        "model:\n  targets: {steps: 4, lr: 0.5}\n  statistics: {tokens: 1024, window: 32, batch_tokens: 1024}\n"
        "  contexts: {groups: [['{}']]}\n"
    )
    return path


@pytest.fixture
def method(quick):
    """The tiny model and the quick recipe, as words of a command."""
    return ["--model", "model", "--method", str(quick), "--layers", "[1]"]
