"""Fixtures of the commands."""

import pytest


@pytest.fixture
def method(workplace):
    """A quick recipe for the tiny model."""
    path = workplace / "quick.yaml"
    path.write_text(
        "model:\n  targets: {steps: 4, lr: 0.5}\n  statistics: {tokens: 1024, window: 32, batch_tokens: 1024}\n"
        "  contexts: {groups: [['{}']]}\n"
    )
    return ["--model", "model", "--method", str(path), "--layers", "[1]"]
