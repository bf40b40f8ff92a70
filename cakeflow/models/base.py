"""A model to edit: its modules and weights by name, evaluation mode, and its hash."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from typing_extensions import Self

from cakeflow.errors import ArchitectureError, ConfigError, NumericalError, listed
from cakeflow.models.architecture import Architecture, Site, is_transposed, linear_maps, reason_for_absence
from cakeflow.models.products import fast_products, without_cudnn_attention
from cakeflow.models.routing import RoutedModule, Scope, routed
from cakeflow.models.shards import is_sharded, let_go, whole

EDITABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights whose numbers mean themselves, without a scale beside them."""


class EditableModel(ABC):
    """The interface of a transformer to edit, of text or of images.

    Weights are named by their parameter (``model.layers.5.mlp.down_proj.weight``), modules by their path. Subclasses
    are frozen dataclasses with the fields below; they add what their requests need, such as a tokenizer.

    Attributes:
        model: The model, in whatever mode it is: calling this object runs it in evaluation mode.
        architecture: Module paths.
        masters: Name of a half-precision weight -> float32 copy that collects its changes.
    """

    model: nn.Module
    architecture: Architecture
    masters: dict[str, Tensor]

    @property
    @abstractmethod
    def config(self) -> PreTrainedConfig:
        """Config of the part that has the blocks."""

    @property
    def name(self) -> str:
        """Name or folder that the model was loaded from, or its class if it was built."""
        return str(self.model.name_or_path) or type(self.model).__name__

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the inputs."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the weights."""

    @property
    @abstractmethod
    def tuple_size(self) -> int:
        """Number of values that the blocks return in a tuple, 0 if they return a tensor."""

    @property
    def attention(self) -> str:
        """Implementation of attention, on which the last bits depend; empty if the model names none."""
        return str(getattr(getattr(self.model, "config", None), "_attn_implementation", None) or "")

    @property
    @abstractmethod
    def preprocessor(self) -> Any:
        """The maker of its inputs, saved beside it: a tokenizer or an image processor."""

    @abstractmethod
    def exchanged(self, model: Any, preprocessor: Any) -> Self:
        """Return another model of the same structure, such as one read back from a file.

        Args:
            model: The model.
            preprocessor: Its tokenizer or image processor.
        """

    @abstractmethod
    def identity(self) -> bytes:
        """Everything beside the weights that decides the model's output: config, tokenizer or image processor."""

    def follow(self) -> None:
        """Have the float32 copies where their weights are now: a Trainer may have moved the model."""
        for name, master in self.masters.items():
            self.masters[name] = master.to(self.weight(name).device)

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass of the model, in evaluation mode."""
        with self.running():
            return self.model(**inputs)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model: in evaluation mode, and with the faster kernels."""
        with self.evaluating(), fast_products(self.model), without_cudnn_attention(self.device):
            try:
                yield
            finally:
                let_go(self.model)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put every module into evaluation mode; on exit each returns to its own mode."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @property
    def sharded(self) -> bool:
        """True if weights are sharded over ranks, which then run every pass together (``models.shards``)."""
        return is_sharded(self.model)

    @property
    def dispatched(self) -> bool:
        """True if the model is spread over several devices (``device_map``); its blocks then stay where they are."""
        return len({parameter.device for parameter in self.model.parameters()}) > 1

    def module(self, place: Site | str) -> nn.Module:
        """The module at a site or path.

        Raises:
            ArchitectureError: If there is none.
        """
        path = place if isinstance(place, str) else self.architecture.path(place)
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            reason = self._absence(place) if isinstance(place, Site) else ""
            raise ArchitectureError(f"no module {path!r} in {type(self.model).__name__}: {reason or error}") from error

    def put(self, place: str, module: nn.Module) -> None:
        """Put a module in the place of another; one that routes rows listens to the model's passes while it is there.

        Args:
            place: Path of the module.
            module: The new one.

        Raises:
            ArchitectureError: If there is no such place, or no module that the new one reads.
            ConfigError: If it decides on whole texts and another one on prompts, or the other way round: an answer is
                scored with its text or without, not both.
        """
        if not place:
            raise ArchitectureError("the whole model has no place that another module could take; name one inside it")
        for path in module.reads if isinstance(module, RoutedModule) else ():
            self.module(path)
        self._require_one_scope(place, module)
        if isinstance(earlier := self.module(place), RoutedModule):
            earlier.detach()
        self.model.set_submodule(place, module)
        for each in routed(self.model):  # anew: one may read the place that has another module now
            each.attach(self.model)

    def _require_one_scope(self, place: str, module: nn.Module) -> None:
        """Check that a module decides on prompts, or on whole texts, as the others do."""
        named = [(path, each) for path, each in self.model.named_modules() if isinstance(each, RoutedModule)]
        for path, other in named:
            if isinstance(module, RoutedModule) and path != place and {module.scope, other.scope} == {
                "sequence", "prompt"
            }:  # fmt: skip
                raise ConfigError(
                    f"{place} decides with scope={module.scope}, and {path} with scope={other.scope}; give both one "
                    "scope, or take the other memory back first"
                )

    @property
    def scope(self) -> Scope | None:
        """The widest scope of the decisions of routed modules; None if the model has none."""
        scopes = {module.scope for module in routed(self.model)}
        return next((scope for scope in get_args(Scope) if scope in scopes), None)

    def _absence(self, site: Site) -> str:
        """Return why a block lacks a projection that others have; empty if nothing is known."""
        try:
            block = self.model.get_submodule(self.architecture.path(Site(site.layer)))
        except AttributeError:
            return ""
        return reason_for_absence(block, self.width)

    def weight_name(self, site: Site) -> str:
        """Name of the weight of the projection at a site."""
        return f"{self.architecture.path(site)}.weight"

    def weight(self, place: Site | str) -> nn.Parameter:
        """A weight that an edit may change, by its name or site, in the layout the module has.

        Raises:
            ArchitectureError: If it is quantized, sharded in another way than ours, computed, offloaded, or not there.
        """
        name = place if isinstance(place, str) else self.weight_name(place)
        path, _, attribute = name.rpartition(".")
        module = self.module(path if isinstance(place, str) else place)
        if isinstance(module, RoutedModule):
            raise ArchitectureError(
                f"a {type(module).__name__} is in the place of {path}: its weight is not to be edited; take the memory "
                "back first (rollback), or edit another projection"
            )
        weight: Any = getattr(module, attribute, None)
        plain = type(weight) in (nn.Parameter, DTensor)  # subclasses hold packed or split numbers
        if not plain or weight.dtype not in EDITABLE:
            raise ArchitectureError(
                f"{path}: {type(module).__name__} has no floating-point {attribute} to edit, but {_kind(weight)}; if "
                "it is quantized, load this layer dequantized, or have the edited layers dequantized: dequantize=True"
            )
        if weight.is_meta:
            raise ArchitectureError(
                f"{name} is offloaded, so that a change would be lost; make room for its block in device_map or "
                "max_memory, or load the model in bfloat16"
            )
        return weight  # type: ignore[no-any-return]

    def oriented(self, place: Site | str, tensor: Tensor | None = None) -> Float[Tensor, "d_out d_in"]:
        """A whole weight as d_out x d_in, whatever layout its module has; a bias as 1 x d_out.

        Args:
            place: Name or site of the weight.
            tensor: A tensor in that weight's layout, such as its original; the weight itself by default.
        """
        name = place if isinstance(place, str) else self.weight_name(place)
        value = whole(self.weight(name).detach()) if tensor is None else tensor
        if value.dim() == 1:
            return value[None]
        return value.T if is_transposed(self.module(name.rpartition(".")[0])) else value

    def editable(self) -> list[str]:
        """Names of all weights that an edit could change: those of the linear maps in the blocks."""
        blocks = tuple(self.architecture.block.format(layer) + "." for layer in range(self.depth))
        return [f"{path}.weight" for path, _ in linear_maps(self.model) if path.startswith(blocks)]

    def key_width(self, site: Site) -> int:
        """Width of the keys of a projection, of a model on the meta device as well."""
        module = self.module(site)
        return module.get_parameter("weight").shape[0 if is_transposed(module) else 1]

    def require_finite(self) -> None:
        """Check that every weight is finite.

        Raises:
            NumericalError: Naming weights that are not.
        """
        plain = ((name, each.detach()) for name, each in self.model.named_parameters() if type(each) is nn.Parameter)
        able = ((name, each) for name, each in plain if each.dtype in EDITABLE and each.numel() and not each.is_meta)
        if bad := [name for name, each in able if not all(math.isfinite(end) for end in each.aminmax())]:
            raise NumericalError(
                f"weights that are not finite: {listed(bad, 3)}; the checkpoint is damaged, or its type too narrow: "
                "load another copy, or load it in float32"
            )

    def fingerprint(self, blocks: int | None = None) -> str:
        """SHA-256 of the weights up to and including block ``blocks - 1`` (all by default), config and tokenizer.

        Raises:
            ArchitectureError: If a weight is offloaded, or packed in something else than a tensor.
        """
        digest = hashlib.sha256(self.identity())
        above = tuple(self.architecture.block.format(i) + "." for i in range(blocks or self.depth, self.depth))
        for name, tensor in sorted(self.model.state_dict().items()):
            if not name.startswith(above):
                if not isinstance(tensor, Tensor) or tensor.is_quantized:
                    raise ArchitectureError(
                        f"{name} is a {type(tensor).__name__}, no plain tensor, and cannot be read; load the model "
                        "dequantized"
                    )
                if tensor.is_meta:
                    raise ArchitectureError(
                        f"{name} is offloaded and cannot be read; make room for it in device_map or max_memory"
                    )
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(whole(tensor.detach()).cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _kind(weight: object) -> str:
    """Return what a module has in the place of a weight, in words for an error."""
    if isinstance(weight, Tensor):
        parameter = "a parameter" if isinstance(weight, nn.Parameter) else "a tensor"
        return f"{parameter} of class {type(weight).__name__}, type {weight.dtype} and shape {tuple(weight.shape)}"
    return f"a {type(weight).__name__}"
