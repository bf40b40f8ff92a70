"""Settings of a Trainer are honoured, or refused before anything is read; a run that was stopped is not complete."""

import copy
import logging
import signal
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from stops import STOPS
from tiny_runs import StopAfter, content, editor_of, module_of, state

from cakeflow import EditDataModule, Editor
from cakeflow.cli.command_line import run_command
from cakeflow.core.strategy import RankStrategy
from cakeflow.core.trainer import TRAINING_WORDS, check_settings, with_ranks
from cakeflow.core.trainer import quiet as silence  # a fixture is called quiet as well
from cakeflow.errors import ConfigError, NotTakenWarning
from cakeflow.journal.ledger import read_entries

REFUSED = {
    "spawn": (
        {"strategy": "ddp_spawn", "devices": 2},
        r"DDPStrategy over devices = 2, num_nodes = 1: processes that are started.*strategy='cakeflow'.*devices=1",
    ),
    "fork": ({"strategy": "ddp_fork", "devices": 2}, "started from a function.*device_map"),
    "strategy object": ({"strategy": DDPStrategy()}, "DDPStrategy.*it wraps the model.*strategy='cakeflow'"),
    "bf16-true": ({"precision": "bf16-true"}, "precision = 'bf16-true'.*dtype='bfloat16'"),
    "16-true": ({"precision": "16-true"}, "precision = '16-true'"),
    "64-true": ({"precision": "64-true"}, "precision = '64-true'"),
    "bf16-mixed": ({"precision": "bf16-mixed"}, "precision = 'bf16-mixed'"),
    "plugin": ({"plugins": [HalfPrecision("bf16-true")]}, "precision = 'bf16-true'"),
    "one batch": ({"limit_train_batches": 1}, r"limit_train_batches = 1: .*data\.limit"),
    "a part": ({"limit_train_batches": 0.5}, r"limit_train_batches = 0\.5"),
    "steps": ({"max_steps": 2}, r"max_steps = 2: .*data\.limit"),
    "try": ({"fast_dev_run": True}, r"^the Trainer does not fit: fast_dev_run = True: [^:]*data\.limit$"),
    "overfit": ({"overfit_batches": 1}, "overfit_batches = 1"),
    "some answers": ({"limit_val_batches": 0.5}, r"limit_val_batches = 0\.5: metrics are over all requests"),
    "no answers": ({"limit_val_batches": 0}, "limit_val_batches = 0"),
    "accumulation": ({"accumulate_grad_batches": 4}, "accumulate_grad_batches = 4.*batch_size"),
    "clipping": ({"gradient_clip_val": 1.0}, "gradient_clip_val = 1.0"),
    "reloading": ({"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs = 1"),
}
NEUTRAL = {
    "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true", "limit_train_batches": 1.0,
    "limit_val_batches": 1.0, "max_steps": -1, "fast_dev_run": False, "overfit_batches": 0.0,
    "accumulate_grad_batches": 1, "gradient_clip_val": None, "reload_dataloaders_every_n_epochs": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_a_run_is_refused_before_anything_is_read(name, quiet, workplace):
    settings, words = REFUSED[name]
    before = content(workplace)
    with pytest.raises(ConfigError, match=words):
        Editor.from_pretrained(str(workplace / "nowhere"), "memit", layers=[1], trainer={**quiet, **settings})
    assert content(workplace) == before


@pytest.mark.parametrize("name", REFUSED)
def test_a_trainer_object_is_checked_too(name, lm, requests, quiet):
    settings, words = REFUSED[name]
    before = {key: (each.dtype, each.clone()) for key, each in lm.model.state_dict().items()}
    trainer, module = L.Trainer(**{**quiet, **copy.deepcopy(settings)}), module_of(lm)
    with pytest.raises(ConfigError, match=words):
        Editor(module, trainer)
    if trainer.strategy.launcher is None:  # another would start processes, and set their variables, before that
        for run in (trainer.fit, trainer.validate):
            with pytest.raises(ConfigError, match=words):
                run(module, datamodule=EditDataModule(requests[:2], 1))
    after = lm.model.state_dict()
    assert all(after[key].dtype == dtype and torch.equal(after[key], each) for key, (dtype, each) in before.items())


@pytest.mark.parametrize(
    ("settings", "strategy"),
    [
        ({"devices": 2}, "cakeflow"),
        ({"devices": "2"}, "cakeflow"),
        ({"devices": [0, 1], "strategy": "auto"}, "cakeflow"),
        ({"num_nodes": 2}, "cakeflow"),
        ({"strategy": "ddp"}, "cakeflow"),
        ({"strategy": "ddp_spawn", "devices": 2}, "ddp_spawn"),
        ({"devices": 1}, None),
        ({"devices": "auto", "strategy": None}, None),
    ],
)
def test_several_devices_and_ddp_mean_our_strategy(settings, strategy, quiet):
    assert with_ranks({**quiet, **settings}).get("strategy") == strategy
    if strategy == "cakeflow" and settings.get("devices") != [0, 1]:  # a CPU has no such devices
        check_settings({**quiet, **settings})


@pytest.mark.parametrize(
    ("strategy", "settings", "sizes"),
    [
        (ModelParallelStrategy(2, 1), {"devices": 2}, (2, 1)),
        (ModelParallelStrategy(), {"devices": 4}, (1, 4)),
        (ModelParallelStrategy("auto", 2), {"devices": 2, "num_nodes": 3}, (3, 2)),
    ],
)
def test_model_parallel_means_ranks_that_share_a_model(strategy, settings, sizes, lm, quiet):
    ours = with_ranks({**settings, "strategy": strategy})["strategy"]
    assert (type(ours), ours.sizes, ours.lockstep) == (RankStrategy, sizes, True)
    trainer = L.Trainer(**{**quiet, "devices": 2, "strategy": ModelParallelStrategy(2, 1)})
    with pytest.raises(ConfigError, match=r"ModelParallelStrategy .*weights in a form of its own.*RankStrategy"):
        Editor(module_of(lm), trainer)


@pytest.mark.parametrize("settings", [{"devices": 2}, {"num_nodes": 2}, {"strategy": "ddp"}], ids=str)
def test_a_trainer_object_keeps_its_strategy(settings, lm, quiet):
    with pytest.raises(ConfigError, match=r"it wraps the model.*strategy='cakeflow'"):
        Editor(module_of(lm), L.Trainer(**{**quiet, **settings}))
    trainer = L.Trainer(**{**quiet, **settings, "strategy": "cakeflow"})
    assert isinstance(trainer.strategy, RankStrategy)
    Editor(module_of(lm), trainer)


@pytest.mark.parametrize(
    "options",
    [["--trainer.strategy", "ddp_spawn"], ["--trainer.precision", "bf16-true"], ["--trainer.limit_train_batches", "1"]],
    ids=str,
)
@pytest.mark.parametrize("command", ["fit", "evaluate"])
def test_the_command_refuses_before_it_reads(command, options, workplace, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command([command, "--method", "memit", "--model", "nowhere", "--model.layers", "[1]", "--data", "no.json",
                     "--trainer.accelerator", "cpu", *options])  # fmt: skip
    assert caught.value.code == 2
    assert "the Trainer does not fit" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in workplace.iterdir()) == ["model"]


def test_neutral_settings_pass_and_change_nothing(lm, requests, quiet):
    other = copy.deepcopy(lm)
    plain, neutral = editor_of(lm, quiet), editor_of(other, {**quiet, **NEUTRAL})
    assert plain.fit(requests[:4], 2).after == pytest.approx(neutral.fit(requests[:4], 2).after, nan_ok=True)
    assert state(lm, plain.module) == state(other, neutral.module)


def test_sigterm_ends_a_run_with_whole_batches_and_status_143(lm, requests, tmp_path):
    """At every moment of its only batch, where Lightning would go on; then the run goes on to the same weights."""
    before, expected = signal.getsignal(signal.SIGTERM), copy.deepcopy(lm)
    with STOPS.at(-1, None):
        editor_of(expected).fit(requests[:2], run_dir=tmp_path / "whole")
    moments = [place for place, event in enumerate(STOPS.seen) if event[0] == "cakeflow.journal"]
    assert len(moments) >= 6
    for place in moments:
        folder, stopped, again = tmp_path / str(place), copy.deepcopy(lm), copy.deepcopy(lm)
        with STOPS.at(place, signal.SIGTERM), pytest.raises(SystemExit) as caught:
            editor_of(stopped).fit(requests[:2], run_dir=folder)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) == before
        assert not any(each.kind == "end" for each in read_entries(folder / "journal" / "ledger.jsonl"))
        assert len(editor_of(again).fit(requests[:2], run_dir=folder).journal) == 1
        weights = expected.model.state_dict()
        assert all(torch.equal(each, weights[name]) for name, each in again.model.state_dict().items())


def test_a_strategy_object_serves_the_run_after_the_check(lm, requests, quiet):
    del quiet["accelerator"]
    editor = editor_of(lm, {**quiet, "accelerator": "auto", "strategy": SingleDeviceStrategy(torch.device("cpu"))})
    assert len(editor.fit(requests[:2], evaluate=False).journal) == 1


def test_a_part_of_a_config_is_left_for_later():
    class Node:
        class_path = "lightning.pytorch.strategies.DDPStrategy"

    check_settings({"strategy": Node(), "plugins": [Node()], "logger": True})


class StopAfterFirst(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


def kinds(folder):
    return [entry.kind for entry in read_entries(folder / "journal/ledger.jsonl")]


@pytest.mark.parametrize(
    ("settings", "edits"),
    [({"callbacks": [StopAfterFirst()]}, 2), ({"max_time": {"seconds": 0}}, 0)],
    ids=["callback", "time"],
)
def test_a_stopped_run_is_not_complete_and_goes_on(lm, requests, tmp_path, settings, edits):
    other, whole = copy.deepcopy(lm), copy.deepcopy(lm)
    first = editor_of(lm, settings)
    with pytest.warns(UserWarning, match=rf"stopped after {edits} of 6 facts and is not marked as complete.*run_dir="):
        result = first.fit(requests[:6], 2, run_dir=tmp_path / "run")
    assert (result.journal.edits, first.module.complete) == (edits, False)
    assert "end" not in kinds(tmp_path / "run")
    assert f'"edits": {edits}' in (tmp_path / "run/run.json").read_text()
    again, at_once = editor_of(other), editor_of(whole)
    again.fit(requests[:6], 2, run_dir=tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", NotTakenWarning)  # weak edits of a random model
        at_once.fit(requests[:6], 2, run_dir=tmp_path / "whole")
    assert state(other, again.module) == state(whole, at_once.module)
    assert again.module.complete
    assert kinds(tmp_path / "run")[-1] == kinds(tmp_path / "whole")[-1] == "end"
    assert '"edits": 6' in (tmp_path / "run/run.json").read_text()


def test_a_stop_at_the_last_batch_is_a_complete_run(lm, requests, tmp_path):
    editor = editor_of(lm, {"callbacks": [StopAfterFirst()]})
    editor.fit(requests[:2], 2, run_dir=tmp_path / "run")
    assert kinds(tmp_path / "run")[-1] == "end"


def test_the_default_type_of_the_process_decides_nothing(lm, requests, quiet):
    other = copy.deepcopy(lm)
    plain, narrow = editor_of(lm, quiet), editor_of(other, quiet)
    plain.fit(requests[:2])
    torch.set_default_dtype(torch.bfloat16)
    try:
        narrow.fit(requests[:2])
    finally:
        torch.set_default_dtype(torch.float32)
    assert state(lm, plain.module) == state(other, narrow.module)


def lightnings(caplog):
    return [record.message for record in caplog.records if record.name.startswith("lightning")]


def test_lightning_says_nothing_of_training(lm, requests, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", NotTakenWarning)
        editor = editor_of(lm)
        editor.fit(requests[:4], 2, run_dir=tmp_path / "run")
        editor.evaluate(requests[:2])
    assert lightnings(caplog) == []
    L.Trainer(accelerator="cpu", logger=False)  # the process is as it was
    assert any("GPU available" in line for line in lightnings(caplog))


def test_silence_can_be_nested_and_keeps_warnings(caplog):
    caplog.set_level(logging.INFO)
    log = logging.getLogger(TRAINING_WORDS[0])
    with silence():
        with silence():
            log.info("tip")
        log.info("tip")
        log.warning("trouble")
    log.info("later")
    assert lightnings(caplog) == ["trouble", "later"]


@pytest.mark.parametrize("batches", [0, 1])
def test_an_interrupt_is_one_and_says_how_to_go_on(batches, lm, requests, tmp_path, caplog):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        editor_of(lm, {"callbacks": [StopAfter(batches)]}).fit(requests[:4], 2, run_dir=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is handler
    words = f"stopped: {batches} batches are done and stored; go on with: editor.fit(..., run_dir='{tmp_path / 'run'}')"
    assert words in caplog.messages


class StopAsking(L.Callback):
    """Ends an evaluation as an interrupt would."""

    def on_validation_batch_start(self, *_):
        raise KeyboardInterrupt


def test_an_interrupted_evaluation_is_an_interrupt(lm, requests):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        editor_of(lm, {"callbacks": [StopAsking()], "logger": False}).evaluate(requests[:2])
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_exit_that_is_no_interrupt_stays_one(lm, requests, tmp_path):
    with pytest.raises(SystemExit, match="3"):
        editor_of(lm, {"callbacks": [StopAfter(0, SystemExit(3))]}).fit(requests[:2], run_dir=tmp_path / "run")
