"""A delta: the edited weights alone, to be put into the model that they were edited in, and into no other.

Each weight lies there as the factors of its changes, as the entries that differ, or whole (``delta_layout``), whichever
is smallest; the same bits come of all of them on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cakeflow.errors import ExportError, PolicyError, with_faults
from cakeflow.export.delta_layout import Layout, Layouts, packed, unpacked
from cakeflow.export.manifest import FROM_A_COPY, MANIFEST, REMEDY, Manifest
from cakeflow.export.options import ExportOptions
from cakeflow.journal.changes import WeightChange
from cakeflow.journal.journal import Journal
from cakeflow.journal.policy import Policy
from cakeflow.models.base import EditableModel
from cakeflow.storage.atomic import uninterrupted, write_tensors
from cakeflow.storage.hashing import tensor_hash
from cakeflow.storage.tensors import read_tensors
from cakeflow.storage.typed import read_as

DELTA = "delta.safetensors"


@torch.no_grad()
def write_delta(
    journal: Journal, manifest: Manifest, options: ExportOptions
) -> tuple[Manifest, Callable[[Path], None]]:
    """The manifest with the layout of each weight, and a function that fills a folder; see ``export``."""
    lm = journal.model
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Layout] = {}
    for name, tensor in journal.state().items():
        if name not in manifest.weights:
            continue
        require_finite({name: tensor}, Path(DELTA))
        layouts[name], parts = Layout(layout="dense", bytes=tensor.nbytes, saved=0), {"": tensor}
        if options.layout != "dense":
            updates = [each.update for each in journal.changes if isinstance(each, WeightChange) and each.place == name]
            smallest, smaller = packed(
                lm.oriented(name, journal.original(name)[name]), lm.oriented(name, tensor), updates
            )
            if smallest.layout != "dense":  # a weight that lies there whole has the orientation of its module
                layouts[name], parts = smallest, smaller
        tensors |= {_part_name(name, part): each for part, each in parts.items()}
    details = Layouts(layouts=layouts).model_dump(mode="json")
    return manifest.model_copy(update={"details": details}), lambda folder: write_tensors(folder / DELTA, tensors)


def _part_name(name: str, part: str) -> str:
    """Name in the file of a part of a weight; a weight that is there whole has its own name."""
    return f"{name}/{part}" if part else name


def _place_of(tensor: str, manifest: Manifest) -> str:
    """Name of the weight that a tensor of the file is a part of, or the whole."""
    return tensor if tensor in manifest.weights else tensor.rpartition("/")[0]


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
    tensors, layouts = _read(folder, manifest)
    require_base(lm, manifest, folder, policies)
    weights = _places(lm, manifest, folder)
    edited = {name: _edited(lm, name, manifest, layouts.get(name), tensors, folder) for name in weights}
    with uninterrupted():
        for name, weight in weights.items():
            weight.copy_(edited[name])
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


def _read(folder: Path, manifest: Manifest) -> tuple[dict[str, Tensor], dict[str, Layout]]:
    """The tensors, if they are in the one file that a delta has, as it was written, and their layouts, if it has any.

    Deltas were whole weights before there were layouts.
    """
    path = folder / DELTA
    if manifest.format != "delta" or set(manifest.files) != {DELTA}:
        raise ExportError(f"{folder} is no delta, but format={manifest.format!r} with files {sorted(manifest.files)}")
    tensors = read_tensors(path, str(path), ExportError, FROM_A_COPY, manifest.files[DELTA]).tensors
    stated = manifest.details or {"layouts": {}}
    layouts = read_as(Layouts, stated, f"{folder / MANIFEST}, details", ExportError, REMEDY).layouts
    names = {_place_of(name, manifest) for name in tensors}
    if unlike := (names ^ set(manifest.weights)) | (names ^ set(layouts) if layouts else set()):
        unlike_names = ", ".join(map(ascii, sorted(unlike)[:5]))
        raise ExportError(f"{path} and the manifest name different weights: {unlike_names}; {REMEDY}")
    return tensors, layouts


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


def _edited(
    lm: EditableModel,
    name: str,
    manifest: Manifest,
    layout: Layout | None,
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> Tensor:
    """The edited weight, as its module has it, if it is the one that the manifest names."""
    weight, hashes = lm.weight(name).detach(), manifest.weights[name]
    layout = layout or Layout(layout="dense", bytes=weight.nbytes, saved=0)
    parts = {
        full.removeprefix(name).removeprefix("/"): each
        for full, each in tensors.items()
        if _place_of(full, manifest) == name
    }
    require_finite({_part_name(name, part): each for part, each in parts.items()}, folder)
    edited, whole = torch.empty_like(weight, device="cpu"), layout.layout == "dense"
    try:
        given = unpacked(weight if whole else lm.oriented(name), layout, parts)
    except ValueError as fault:
        raise ExportError(
            f"{folder}, {name}: {fault}, but the model has {weight.dtype} {tuple(weight.shape)}; {REMEDY}"
        ) from fault
    (edited if whole else lm.oriented(name, edited)).copy_(given)
    if (tensor_hash(weight), tensor_hash(edited)) != (hashes.before, hashes.after):
        raise ExportError(f"{folder}, {name}: not the weight that the manifest names; {REMEDY}")
    return edited
