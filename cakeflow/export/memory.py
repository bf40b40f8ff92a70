"""Modules that edits put in place, such as side memories: their tensors, to be put into the unedited model again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from cakeflow.errors import EditError, ExportError
from cakeflow.export.delta import require_base, require_finite
from cakeflow.export.manifest import FROM_A_COPY, REMEDY, Manifest
from cakeflow.journal.changes import kind_of
from cakeflow.journal.journal import Journal
from cakeflow.journal.policy import Policy
from cakeflow.models.base import EditableModel
from cakeflow.storage.atomic import uninterrupted, write_tensors
from cakeflow.storage.tensors import read_tensors

MEMORY = "memory.safetensors"


def write_memory(journal: Journal, _manifest: Manifest) -> Callable[[Path], None]:
    """A function that fills a folder with the tensors of all changes; see ``export``."""
    tensors = {
        f"{i}/{name}": each for i, change in enumerate(journal.changes) for name, each in change.tensors().items()
    }
    return lambda folder: write_tensors(folder / MEMORY, tensors)


def apply_memory(model: EditableModel, folder: str | Path, policies: Sequence[Policy] = ()) -> Manifest:
    """Put the modules of an export into the unedited model: all of them, or none.

    Args:
        model: The model that the export was made from; it is changed in place.
        folder: The export.
        policies: As for ``apply_delta``.

    Returns:
        The export's manifest.

    Raises:
        ExportError: If this is another model, or the export is not as it was written; the model is as before.
        LedgerError: If the plugin of a change is not imported.
        PolicyError: If a policy forbids it.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    tensors = _read(folder, manifest)
    require_base(model, manifest, folder, policies)
    with _own_errors(folder):
        changes = [
            kind_of(change.kind).from_tensors(change.place, _of(index, tensors))
            for index, change in enumerate(manifest.changes)
        ]
        originals = {change.place: (change, change.read(model)) for change in reversed(changes)}
    with uninterrupted():
        try:
            with _own_errors(folder):
                for change in changes:
                    change.apply(model)
        except BaseException:
            for change, content in originals.values():
                change.undo(model, content)
            raise
    return manifest


@contextmanager
def _own_errors(folder: Path) -> Iterator[None]:
    """Say of an export that was forged that its tensors do not fit, whatever torch raises for them."""
    try:
        yield
    except EditError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ExportError(f"{folder / MEMORY} does not fit its manifest or this model ({error}); {REMEDY}") from error


def _of(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    stem = f"{index}/"
    return {name.removeprefix(stem): each for name, each in tensors.items() if name.startswith(stem)}


def _read(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    path = folder / MEMORY
    if manifest.format != "memory" or set(manifest.files) != {MEMORY}:
        raise ExportError(f"{folder} is no memory, but format={manifest.format!r} with files {sorted(manifest.files)}")
    tensors = read_tensors(path, str(path), ExportError, FROM_A_COPY, manifest.files[MEMORY]).tensors
    require_finite(tensors, folder)
    return tensors
