"""A suite of three methods on a tiny model in a folder, which needs no second moments that are collected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    lm = tiny_model()
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def write(toy: Path, tmp_path: Path) -> Any:
    """Writes a suite with changes into the current folder, beside model, numbers and facts; returns its path."""
    (tmp_path / "toy").symlink_to(toy)
    (tmp_path / "numbers.yaml").write_text(dump_yaml(NUMBERS))
    (tmp_path / "facts.json").write_text(json.dumps(facts()))

    def write(**changes: Any) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(dump_yaml({name: each for name, each in {**SUITE, **changes}.items() if each is not None}))
        return path

    return write
