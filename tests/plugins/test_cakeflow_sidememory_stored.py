"""Settings as tensors: what comes back, and what is refused."""

import pytest
import torch
from cakeflow_sidememory import ComposedSettings, Retrieval, ShardSettings
from cakeflow_sidememory.stored import counts, decoded, encoded, numbers

from cakeflow.errors import LedgerError

SHARDS = ShardSettings(save_every=2, join_every=4, activation="gelu_new")
COMPOSED = ComposedSettings("a.b", Retrieval(0.25, 3, "relation"), "outermost")


@pytest.mark.parametrize(("settings", "build"), [(SHARDS, ShardSettings), (COMPOSED, ComposedSettings)])
def test_settings_come_back_and_others_are_refused(settings, build):
    assert decoded(encoded(settings), build) == settings
    for text in (b"[]", b'{"rule": 1, "size": 2}', b"\xff", b"[" * 9999, b'{"near": 5}', b'{"unjoined": "no"}'):
        with pytest.raises(LedgerError, match="settings of a side memory cannot be read"):
            decoded(torch.tensor(list(text), dtype=torch.uint8), build)


def test_settings_that_cannot_be_are_refused_when_they_are_read():
    bad = encoded(COMPOSED).tolist()
    bad = bytes(bad).replace(b"outermost", b"innermost")
    with pytest.raises(LedgerError, match="rule\\n  Input should be 'agreeing'"):
        decoded(torch.tensor(list(bad), dtype=torch.uint8), ComposedSettings)


BAD_NUMBERS = [torch.full((2, 3), torch.nan), torch.full((2, 3), torch.inf), torch.ones(2), torch.ones(2, 3).long()]
BAD_COUNTS = [torch.ones(2, 3), torch.ones(2).long(), torch.ones(2, 3, dtype=torch.complex64)]


@pytest.mark.parametrize(
    ("read", "bad"), [*((numbers, each) for each in BAD_NUMBERS), *((counts, each) for each in BAD_COUNTS)]
)
def test_tensors_that_no_memory_leaves_are_refused_by_name(read, bad):
    good = torch.ones(2, 3) if read is numbers else torch.ones(2, 3).long()
    assert read("a.b", {"x": good, "y": bad}, x=2) == [good]
    with pytest.raises(LedgerError, match=r"a.b: y are not .* numbers in 2 dimensions; take it from a copy"):
        read("a.b", {"x": good, "y": bad}, x=2, y=2)
