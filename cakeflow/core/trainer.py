"""Checks of a Trainer, whose settings must not change model or run unasked, and what it says."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from cakeflow.core.strategy import NAME, RankStrategy
from cakeflow.errors import ConfigError

FIRST_FACTS = "to edit the first facts only, set data.limit"
SETTINGS = {
    "fast_dev_run": ((False,), f"it would edit one batch and store nothing; {FIRST_FACTS}"),
    "overfit_batches": ((0.0,), FIRST_FACTS),
    "limit_train_batches": ((1.0,), FIRST_FACTS),
    "max_steps": ((-1,), FIRST_FACTS),
    "limit_val_batches": ((1.0,), "metrics are over all requests; to measure fewer, set data.limit, or evaluate=False"),
    "accumulate_grad_batches": ((1,), "there are no gradients to add up; to edit more facts at once, set batch_size"),
    "gradient_clip_val": ((None, 0), "there are no gradients to clip; to bound an edit, set max_relative_update"),
    "reload_dataloaders_every_n_epochs": ((0,), "there is one epoch"),
}
"""Setting of a Trainer -> the values that leave a run as it is, and advice."""

PLACE = ("devices", "num_nodes", "strategy", "precision", "plugins")
"""Further settings that ``check_trainer`` may refuse."""
EXPECTED_WARNINGS = (
    "configure_optimizers",
    "does not have many workers",
    "in eval mode",
    "have no `val_dataloader`",
    "Total length of `list` across ranks is zero",  # a run without evaluation
    "training_step. returned",
    ".isinstance.treespec, LeafSpec",
    "Experiment logs directory",  # the journal is there already; of a resumed run every row is logged again
    "[A-Z]+ available but not used",  # the user chose another device
)
"""Parts of the warnings by which Lightning rightly points out that this is no training."""
TRAINING_WORDS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
"""Loggers of what Lightning tells whoever trains: tips, devices, ends of loops."""


@contextmanager
def quiet() -> Iterator[None]:
    """Let Lightning say nothing in the body but unexpected warnings."""

    def is_warning(record: logging.LogRecord) -> bool:  # one of each call, so that calls can be nested
        return record.levelno >= logging.WARNING

    loggers = [logging.getLogger(name) for name in TRAINING_WORDS]
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=f".*{message}")
        for logger in loggers:
            logger.addFilter(is_warning)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(is_warning)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the arguments of a Trainer before a model or data are read for it; see ``check_trainer``.

    Args:
        settings: Arguments of a Trainer; what a config has in the place of an object is left for ``check_trainer``.
    """
    later = ("devices", "num_nodes") if _is_node(settings.get("strategy")) else ()  # it says what they are for
    settings, defaults = with_ranks(settings), signature(L.Trainer).parameters
    chosen = {
        name: settings[name]
        for name in (*PLACE, *SETTINGS)
        if name not in later
        and name in settings
        and settings[name] not in (None, defaults[name].default)
        and not _is_node(settings[name])
    }
    if chosen.keys() - {"devices"} or chosen.get("devices", 1) != 1:
        accelerator = settings.get("accelerator", "auto")
        bare = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        copied = deepcopy(chosen)  # a strategy serves one Trainer
        with quiet():
            trainer = L.Trainer(accelerator=accelerator, **copied, **bare)  # type: ignore[arg-type]
        check_trainer(trainer, edits=False)


