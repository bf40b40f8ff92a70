"""A delta: the edited weights alone, to be put into the model that they were edited in, and into no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cakeflow.errors import ExportError, PolicyError, with_faults
from cakeflow.export.manifest import FROM_A_COPY, REMEDY, Manifest
from cakeflow.journal.policy import Policy
from cakeflow.models.base import EditableModel
from cakeflow.storage.atomic import uninterrupted
from cakeflow.storage.hashing import tensor_hash
from cakeflow.storage.tensors import read_tensors

DELTA = "delta.safetensors"


@torch.no_grad()
def apply_delta(lm: EditableModel, folder: str | Path, policies: Sequence[Policy] = ()) -> Manifest:
    """Put the weights of a delta into the unedited model: all of them, bit for bit, or none.

    Only weights that an edit could have changed are ever written. The result is a model of its own: edits made in it
    later have it as their base.

    Args:
        lm: The model that the delta was made from, of the same type; its weights are changed in place.
        folder: The delta, as exported.
        policies: Policies that must allow it. A delta names no facts and has no metrics, so rules about these do not
            hold: repeat the run itself under such a policy.

    Returns:
        What the delta says of itself.

    Raises:
        ExportError: If this is another model, or the delta is not what was exported; the model is as before.
        PolicyError: If a policy forbids it.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    tensors = _read(folder, manifest)
    require_base(lm, manifest, folder, policies)
    weights = _places(lm, manifest, folder)
    for name, weight in weights.items():
        _require_fit(name, weight, manifest, tensors, folder)
    with uninterrupted():
        for name, weight in weights.items():
            weight.copy_(tensors[name])
    return manifest


def _require_permission(policies: Sequence[Policy], manifest: Manifest) -> None:
    """Check that policies allow an export, which names no facts and has no metrics: rules about these do not hold.

    Raises:
        PolicyError: If one forbids it.
    """
    names = [manifest.model, manifest.fingerprint]
    faults = [str(each) for policy in policies for each in policy.refusals(names, (), unknown=manifest.edits)]
    faults += [each for policy in policies for each in policy.violations({}, {})]
    if faults:
        raise PolicyError(with_faults("the policy is broken; nothing was changed:", faults))


def _read(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The tensors, if they are in the one file that a delta has, as it was written."""
    path = folder / DELTA
    if manifest.format != "delta" or set(manifest.files) != {DELTA}:
        raise ExportError(f"{folder} is no delta, but format={manifest.format!r} with files {sorted(manifest.files)}")
    tensors = read_tensors(path, str(path), ExportError, FROM_A_COPY, manifest.files[DELTA]).tensors
    if set(tensors) != set(manifest.weights):
        unlike = ", ".join(map(ascii, sorted(set(tensors) ^ set(manifest.weights))[:5]))
        raise ExportError(f"{path} and the manifest name different weights: {unlike}; {REMEDY}")
    return tensors


def require_base(lm: EditableModel, manifest: Manifest, folder: Path, policies: Sequence[Policy] = ()) -> None:
    """Check that a model is the unedited one that an export was made from, and that policies allow the export.

    Raises:
        ExportError: If its type or hash differs.
        PolicyError: If a policy forbids it.
    """
    if str(lm.dtype) != manifest.dtype:
        raise ExportError(f"{folder} is for a model in {manifest.dtype}, this one is in {lm.dtype}; load it in that")
    fingerprint = lm.fingerprint()
    if fingerprint != manifest.fingerprint:
        raise ExportError(
            f"{folder} is for {manifest.model!a} with the hash {manifest.fingerprint[:16]}..., this model has "
            f"{fingerprint[:16]}...: other weights (edited already?), another config, tokenizer or transformers version"
        )
    _require_permission(policies, manifest)


def require_finite(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Check the tensors of an export, before it is written and before it is used.

    Raises:
        ExportError: Naming the first that is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ExportError(
                f"{folder}, {ascii(name)[:80]}: not finite, as no edit leaves a weight; {FROM_A_COPY}, or edit again"
            )


def _places(lm: EditableModel, manifest: Manifest, folder: Path) -> dict[str, nn.Parameter]:
    """Name -> the weight of that name, if edits could have changed it."""
    if foreign := sorted(set(manifest.weights) - set(lm.editable())):
        raise ExportError(f"{folder} names {ascii(foreign[0])[:80]}, which no edit of this model could change")
    return {name: lm.weight(name) for name in manifest.weights}


def _require_fit(
    name: str, weight: nn.Parameter, manifest: Manifest, tensors: Mapping[str, Tensor], folder: Path
) -> None:
    tensor, hashes = tensors[name], manifest.weights[name]
    if (tensor.shape, tensor.dtype) != (weight.shape, weight.dtype):
        raise ExportError(
            f"{folder}, {name}: {tensor.dtype} {tuple(tensor.shape)}, but the model has {weight.dtype} "
            f"{tuple(weight.shape)}; {REMEDY}"
        )
    require_finite({name: tensor}, folder)
    if (tensor_hash(weight), tensor_hash(tensor)) != (hashes.before, hashes.after):
        raise ExportError(f"{folder}, {name}: not the weight that the manifest names; {REMEDY}")
