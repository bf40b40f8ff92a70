"""Suites of a tiny model in the current folder."""

from functools import partial

import pytest
from tiny_suites import write_suite


@pytest.fixture
def write(tmp_path):
    """Writes a suite with changes; returns its path."""
    write_suite(tmp_path)  # a test's own facts come after it
    return partial(write_suite, tmp_path)
