"""General ability before, during and after a run."""

import csv
import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from cakeflow_ability.callback import GeneralAbility
from cakeflow_ability.tasks import general_ability
from lightning.pytorch.loggers import CSVLogger
from tasks import write_all

from cakeflow import Contexts, EditDataModule, GradientSearch, LeastSquares, LocateThenEdit
from cakeflow.cli.command_line import run_command as main
from cakeflow.core.config import shipped
from cakeflow.errors import ConfigError
from cakeflow.forward.packing import logits_bytes, pass_bytes
from cakeflow.models import Site
from cakeflow.models.language import LanguageModel
from cakeflow.solvers import Solver

LAYERS = [1, 2, 3]


@pytest.fixture
def data(tmp_path):
    return write_all(tmp_path / "ability")


def fit(lm, requests, quiet, callback, *, size=2, solver=None, **trainer):
    module = LocateThenEdit(
        lm,
        LAYERS,
        contexts=Contexts(),
        targets=GradientSearch(steps=2, lr=0.3),
        solver=solver or LeastSquares(1.0),
        moments=dict.fromkeys(LAYERS, torch.eye(lm.oriented(Site(0, "mlp_out")).shape[1], dtype=torch.float64)),
    )
    ready = L.Trainer(**{**quiet, **trainer, "callbacks": [callback]})
    ready.fit(module, datamodule=EditDataModule(requests, size))
    return module, ready


@pytest.mark.usefixtures("offline")
def test_a_run_logs_before_during_and_after(lm, requests, quiet, data, tmp_path):
    unedited = general_ability(lm, data, ["cola", "mmlu"])
    watcher = GeneralAbility(data, ["cola", "mmlu"], every=2)
    module, trainer = fit(lm, requests[:5], quiet, watcher, size=1, logger=CSVLogger(tmp_path))
    assert [row["ability/edits"] for row in watcher.rows] == [0, 2, 4, 5]
    with (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["ability/edits"]]
    assert [int(row["step"]) for row in logged] == [0, 2, 4, 5]
    for got, row in zip(logged, watcher.rows, strict=True):
        assert {name: float(value) for name, value in got.items() if name in row} == row
    last = {name.removeprefix("ability/"): value for name, value in watcher.rows[-1].items()}
    del last["edits"]
    assert last == general_ability(lm, data, ["cola", "mmlu"])
    assert trainer.callback_metrics["ability/cola/f1"] == pytest.approx(last["cola/f1"])
    module.journal.rollback()
    assert {f"ability/{name}": value for name, value in unedited.items()}.items() <= watcher.rows[0].items()


def test_a_second_run_goes_on_counting(lm, requests, quiet, data):
    watcher = GeneralAbility(data, ["cola"], every=1)
    module, _ = fit(lm, requests[:2], quiet, watcher)
    L.Trainer(**{**quiet, "callbacks": [watcher]}).fit(module, datamodule=EditDataModule(requests[2:4], 2))
    assert [row["ability/edits"] for row in watcher.rows] == [0, 2, 2, 4]


@pytest.mark.usefixtures("offline")
def test_items_are_scored_within_the_memory_budget(lm, data):
    tight = GeneralAbility(data, ["cola"])
    module = SimpleNamespace(lm=lm, max_bytes=128 * (pass_bytes(lm) + 2 * logits_bytes(lm)))
    assert tight.measure(module) == pytest.approx(general_ability(lm, data, ["cola"]))
    module.max_bytes = 1000
    with pytest.raises(ConfigError, match="memory_budget"):
        tight.measure(module)


@dataclass(frozen=True)
class Scattered(Solver):
    """Edits as least squares does, and spoils the model when the run ends."""

    def solve(self, problem):
        return LeastSquares(1.0).solve(problem)

    def finish(self, origin, weight):
        return weight + 5 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(weight)


def test_what_a_solver_does_at_the_end_is_measured(lm, requests, quiet, data):
    watcher = GeneralAbility(data, every=9)
    fit(lm, requests[:2], quiet, watcher, solver=Scattered())
    final = {f"ability/{name}": value for name, value in general_ability(lm, data).items()}
    assert final.items() <= watcher.rows[-1].items()
    assert not final.items() <= watcher.rows[-2].items()


def test_edits_are_the_same_with_and_without_the_watcher(lm, requests, quiet, data):
    names = [name for name, _ in lm.model.named_parameters()]
    other = LanguageModel.wrap(type(lm.model)(lm.model.config).double(), lm.tokenizer)
    other.model.load_state_dict(lm.model.state_dict())
    fit(lm, requests[:4], quiet, GeneralAbility(data, ["cola"], every=1))
    fit(other, requests[:4], quiet, L.Callback())
    assert all(torch.equal(lm.model.get_parameter(name), other.model.get_parameter(name)) for name in names)


def test_from_yaml(workplace, data, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cakeflow"])
    facts = [{"prompt": "{} lives in", "subject": name, "target_new": "Rome"} for name in ("Ann", "Bob")]
    (workplace / "facts.json").write_text(json.dumps(facts))
    (workplace / "corpus.txt").write_text("The city of Ann is near the sea of Rome. " * 200)
    (workplace / "run.yaml").write_text(
        f"""
trainer:
  accelerator: cpu
  enable_progress_bar: false
  callbacks:
  - class_path: cakeflow_ability.GeneralAbility
    init_args: {{data: "{data}", tasks: [cola, rte], every: 1}}
model:
  base: {workplace / "model"}
  layers: [1, 2]
  statistics: {{source: "{workplace / "corpus.txt"}", tokens: 1024, window: 64}}
data: {{source: "{workplace / "facts.json"}", batch_size: 1}}
"""
    )
    done = main(["fit", f"--config={shipped('method')['memit']}", f"--config={workplace / 'run.yaml'}"])
    assert {"ability/cola/acc", "ability/rte/mcc_stderr", "ability/edits"} <= set(done.logged)
    with (done.folder / "metrics.csv").open() as file:
        assert [row["ability/edits"] for row in csv.DictReader(file) if row["ability/edits"]] == ["0.0", "1.0", "2.0"]
