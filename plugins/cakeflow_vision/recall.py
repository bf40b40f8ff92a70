"""What a model computed from images, kept under hashes of both, so that nothing is computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor

from cakeflow.models import VisionModel
from cakeflow.storage import content_key, tensor_hash

T = TypeVar("T")


class Recall:
    """Values by what decides them: the model, the images, and further settings.

    Representations and the states of heads do not depend on the classifiers, which an edit may have changed since: with
    ``classifiers=False`` they are found again. Edits of one model may share a ``Recall``. The values are small
    (representations, means, scores), and are kept until it is dropped.

    Example:
        >>> len(Recall())
        0
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

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
        """
        hashes = [each if isinstance(each, str) else tensor_hash(each) for each in images]
        key = content_key(model_hash(vm, classifiers=classifiers), name, hashes)
        if key not in self._values:
            self._values[key] = compute()
        return cast(T, self._values[key])


def model_hash(vm: VisionModel, *, classifiers: bool = True) -> str:
    """Return a hash of a model's weights, config and processor, the weights of the classifiers left out or not."""
    outside = () if classifiers else tuple(f"{path}." for path in vm.classifiers)
    tensors = sorted(vm.model.state_dict().items())
    hashes = {name: tensor_hash(each) for name, each in tensors if not (outside and name.startswith(outside))}
    return content_key(vm.identity(), hashes)
