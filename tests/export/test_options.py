"""Choices of an export."""

import pytest

from cakeflow.errors import ConfigError
from cakeflow.export import ExportOptions
from cakeflow.export.options import SERVED_RANKS


def test_only_served_ranks_are_accepted():
    assert [ExportOptions(max_rank=rank).max_rank for rank in SERVED_RANKS] == list(SERVED_RANKS)
    for rank in (0, 4, 100, 1024):
        with pytest.raises(ConfigError, match="vLLM accepts 8, 16"):
            ExportOptions(max_rank=rank)
    with pytest.raises(ConfigError, match="over_rank must be one of error, truncate, split"):
        ExportOptions(over_rank="drop")