def with_ranks(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a Trainer's arguments with our strategy in the place of Lightning's, the default for several devices.

    Plain DDP becomes ranks with a model each, ``ModelParallelStrategy`` ranks that share one.

    Args:
        settings: Arguments of a Trainer.
    """
    strategy = settings.get("strategy") or "auto"
    devices, nodes = settings.get("devices") or 1, settings.get("num_nodes") or 1
    count = len(devices) if isinstance(devices, (list, tuple)) else int(devices) if str(devices).isdigit() else 1
    several = strategy == "auto" and (count > 1 or nodes > 1)
    if isinstance(strategy, ModelParallelStrategy):
        rows, columns = strategy._data_parallel_size, strategy._tensor_parallel_size
        sizes = nodes if rows == "auto" else rows, count if columns == "auto" else columns
        return {**settings, "strategy": RankStrategy(*sizes)}
    return {**settings, "strategy": NAME} if strategy == "ddp" or several else dict(settings)


def _is_node(value: object) -> bool:
    """True for a part of a config from which an object is yet to be made."""
    return hasattr(value, "class_path") or (isinstance(value, list) and any(map(_is_node, value)))


def check_trainer(trainer: L.Trainer, *, edits: bool) -> None:
    """Check that a Trainer neither splits, cuts short nor changes what it is given.

    Args:
        trainer: The Trainer.
        edits: Whether it is to edit, rather than evaluate only.

    Raises:
        ConfigError: Naming every setting that does, with its value and a remedy.
    """
    if faults := [*_faults_of_place(trainer), *_faults_of_settings(trainer)]:
        raise ConfigError(f"the Trainer does not fit: {'; '.join(faults)}")
    if edits and trainer.max_epochs != 1:
        raise ConfigError(f"max_epochs is {trainer.max_epochs}; an edit is applied once: use max_epochs=1")


def end_on_sigterm(trainer: L.Trainer) -> None:
    """Have SIGTERM end a Trainer's run as Ctrl-C does, with whole batches, and exit status 143.

    By Lightning's own handler a run would end behind its batch with status 0, as if it were done, one that evaluates or
    stands in its last batch not at all, and several ranks might hang: the handler has them exchange a tensor wherever
    they are.
    """
    trainer._signal_connector._sigterm_notifier_fn = _terminated  # type: ignore[method-assign]


def _terminated(signum: int, _: object) -> NoReturn:
    raise SystemExit(128 + signum)


def _faults_of_place(trainer: L.Trainer) -> Iterator[str]:
    """Yield why a Trainer does not run one process on one device, or our ranks, with the weights as they are."""
    strategy = trainer.strategy
    if reason := _fault_of_strategy(strategy):
        yield (
            f"strategy {type(strategy).__name__} over devices = {trainer.num_devices}, num_nodes = "
            f"{trainer.num_nodes}: {reason}; use strategy={NAME!r}, which has the whole model on every device, or "
            "devices=1 and strategy='auto' (a model too large for one device: model_kwargs={'device_map': 'auto'}, or "
            "cakeflow.core.RankStrategy(data_parallel_size=RANKS))"
        )
    if type(trainer.precision_plugin) is not Precision:
        yield (
            f"precision = {trainer.precision!r} would cast the model's weights or its passes; load the model in the "
            "type that you want, dtype='bfloat16' for example, and leave precision out"
        )


def _fault_of_strategy(strategy: object) -> str:
    """Return why a strategy cannot edit; empty if it can."""
    if isinstance(getattr(strategy, "launcher", None), _MultiProcessingLauncher):
        return "processes that are started from a function end with it, and the models that they edited with them"
    if isinstance(strategy, (SingleDeviceStrategy, RankStrategy)):
        return ""
    if isinstance(strategy, DDPStrategy):
        return "it wraps the model to average gradients, of which there are none, and deals the requests out"
    return "it holds weights in a form of its own, which an edit cannot read and write"


def _faults_of_settings(trainer: L.Trainer) -> Iterator[str]:
    for name, (neutral, advice) in SETTINGS.items():
        value = getattr(trainer, name)
        if not any(value == each and type(value) is type(each) for each in neutral):  # of batches, 1 is not 1.0
            yield f"{name} = {value!r}: {advice}"
            if name == "fast_dev_run":  # which sets some of the others
                return


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Make new tensors float32, whatever the default type of the process is: sums of a step need it."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
