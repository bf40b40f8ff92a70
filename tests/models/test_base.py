"""Weights and modules of an editable model."""

import pytest

from cakeflow.errors import ArchitectureError
from cakeflow.models.architecture import Site


def test_weights_are_shown_as_out_by_in(tiny):
    weight = tiny.oriented(Site(1, "mlp_out"))
    assert weight.shape == (48, tiny.weight(Site(1, "mlp_out")).numel() // 48)
    assert weight.data_ptr() == tiny.weight(Site(1, "mlp_out")).data_ptr()
    assert not weight.requires_grad


def test_module_that_is_not_there(tiny):
    with pytest.raises(ArchitectureError, match="no module"):
        tiny.module(Site(6))
