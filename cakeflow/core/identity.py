"""The identity of a run beside model and data: settings as text, and the arithmetic that decides the last bits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import FORMAT, Arithmetic, RunBody
from cakeflow.journal.steps import request_hash
from cakeflow.models.base import EditableModel
from cakeflow.models.loading import recorded
from cakeflow.models.products import has_fast_products
from cakeflow.solvers.covariance import Covariance
from cakeflow.storage.cache import content_key
from cakeflow.storage.hashing import tensor_hash, tensor_hashes
from cakeflow.weighters.base import Weighter


def run_body(module: Any, data: Any, trainer: L.Trainer) -> RunBody:
    """Return what the ledger says of a run that begins: everything that decides its outcome, and who runs it on what.

    Args:
        module: The edit module with its model.
        data: The run's ``EditDataModule``, or None.
        trainer: The run's Trainer.
    """
    requests: Sequence[EditRequest] = data.requests if data else ()
    return RunBody(
        model=module.name,
        settings=module.settings(),
        edits=len(requests),
        batch_size=data.batch_size if data else None,
        data=hashlib.sha256("".join(map(request_hash, requests)).encode()).hexdigest(),
        arithmetic=arithmetic(module.lm, trainer),
        format=FORMAT,
        loading=recorded(module._loading, module.lm),
        method=module.method,
        **circumstances().to_dict(),
    )


def arithmetic(lm: EditableModel, trainer: L.Trainer) -> Arithmetic:
    """Return how a Trainer's run of a model is computed."""
    device = lm.device if lm.dispatched else trainer.strategy.root_device
    parts = getattr(trainer.strategy, "sizes", (1, 1))[1]  # sums of products in another order
    return Arithmetic(
        device=device.type,
        precision=str(trainer.precision),
        attention=lm.attention,
        products=torch.get_float32_matmul_precision()
        + (", oneDNN" if has_fast_products() else "")
        + (f", tensor parallel {parts}" if parts > 1 else ""),
        threads=torch.get_num_threads(),
    )


def inputs_of(
    contexts: Contexts | None, layers: Sequence[int], weighter: Weighter, covariances: Mapping[int, Covariance]
) -> dict[str, str]:
    """Name -> SHA-256 of the contexts, the layers with what was measured of them, and their second moments.

    Eigenvectors from a file are named as well: other threads or libraries leave other last bits in them.
    """
    known = {f"basis/{layer}": covariances[layer].basis for layer in layers}
    return {
        "contexts": content_key(*(((),) if contexts is None else (contexts.groups, *contexts.chats))),
        "weighter": content_key(list(layers), described(weighter)),
        **tensor_hashes({f"moment/{layer}": covariances[layer].moment for layer in layers}),
        **tensor_hashes({name: basis for name, basis in known.items() if basis is not None}),
    }


def described(value: object) -> Any:
    """A setting as JSON-ready data, without the address of any object, which differs from process to process."""
    if isinstance(value, (int, list)):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", "; ".join([repr(value), *_left_out(value)]))


def _left_out(value: object) -> Iterator[str]:
    """Yield what the text of a value does not show: numbers of tensors, attributes of an object with a bare text."""
    if isinstance(value, Tensor):
        yield tensor_hash(value)
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _left_out(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _left_out(getattr(value, each.name))
    elif type(value).__repr__ is object.__repr__:
        for name, part in getattr(value, "__dict__", {}).items():
            yield tensor_hash(part) if isinstance(part, Tensor) else f"{name}={part!r}"
