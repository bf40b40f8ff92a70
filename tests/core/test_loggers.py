"""Trackers beside the run folder: each run has a folder, a journal, its settings and its files."""

import importlib.util

import lightning as L
import pytest
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from tiny_runs import LAYERS, editor_of, module_of

from cakeflow import EditDataModule
from cakeflow.core.folder import is_finished
from cakeflow.core.loggers import with_run_folder
from cakeflow.errors import ConfigError, ModelChangedError
from cakeflow.journal.audit import verify

pytestmark = pytest.mark.filterwarnings("default")  # the trackers' own


def tracker(name, folder):
    """A logger, or a skip with the reason."""
    package = {"mlflow-file": "mlflow", "mlflow-sqlite": "mlflow"}.get(name, name)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install {package}")
    return {
        "wandb": lambda: WandbLogger(project="edits", save_dir=str(folder / "wandb"), offline=True),
        "mlflow-file": lambda: MLFlowLogger("edits", tracking_uri=f"file:{folder / 'mlruns'}"),
        "mlflow-sqlite": lambda: MLFlowLogger("edits", tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"),
        "tensorboard": lambda: TensorBoardLogger(folder / "tb", name="edits"),
    }[name]()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow-file", "mlflow-sqlite", "tensorboard"])
def test_two_runs_have_a_folder_each(lm, requests, tmp_path, monkeypatch, name):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "wandb").mkdir()
    folders, editor = [], editor_of(lm)
    for k in range(2):
        logger = tracker(name, tmp_path)
        editor._trainer["logger"] = logger
        result = editor.fit(requests[2 * k : 2 * k + 2], 1)
        folders.append(result.folder)
        assert not verify(result.folder).faults
        assert (result.folder / "run.json").exists()
        if name.startswith("mlflow"):
            run = logger.experiment.get_run(logger.run_id)
            assert run.data.params["layers"] == str(LAYERS)
            assert run.data.params["edits"] == "2"
            assert "after/efficacy" in run.data.metrics
            files = [each.path for each in logger.experiment.list_artifacts(logger.run_id, result.folder.name)]
            assert f"{result.folder.name}/run.json" in files
            assert f"{result.folder.name}/journal" in files
        if name == "wandb":
            assert dict(logger.experiment.config)["layers"] == str(LAYERS)
            logger.experiment.finish()
    assert folders[0] != folders[1]


def test_the_run_folder_can_be_named_beside_a_tracker(lm, requests, tmp_path):
    editor = editor_of(lm, {"logger": [Bare()]})
    assert editor.fit(requests[:2], run_dir=tmp_path / "here").folder == tmp_path / "here"
    (logger,) = editor._trainer["logger"]
    assert logger.settings["layers"] == str(LAYERS)
    assert logger.settings["edits"] == 2


def test_a_logger_with_a_folder_comes_first(tmp_path):
    own = CSVLogger(tmp_path)
    trainer = with_run_folder(L.Trainer(logger=[Bare(), own], accelerator="cpu"))
    assert trainer.loggers[0] is own
    assert len(trainer.loggers) == 2
    assert with_run_folder(L.Trainer(logger=False, accelerator="cpu")).loggers == []


def test_a_bare_trainer_has_a_folder_and_writes_no_pickle(lm, requests, quiet, tmp_path):
    arguments = {**quiet, "logger": [Bare()], "enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    trainer = L.Trainer(**arguments)
    trainer.fit(module_of(lm), datamodule=EditDataModule(requests[:2]))
    assert (tmp_path / "runs/cakeflow/version_0/journal/ledger.jsonl").exists()
    files = list(tmp_path.rglob("*.ckpt"))
    assert files
    assert not any(each.read_bytes().startswith((b"PK", b"\x80")) for each in files)


class Bare(L.pytorch.loggers.logger.Logger):
    """A tracker without any folder."""

    name, version, save_dir = "bare", 0, None

    def __init__(self):
        super().__init__()
        self.settings, self.metrics = {}, {}

    def log_hyperparams(self, params, *args, **kwargs):
        self.settings |= dict(params)

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics


@pytest.mark.parametrize("last", ["on_train_end", "on_fit_end", "teardown"])
def test_weights_that_a_callback_averaged_are_an_error_and_no_finished_run(lm, requests, tmp_path, last):
    class Average(L.Callback):
        """Puts the weights of the start back, as averaging over few steps does."""

        def on_fit_start(self, trainer, module):
            self.start = {name: each.clone() for name, each in module.model.state_dict().items()}

    def put_back(self, trainer, module, **_):
        if trainer.training or trainer.state.fn == "fit":
            module.model.load_state_dict(self.start)

    setattr(Average, last, put_back)
    editor = editor_of(lm, {"callbacks": [Average()]})
    with pytest.raises(ModelChangedError, match=f"layer|{LAYERS[0]}"):
        editor.fit(requests[:2], run_dir=tmp_path / "run", evaluate=False)
    assert not is_finished(tmp_path / "run")


def test_lightnings_weight_averaging_is_noticed(lm, requests, tmp_path):
    editor = editor_of(lm, {"callbacks": [WeightAveraging()]})
    with pytest.raises((ModelChangedError, ConfigError)):
        editor.fit(requests[:4], 2, run_dir=tmp_path / "run", evaluate=False)
    assert not is_finished(tmp_path / "run")
