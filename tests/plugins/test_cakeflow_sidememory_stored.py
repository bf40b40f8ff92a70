"""Settings as tensors: what comes back, and what is refused."""

import pytest
import torch
from cakeflow_sidememory import ComposedSettings, Retrieval, ShardSettings
from cakeflow_sidememory.stored import decoded, encoded

from cakeflow.errors import LedgerError

SHARDS = ShardSettings(save_every=2, join_every=4, activation="gelu_new")
COMPOSED = ComposedSettings("a.b", Retrieval(0.25, 3, "relation"), "outermost")


@pytest.mark.parametrize(("settings", "build"), [(SHARDS, ShardSettings), (COMPOSED, ComposedSettings.of)])
def test_settings_come_back_and_others_are_refused(settings, build):
    assert decoded(encoded(settings), build) == settings
    for text in (b"[]", b'{"rule": 1, "size": 2}', b"\xff"):
        with pytest.raises(LedgerError, match="settings of a side memory cannot be read"):
            decoded(torch.tensor(list(text), dtype=torch.uint8), build)


def test_settings_that_cannot_be_are_refused_when_they_are_read():
    bad = encoded(COMPOSED).tolist()
    bad = bytes(bad).replace(b"outermost", b"innermost")
    with pytest.raises(LedgerError, match="rule must be one of agreeing, outermost"):
        decoded(torch.tensor(list(bad), dtype=torch.uint8), ComposedSettings.of)
