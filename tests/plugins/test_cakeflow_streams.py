"""The package of parts for streams: what configs can name."""

from importlib.metadata import entry_points

import cakeflow_streams


def test_configs_can_name_every_part():
    ours = {each.name for each in entry_points(group="cakeflow.plugins") if each.module == "cakeflow_streams"}
    assert ours == set(cakeflow_streams.__all__)
