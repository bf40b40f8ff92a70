"""Manifests of any content, with a hash that fits it."""

import hashlib
import json


def sealed_text(values):
    """A manifest's file of any values, with the hash that fits them."""
    rest = {name: value for name, value in values.items() if name != "hash"}
    sealed = rest | {"hash": hashlib.sha256(rendered(rest).encode()).hexdigest()}
    return rendered(sealed)


def rendered(values):
    """JSON as a manifest has it."""
    return json.dumps(values, indent=1, sort_keys=True) + "\n"
