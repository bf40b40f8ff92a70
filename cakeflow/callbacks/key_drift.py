"""The age of the keys that solves preserve: how far they have moved since they were recorded."""

from __future__ import annotations

from typing import Any

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.core.reread import present_keys
from cakeflow.errors import ConfigError
from cakeflow.models.architecture import Site


class KeyDrift(PeriodicCallback):
    """Measures how far the keys of the facts in force have moved since they were recorded, or last read again.

    A history preserves the outputs at the keys that facts had when they were edited. Later edits of lower layers move
    them, so that less and less is preserved; the edit module's ``reread_keys`` renews them. Logs ``keys/layer{l}``, the
    mean of ``|k - k_recorded| / |k_recorded|`` over facts: 0 at the first edited layer, below which nothing changes.
    Costs a pass over all facts up to the last edited layer; nothing is measured of a method that keeps no keys, or of
    requests whose texts were not stored.
    """

    name = "keys"

    def measure(self, module: Any) -> dict[str, float]:
        """Read the keys of all facts in the model as it is, and compare those of the facts in force."""
        if not isinstance(module, LocateThenEdit) or not module.journal.edits:
            return {}
        steps = module.journal.steps
        try:
            keys = present_keys(module, steps)
        except ConfigError:
            return {}
        numbers: dict[str, float] = {}
        for layer in module.layers:
            place = module.lm.weight_name(Site(layer, module.site))
            recorded, now = (
                module.journal.history(place).keys,
                module.journal.histories.of(keys[place], place, steps).keys,
            )
            if recorded is not None and now is not None:
                numbers[f"layer{layer}"] = float(((now - recorded).norm(dim=1) / recorded.norm(dim=1)).mean())
        return numbers
