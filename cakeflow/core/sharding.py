"""The model of a run, sharded over its ranks, and whole once more for what one rank does with it."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from cakeflow import ranks
from cakeflow.journal.journal import Journal
from cakeflow.models.architecture import Site
from cakeflow.models.shards import Skeleton, shard


def shard_model(module: Any, mesh: DeviceMesh) -> None:
    """Shard the model of an edit module over the ranks of a mesh, if it is not yet.

    Raises:
        ArchitectureError: If the model cannot be split so; it is left whole.
    """
    lm = module.lm
    if lm.sharded:
        return
    blocks = [lm.architecture.path(Site(layer)) for layer in range(lm.depth)]
    counts = (getattr(lm.config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    skeleton = Skeleton(lm.model)
    shard(lm.model, blocks, getattr(lm.model, "tp_plan", None) or {}, list(filter(None, counts)), mesh)
    module.skeleton = skeleton
    del module.model  # out of the sight of Lightning, which moves every submodule, as a model on several devices is
    module.__dict__["model"] = lm.model


def whole_journal(module: Any) -> Journal | None:
    """Return the journal of a module, or, where its model is sharded, one of a whole copy in host memory.

    The copy is gathered from the unedited model, by all ranks together, and edited as the journal says. The first rank
    has it; the others get None.
    """
    journal: Journal = module.journal
    if not module.lm.sharded:
        return journal
    with journal.reverted():
        model = module.skeleton.filled(module.lm.model, keep=ranks.is_first())
    return journal.copied_to(module.lm.exchanged(model, module.lm.preprocessor)) if model is not None else None
