"""A causal language model with its tokenizer."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, cast

import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cakeflow.errors import ArchitectureError, ConfigError
from cakeflow.models.architecture import Architecture, Role, Site, find_architecture
from cakeflow.models.base import EditableModel
from cakeflow.models.hooks import outputs_of_blocks
from cakeflow.models.wrappers import unwrapped

INCIDENTAL = ("transformers_version", "dtype", "architectures", "_name_or_path")
"""Entries of a config that do not decide what a model computes: a library's version, what saving writes in."""


def require_masks(attention: object) -> None:
    """Check that an attention implementation takes explicit masks; no other is loaded, as it may come from the hub.

    Raises:
        ArchitectureError: If it does not.
    """
    if attention not in (None, "sdpa", "eager"):
        raise ArchitectureError(
            f"attention implementation {attention!r} takes no explicit mask; "
            "load the model with attn_implementation='sdpa'"
        )


@dataclass(frozen=True)
class LanguageModel(EditableModel):
    """A Hugging Face causal language model to edit.

    Attributes:
        model: The model.
        tokenizer: Its fast tokenizer.
        architecture: Module paths.
        masters: See ``EditableModel``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    masters: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def wrap(
        cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, architecture: Architecture | None = None
    ) -> LanguageModel:
        """Check a model object and find its architecture.

        Args:
            model: A model, or ``torch.compile`` or ``DataParallel`` around one: the model inside is taken.
            tokenizer: Its tokenizer.
            architecture: Module paths, if they cannot be derived from the module tree.

        Raises:
            ArchitectureError: If the model is wrapped otherwise, the tokenizer is not a fast one, attention takes no
                masks, or modules are missing.
            NumericalError: If a weight is not finite.
        """
        model = unwrapped(model)
        if not tokenizer.is_fast:
            raise ArchitectureError(f"{type(tokenizer).__name__} gives no character offsets; load a fast tokenizer")
        require_masks(model.config._attn_implementation)
        wrapped = cls(model, tokenizer, architecture or find_architecture(model))
        wrapped.require_finite()
        for role in ("block", "mlp_out", "attn_out"):
            wrapped.require(role)
        front = wrapped.front
        if len(set(front)) < len(front):
            warnings.warn(
                f"{type(tokenizer).__name__} puts {tokenizer.convert_ids_to_tokens(list(front))} in front of every "
                "text, one of them twice; if the model was not trained so, correct the tokenizer (add_bos_token)",
                stacklevel=2,
            )
        return wrapped

    def require(self, role: Role) -> None:
        """Check that some block has a module.

        Args:
            role: The module's role.

        Raises:
            ArchitectureError: If none has, naming the place in the first.
        """
        paths = {self.architecture.path(Site(layer, role)) for layer in range(self.depth)}
        if not any(name in paths for name, _ in self.model.named_modules(remove_duplicate=False)):
            self.module(Site(0, role))

    @property
    def preprocessor(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.tokenizer

    def exchanged(self, model: Any, preprocessor: Any) -> LanguageModel:
        """Return another model of the same structure with its tokenizer."""
        return replace(self, model=model, tokenizer=preprocessor, masters={})

    def identity(self) -> bytes:
        """Config and tokenizer."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in INCIDENTAL}
        tokenizer: Tokenizer = self.tokenizer.backend_tokenizer
        if tokenizer.padding or tokenizer.truncation:  # left by the last call; every call here says its own
            tokenizer = Tokenizer.from_str(tokenizer.to_str())
            tokenizer.no_padding()
            tokenizer.no_truncation()
        return (json.dumps(config, sort_keys=True, default=str) + tokenizer.to_str()).encode()

    @property
    def config(self) -> PreTrainedConfig:
        """Config of the text part, which is all of the model's but for vision-language models."""
        return self.model.config.get_text_config()

    @property
    def embedding(self) -> Tensor:
        """The token embeddings, vocabulary x width."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def device(self) -> torch.device:
        """Device of the inputs: that of the embedding."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.embedding.dtype

    @property
    def longest(self) -> int:
        """Most tokens that a text may have."""
        return int(getattr(self.config, "max_position_embeddings", None) or 1 << 30)

    @property
    def front(self) -> tuple[int, ...]:
        """Special tokens that the tokenizer puts in front of every text."""
        row = self.tokenizer("a", return_special_tokens_mask=True)
        tokens = zip(row["input_ids"], row["special_tokens_mask"], strict=True)
        return tuple(token for token, _ in takewhile(lambda pair: pair[1], tokens))

    @property
    def chats(self) -> bool:
        """True if the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def user_turn(self, text: str, earlier: Sequence[Mapping[str, str]] = ()) -> str:
        """Return a text as the user's turn of a chat, up to where the answer begins.

        The special tokens that the tokenizer puts in front of every text are left out.

        Args:
            text: What the user says.
            earlier: The messages before it, each with ``role`` and ``content``.

        Raises:
            ConfigError: If the tokenizer has no chat template, or its template cannot take the text.
        """
        try:
            turns = [*map(dict, earlier), {"role": "user", "content": text}]
            chat = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except (TemplateError, ValueError) as error:
            raise ConfigError(
                f"the tokenizer cannot write {text[:60]!r} as a chat: {error}; ask in the form of a completion"
            ) from error
        return chat.removeprefix("".join(self.tokenizer.convert_ids_to_tokens(list(self.front))))

    @cached_property
    def places_tokens(self) -> bool:
        """True if tokens can be put at given positions under an explicit mask.

        ALiBi counts positions off a 2-D mask, convolutions and recurrent layers (hybrid models) read their neighbors,
        and some models take no other mask; two short passes show whatever is not known from the structure.
        """
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        blocks = (self.module(Site(layer)) for layer in range(self.depth))
        recurrent = any(isinstance(module, _ConvNd) for block in blocks for module in block.modules())
        able = takes_positions and not recurrent and not getattr(self.config, "alibi", False)
        return able and (self.embedding.is_meta or self._skips_a_token())

    @torch.no_grad()
    def _skips_a_token(self) -> bool:
        """True if a token that the mask hides changes nothing for the last of four tokens."""
        ids = torch.linspace(0, len(self.embedding) - 1, 4, device=self.device).long()[None]
        visible = torch.ones(4, 4, dtype=torch.bool, device=self.device).tril()
        visible[3, 2] = False
        lowest = torch.finfo(self.dtype).min
        mask = torch.zeros(1, 1, 4, 4, dtype=self.dtype, device=self.device).masked_fill(~visible, lowest)
        positions = torch.tensor([[0, 1, 2, 2]], device=self.device)
        whole = ids[:, [0, 1, 3]]
        expected = self(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0, -1].double()
        try:
            logits = self(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, -1]
        except (RuntimeError, ValueError, TypeError):  # a model's own code refuses the mask
            return False
        return bool((logits.double() - expected).norm() <= torch.finfo(self.dtype).eps ** (1 / 3) * expected.norm())

    @cached_property
    def frees_rows(self) -> bool:
        """True if rows may leave a batch that goes on with its keys and values: nothing else is kept of them.

        Models of images and text keep by how much the positions of each row are shifted.
        """
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        cache = getattr(self(input_ids=one, attention_mask=one, use_cache=True), "past_key_values", None)
        shifted = any(hasattr(module, "rope_deltas") for module in self.model.modules())
        return self.places_tokens and isinstance(cache, DynamicCache) and not shifted

    def sees_all(self, tokens: int) -> bool:
        """True if no sliding window or chunk of the attention is shorter than a text of so many tokens."""
        config = self.config
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        sizes = (window, getattr(config, "window_size", None), getattr(config, "attention_chunk_size", None))
        return all(not size or tokens <= size for size in sizes)

    def rotates_alike(self, tokens: int) -> bool:
        """True if positions in a text of so many tokens are rotated as in a shorter one; LongRoPE's are not."""
        settings = getattr(self.config, "rope_parameters", None) or {}
        each = settings.values() if all(isinstance(part, dict) for part in settings.values()) else [settings]
        changing = [part for part in each if part.get("rope_type") in ("longrope", "dynamic")]
        most = getattr(self.config, "original_max_position_embeddings", None) or self.longest
        return all(tokens <= part.get("original_max_position_embeddings", most) for part in changing)

    @property
    def head(self) -> nn.Module:
        """The output embedding."""
        return self.model.get_submodule(self.architecture.head)

    @cached_property
    def tuple_size(self) -> int:
        """Number of values that the blocks return in a tuple, 0 if they return a tensor; one pass shows it."""
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        return outputs_of_blocks(self, input_ids=one, attention_mask=one, use_cache=False)
