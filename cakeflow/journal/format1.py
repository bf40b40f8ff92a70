"""Format 1 of run folders (cakeflow 0.1), which numbered weights by layer: its ledger, read as format 2."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def upgraded(kind: str, body: Mapping[str, Any], place: Callable[[int], str]) -> dict[str, Any]:
    """Return a body in format 2; one of format 2 as it is.

    Args:
        kind: Kind of the entry.
        body: The body as it stands in the ledger.
        place: Names the weight of a layer.
    """
    if kind not in ("batch", "rollback") or "layers" not in body:
        return dict(body)
    rest = {name: value for name, value in body.items() if name not in ("layers", "order")}
    layers: dict[str, Any] = body["layers"]
    if kind == "rollback":
        return {**rest, "places": {place(int(layer)): hashed for layer, hashed in layers.items()}}
    changes = [
        {**layers[str(layer)], "place": place(int(layer)), "kind": "WeightChange", "prefix": str(layer)}
        for layer in body["order"]
    ]
    return {**rest, "changes": changes}
