"""A suite of three methods on a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cakeflow.storage.yaml_text import dump_yaml
from cakeflow.testing import tiny_model

NAMES = ("Ann", "Bob", "Rome", "Oslo", "Kim", "Max", "Tom", "Zoe")
NUMBERS = {
    "model": {
        "layers": [0, 1],
        "targets": {"steps": 3, "lr": 0.3},
        "statistics": {"tokens": 2048, "cov_weight": 100},
        "contexts": {"groups": [["{}"]]},
    }
}
SUITE: dict[str, Any] = {
    "model": "toy",
    "config": "numbers.yaml",
    "baseline": "memit_seq",
    "sizes": [4],
    "batch_size": 2,
    "data": {"own": {"source": "facts.json"}},
    "evaluation": {"protocol": "wild"},
    "callbacks": [
        {"class_path": "KnowledgeCheck"},
        {"class_path": "OutcomeCheck", "init_args": {"familiar": 0, "neighbors": 2, "chat": False}},
    ],
    "metrics": ["efficacy", "efficacy_answer", "specificity", "knowledge/new", "learned"],
    "methods": {"ultraedit": None, "memit_seq": {}, "single": {"method": "memit", "batch_size": 1}},
}


def facts(count: int = 8, **fields: Any) -> list[dict[str, Any]]:
    """Requests with everything that a metric could need."""
    return [
        {
            "prompt": "The sea of {} is",
            "subject": name,
            "target_new": "blue" if place % 2 else "green",
            "target_true": "red",
            "probes": [
                {"kind": "paraphrase", "prompt": f"People say that the sea of {name} is"},
                {"kind": "neighborhood", "prompt": f"The sea of {name}town is"},
            ],
            **fields,
        }
        for place, name in enumerate(NAMES[:count])
    ]


def write_suite(folder: Path, **changes: Any) -> Path:
    """Write a suite with changes, and beside it model, numbers and facts, unless they are there; return its path.

    A part that is None is left out.
    """
    if not (folder / "toy").exists():
        lm = tiny_model()
        lm.model.save_pretrained(folder / "toy")
        lm.tokenizer.save_pretrained(folder / "toy")
        (folder / "numbers.yaml").write_text(dump_yaml(NUMBERS))
        (folder / "facts.json").write_text(json.dumps(facts()))
    path = folder / "mine.yaml"
    path.write_text(dump_yaml({name: each for name, each in {**SUITE, **changes}.items() if each is not None}))
    return path
