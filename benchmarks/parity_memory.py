"""Compare the side memories with numbers recorded from official code; called by ``parity.py``.

Each method has a module ``parity_memory_<method>.py`` that compares one recording, ``<method>_<arch>.json`` with the
tensors beside it, through the public parts of the plugin ``cakeflow_sidememory``.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from safetensors.torch import load_file

METHODS = ("a3e", "wise")
"""Methods that are compared, where the folder has a recording."""


def compare(folder: Path, golden: Path) -> tuple[dict[str, dict[str, float]], bool]:
    """Figures of every recording, and whether one is above its bar or nothing was compared.

    Args:
        folder: The recordings.
        golden: The folder with ``tiny/``, the models that they were made with.
    """
    figures: dict[str, dict[str, float]] = {}
    failed = False
    for method in METHODS:
        module = import_module(f"parity_memory_{method}")
        for path in sorted(folder.glob(f"{method}_*.json")):
            info, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
            for name, worst in module.figures_of(info, tensors, golden / "tiny").items():
                bad = not all(value <= module.BARS[key] for key, value in worst.items())
                failed |= bad
                figures[f"{info['_setup']['model']}/{method}/{name}"] = worst
                text = "  ".join(f"{key} {value:.1e}" for key, value in worst.items())
                print(f"{info['_setup']['model']:8s} {method:5s} {name:15s} {text}{'  ABOVE THE BAR' if bad else ''}")
    return figures, failed or not figures
