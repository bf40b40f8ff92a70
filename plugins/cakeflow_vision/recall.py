"""Results of a model on images, kept under hashes of both, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor

from cakeflow.errors import ConfigError
from cakeflow.models import VisionModel
from cakeflow.storage import (
    content_key,
    fault_in,
    read_tensors,
    require_writable,
    tensor_hash,
    tensor_hashes,
    write_tensors,
)

T = TypeVar("T", bound="Tensor | Mapping[str, Tensor] | Mapping[int, Tensor]")


class Recall:
    """Values by what decides them: the model, the images, and further settings.

    Representations and the states of heads do not depend on the classifiers, which an edit may have changed since: with
    ``classifiers=False`` they are found again. Edits of one model may share a ``Recall``. The values are small
    (representations, means, scores), and are kept until it is dropped or, in a folder, for later processes.

    Args:
        folder: Folder for files of the values; None keeps them in memory alone.

    Example:
        >>> len(Recall())
        0
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._values: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __call__(
        self,
        vm: VisionModel,
        name: str,
        images: Sequence[str | Tensor],
        compute: Callable[[], T],
        *,
        classifiers: bool = True,
    ) -> T:
        """Return a value, computed now if it is not known.

        Args:
            vm: The model.
            name: What is computed, with all further settings.
            images: The images and labels, as tensors or as hashes.
            compute: Computes the value.
            classifiers: Whether it depends on the classifiers.

        Raises:
            ConfigError: If a file of the folder is damaged, naming it.
        """
        hashes = [each if isinstance(each, str) else tensor_hash(each) for each in images]
        key = content_key(model_hash(vm, classifiers=classifiers), name, hashes)
        if key not in self._values:
            path = self.folder / f"{key}.safetensors" if self.folder else None
            if path is not None and path.exists():
                self._values[key] = _read(path, vm)
            else:
                self._values[key] = value = compute()
                if path is not None:
                    tensors = _named(value)
                    write_tensors(require_writable(path.parent) / path.name, tensors, tensor_hashes(tensors))
        return cast(T, self._values[key])


def _named(value: Tensor | Mapping[str, Tensor] | Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Return a value as tensors by name; a number in the name's place is told from a text that looks like one."""
    if isinstance(value, Tensor):
        return {"value": value}
    return {f"{type(key).__name__} {key}": tensor for key, tensor in value.items()}


def _read(path: Path, vm: VisionModel) -> Any:
    remedy = "delete it, and it is computed again"
    file = read_tensors(path, str(path), ConfigError, remedy)
    if fault := fault_in(file, {}):
        raise ConfigError(f"{path} is damaged ({fault}); {remedy}")
    ready = {name: each.to(vm.device) for name, each in file.tensors.items()}
    if set(ready) == {"value"}:
        return ready["value"]
    pairs = ((name.partition(" "), each) for name, each in ready.items())
    values = [(int(key) if kind == "int" else key, each) for (kind, _, key), each in pairs]
    return dict(values)


def model_hash(vm: VisionModel, *, classifiers: bool = True) -> str:
    """Return a hash of a model's weights, config and processor, the weights of the classifiers left out or not."""
    outside = () if classifiers else tuple(f"{path}." for path in vm.classifiers)
    tensors = sorted(vm.model.state_dict().items())
    hashes = {name: tensor_hash(each) for name, each in tensors if not (outside and name.startswith(outside))}
    return content_key(vm.identity(), hashes)
