"""How stale the recorded keys of earlier edits are."""

from __future__ import annotations

from typing import Any

from cakeflow.callbacks.periodic import PeriodicCallback
from cakeflow.core.locate_then_edit import LocateThenEdit
from cakeflow.forward.keys import read_keys
from cakeflow.models.architecture import Site


class KeyDrift(PeriodicCallback):
    """Measures how far the keys of all facts so far have moved since they were recorded.

    A history preserves the outputs at the keys that facts had when they were edited. Later edits of lower layers move
    them, so that less and less is preserved. Logs ``keys/layer{l}``, the mean of ``|k - k_recorded| / |k_recorded|``
    over facts: 0 at the first edited layer, below which nothing changes. Costs a pass over all facts up to the last
    edited layer; nothing is measured of a method that keeps no keys, or of requests whose texts were not stored.
    """

    name = "keys"

    def measure(self, module: Any) -> dict[str, float]:
        """Read the keys of all facts in the model as it is, and compare."""
        requests = [request for step in module.journal for request in step.requests]
        if not requests or not isinstance(module, LocateThenEdit):
            return {}
        texts = module.encode(requests)
        with module.journal.reverted():
            facts = module.with_tokens(texts)
        keys = read_keys(module.lm, facts.texts, [Site(layer, module.site) for layer in module.layers])
        numbers: dict[str, float] = {}
        for site, now in keys.items():
            recorded = module.journal.history(module.lm.weight_name(site)).keys
            if recorded is not None and recorded.shape == now.shape:
                numbers[f"layer{site.layer}"] = float(((now - recorded).norm(dim=1) / recorded.norm(dim=1)).mean())
        return numbers
