"""The Lightning strategy of a run on several ranks, which all see every batch: with a model each, or a sharded one.

Ranks with a model each deal out the work. Ranks that share a model have to run every pass together, so they deal out
none: that is for models that one device cannot hold.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cakeflow import ranks
from cakeflow.core.identity import run_body
from cakeflow.core.sharding import shard_model, whole_journal
from cakeflow.errors import ConfigError, RanksError
from cakeflow.storage.cache import cache_folder

R = TypeVar("R")
NAME = "cakeflow"
"""Name of the strategy in a Trainer's settings."""
PATIENCE, LOCKSTEP_PATIENCE = timedelta(days=1), timedelta(hours=1)
"""Longest wait for a rank, which may search for hours unless all search together; a dead one is missed at once."""
RENDEZVOUS = timedelta(minutes=30)
"""Longest wait for the other ranks to start."""
MESH = ("data_parallel", "tensor_parallel")
"""Dimensions of the mesh of a sharded model, as Lightning's ``ModelParallelStrategy`` names them."""


class RankStrategy(DDPStrategy):
    """Lightning's launcher, devices and cluster environments, without the wrapper that averages gradients.

    Nothing is trained, so there is nothing to average: the ranks exchange targets, keys and answers, and solve alike
    (``cakeflow.ranks``). The exchanges are few and of objects in host memory, so that they are gloo's on GPUs too; gloo
    misses a rank at once when its process dies. Weights that are gathered on GPUs go through NCCL.

    Args:
        data_parallel_size: Ranks over which every block's matrices are sharded, and gathered while it runs (FSDP2).
        tensor_parallel_size: Ranks over which the products of every block are split.
        timeout: Longest wait for another rank.
        kwargs: Further arguments of ``DDPStrategy``.
    """

    def __init__(
        self,
        data_parallel_size: int = 1,
        tensor_parallel_size: int = 1,
        timeout: timedelta | None = None,
        **kwargs: Any,
    ) -> None:
        self.sizes = (data_parallel_size, tensor_parallel_size)
        self.lockstep = self.sizes != (1, 1)
        self.patience = timeout or (LOCKSTEP_PATIENCE if self.lockstep else PATIENCE)
        super().__init__(timeout=RENDEZVOUS, process_group_backend="gloo", **kwargs)

    def _configure_launcher(self) -> None:
        if self.num_processes * self.num_nodes > 1:  # one process is there already, and its variables stay as they are
            super()._configure_launcher()

    def setup_distributed(self) -> None:
        """Join the other ranks, which have to come within ``RENDEZVOUS``.

        Raises:
            RanksError: If they do not.
        """
        try:
            super().setup_distributed()
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise RanksError(
                f"{self.world_size} ranks were to meet at {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')}, and did not within {RENDEZVOUS}; start all of them, with one "
                "address and port, and without variables of an earlier run (LOCAL_RANK)"
            ) from error
        dist.distributed_c10d._set_pg_timeout(self.patience)

    def _get_process_group_backend(self) -> str:
        return "cpu:gloo,cuda:nccl" if self.lockstep and self.root_device.type == "cuda" else "gloo"

    @property
    def mesh(self) -> DeviceMesh:
        """The ranks of a sharded model by the dimensions of ``MESH``."""
        return init_device_mesh(self.root_device.type, self.sizes, mesh_dim_names=MESH)

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the model, or move it to the device; unlike DDP, without rank 0's weights, which would hide others."""
        assert self.accelerator is not None
        if self.lockstep:
            shard_model(self.lightning_module, self.mesh)
        self.accelerator.setup(trainer)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register the strategy under its own name; ``DDPStrategy`` has registered its own."""
        strategy_registry.register(NAME, cls, description="edits on several ranks, each with the whole model")


def strategy_of(trainer: Any) -> RankStrategy | None:
    """Return the strategy of a Trainer that runs on several ranks; None for one process, and for no Trainer."""
    strategy = getattr(trainer, "strategy", None)
    return strategy if isinstance(strategy, RankStrategy) and trainer.world_size > 1 else None


@contextmanager
def join(trainer: L.Trainer) -> Iterator[None]:
    """Have a Trainer's ranks work together in the body; nothing but the body for one process.

    The processes are there already. Each of them is to see every batch, so Lightning splits no data among them.
    """
    if (strategy := strategy_of(trainer)) is None:
        yield
        return
    strategy.setup_environment()
    trainer._accelerator_connector.use_distributed_sampler = False
    with ranks.together(lockstep=strategy.lockstep):
        warnings.filterwarnings("ignore", message=".*It is recommended to use .self.log")  # all log the same numbers
        yield


def together(module: Any) -> AbstractContextManager[None]:
    """Have the ranks that ran a module last work together in the body, which all of them run."""
    return ranks.together(lockstep=module.lm.sharded) if strategy_of(module._trainer) else nullcontext()


def on_whole_model(module: Any, run: Callable[[Any], R]) -> R:
    """Run something with the journal of a whole model on the first rank, and return its result on every rank.

    Args:
        module: The edit module.
        run: Function of the journal; where the model is sharded, of a whole copy's.
    """
    with together(module):
        journal = whole_journal(module)
        return ranks.on_first(lambda: run(journal))


def jointly(trainer: L.Trainer, run: Callable[[], R]) -> R:
    """Run a function on all ranks of a Trainer, whose processes are started first if they are not there."""
    launcher = trainer.strategy.launcher
    if strategy_of(trainer) is None or launcher is None or ranks.are_joined():
        return run()
    return launcher.launch(partial(_joined, trainer, run), trainer=trainer)  # type: ignore[no-any-return]


def _joined(trainer: L.Trainer, run: Callable[[], R]) -> R:
    with join(trainer):
        return run()


def check_ranks(module: Any, trainer: L.Trainer) -> None:
    """Check that an edit method can run on the ranks of a Trainer, and make it ready, before anything is measured.

    Raises:
        ConfigError: If it edits in one process only, its model is spread over the devices of one, or the ranks are not
            as many as the model is to be sharded over.
    """
    if (strategy := strategy_of(trainer)) is None:
        return
    lockstep, sizes = strategy.lockstep, strategy.sizes
    if lockstep and prod(sizes) != trainer.world_size:
        raise ConfigError(
            f"data_parallel_size={sizes[0]} times tensor_parallel_size={sizes[1]} is not the number of ranks, "
            f"{trainer.world_size}; set sizes whose product it is"
        )
    module.use_ranks(lockstep=lockstep)
    if hasattr(module, "lm") and module.lm.dispatched:
        raise ConfigError(
            f"the model is spread over devices by device_map, and the Trainer has {trainer.world_size} ranks, each "
            "with a model or a part of it on a device of its own; set devices=1, or leave out device_map"
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
    if not ranks.are_joined():
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
