"""The Lightning strategy of a run on several ranks: the same model on each of them, which all see every batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn

from cakeflow import ranks
from cakeflow.core.identity import run_body
from cakeflow.errors import ConfigError
from cakeflow.storage.cache import cache_folder

R = TypeVar("R")
NAME = "cakeflow"
"""Name of the strategy in a Trainer's settings."""
PATIENCE = timedelta(days=1)
"""Longest wait for another rank, which may search for hours; one that died is missed at once."""


class RankStrategy(DDPStrategy):
    """Lightning's launcher, devices and cluster environments, without the wrapper that averages gradients.

    Nothing is trained, so there is nothing to average: the ranks exchange targets, keys and answers, and solve alike
    (``cakeflow.ranks``). The exchanges are few and of objects in host memory, so that they are gloo's on GPUs too; gloo
    misses a rank at once when its process dies.

    Args:
        timeout: Longest wait for another rank.
        kwargs: Further arguments of ``DDPStrategy``.
    """

    def __init__(self, timeout: timedelta = PATIENCE, **kwargs: Any) -> None:
        super().__init__(timeout=timeout, process_group_backend="gloo", **kwargs)

    def setup(self, trainer: L.Trainer) -> None:
        """Move the model to the rank's device; unlike DDP's, without weights from rank 0, which would hide others."""
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy under its own name; ``DDPStrategy`` has registered its own."""
        strategy_registry.register(NAME, cls, description="edits on several ranks, each with the whole model")


def is_joint(trainer: Any) -> bool:
    """Return whether a Trainer runs on several ranks; False for none."""
    return isinstance(getattr(trainer, "strategy", None), RankStrategy) and trainer.world_size > 1


@contextmanager
def join(trainer: L.Trainer) -> Iterator[None]:
    """Have a Trainer's ranks work together in the body; nothing but the body for one process.

    The processes are there already. Each of them is to see every batch, so Lightning splits no data among them.
    """
    if not is_joint(trainer):
        yield
        return
    trainer.strategy.setup_environment()
    trainer._accelerator_connector.use_distributed_sampler = False
    with ranks.together():
        warnings.filterwarnings("ignore", message=".*It is recommended to use .self.log")  # all log the same numbers
        yield


def together(module: Any) -> AbstractContextManager[None]:
    """Have the ranks that ran a module last work together in the body, which all of them run."""
    return ranks.together() if is_joint(module._trainer) else nullcontext()


def jointly(trainer: L.Trainer, run: Callable[[], R]) -> R:
    """Run a function on all ranks of a Trainer, whose processes are started first if they are not there."""
    launcher = trainer.strategy.launcher
    if not is_joint(trainer) or launcher is None or ranks.world_size() > 1:
        return run()
    return launcher.launch(partial(_joined, trainer, run), trainer=trainer)  # type: ignore[no-any-return]


def _joined(trainer: L.Trainer, run: Callable[[], R]) -> R:
    with join(trainer):
        return run()


def check_ranks(module: Any, trainer: L.Trainer) -> None:
    """Check that an edit method can run on the ranks of a Trainer, and make it ready, before anything is measured.

    Raises:
        ConfigError: If it edits in one process only, or its model is spread over the devices of one.
    """
    if not is_joint(trainer):
        return
    module.use_ranks()
    if hasattr(module, "lm") and module.lm.sharded:
        raise ConfigError(
            f"the model is spread over devices by device_map, and the Trainer has {trainer.world_size} ranks, each "
            "with a whole model on a device of its own; set devices=1, or leave out device_map"
        )


def require_same_run(module: Any, data: Any, trainer: L.Trainer, folder: Path | None) -> None:
    """Check that all ranks have the same model, settings, data, versions and folders, before anything is measured.

    Args:
        module: The edit module with its model.
        data: The ``EditDataModule``, or None.
        trainer: The Trainer.
        folder: The run folder.

    Raises:
        RanksError: On every rank, naming the first difference.
    """
    if ranks.world_size() == 1:
        return
    check_ranks(module, trainer)
    run = run_body(module, data, trainer).to_dict()
    settings = {f"settings.{name}": each for name, each in run.pop("settings").items()}
    same = {name: each for name, each in run.items() if name not in ("who", "machine")}
    ranks.agree({"weights": module.journal.base.fingerprint, **same, **settings}, "model, data or settings")
    ranks.require_shared(cache_folder(), "cache (CAKEFLOW_CACHE)")
    if folder is not None:
        ranks.require_shared(folder.parent, "place of the run folder")


if NAME not in StrategyRegistry:
    RankStrategy.register_strategies(StrategyRegistry)
