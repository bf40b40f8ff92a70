"""Facts to trace on the tiny models."""

import pytest

from cakeflow.tracing import Fact
from cakeflow.tracing.facts import trace_row

FACTS = [
    Fact("The mother tongue of {} is", "Danielle Darrieux", "French"),
    Fact("{} plays", "Ann", "tennis"),
    Fact("In the town of {} people speak", "Newport News", "English"),
    Fact("I live in {}", "Lyon", "France"),
]
"""A subject in the middle, at the start, and, the last one, a subject that ends the prompt."""


@pytest.fixture
def rows(tiny):
    return [trace_row(tiny, fact) for fact in FACTS]
