"""Modules that answer some rows in another way than others, and what they know of the rows of a forward pass.

A module inside a model sees vectors only. Whether a row is a question or its answer, which of its tokens are padding,
and what was decided about its beginning (with cached keys and values) is known to the model's own ``forward``: there a
``RoutedModule`` listens while it is in place. These are the only hooks that outlive a call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from transformers import Cache

from cakeflow.errors import ConfigError, ShapeError

Scope = Literal["sequence", "prompt", "token"]
"""What a decision holds for: the text of one pass, a prompt and all that follows it, or a single token."""
MEMORY = "routes"
"""Attribute of a cache of keys and values that holds the decisions about its rows."""


@dataclass(frozen=True)
class Rows:
    """The rows of a forward pass, as its arguments tell.

    Attributes:
        shape: Rows and tokens.
        deciding: rows x time, True at the tokens that decide; None for all of them.
        held: For each row the decision that was made about its beginning; None if there is none.
        forced: For each row the decision that ``forced_decisions`` names; None outside of it.
    """

    shape: tuple[int, int]
    deciding: Bool[Tensor, "rows time"] | None = None
    held: Shaped[Tensor, "rows ..."] | None = None
    forced: Shaped[Tensor, "rows ..."] | None = None

    def mask(self, device: torch.device) -> Bool[Tensor, "rows time"]:
        """Return the deciding tokens."""
        if self.deciding is None:
            return torch.ones(self.shape, dtype=torch.bool, device=device)
        return self.deciding.to(device)

    def behind(self, device: torch.device) -> Bool[Tensor, "rows time"]:
        """Return the tokens from the last deciding one on: those at which an answer is written.

        These are all tokens where a decision is held, and none of a row without a deciding token.
        """
        if self.held is not None:
            return torch.ones(self.shape, dtype=torch.bool, device=device)
        places, mask = torch.arange(self.shape[1], device=device), self.mask(device)
        last = torch.where(mask, places, -1).amax(1, keepdim=True)
        return (places >= last) & (last >= 0)

    def last(self, device: torch.device) -> Int[Tensor, " rows"]:
        """Return the place of the last deciding token of each row."""
        places = torch.arange(1, self.shape[1] + 1, device=device)
        return (self.mask(device) * places).argmax(1)


@dataclass
class _Listener:
    """The state of a routed module that is no part of its content: copies of a model get one of their own."""

    rows: Rows | None = None
    lengths: Tensor | None = None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    forced: Mapping[tuple[int, ...], Tensor] | None = None
    handles: list[Any] = field(default_factory=list)


class RoutedModule(nn.Module):
    """A module that decides row by row how it answers.

    In its ``forward`` a subclass asks ``rows_of`` for the rows of its inputs, decides, and calls ``settle``. By
    ``scope``, a decision is made on the tokens of a prompt and holds for all that follows on the same cache, on all
    tokens of a pass, or on each token. It may look at the module's own inputs, and at what other modules said earlier
    in the pass (``output_of``).

    A pass does not say where a prompt ends. So without a cache every pass decides anew on all of its text; a prompt
    that is read in parts (``prefill_chunk_size``) is decided on the first of them; and with assisted decoding the
    guessed tokens have a say, unless ``prompt_lengths`` names the prompt. A decision belongs to a row of a cache:
    whoever exchanges the rows of different prompts there has to decide on them anew.

    Attributes:
        scope: What a decision holds for.
        reads: Paths of the modules whose outputs decide.
        decision: The decisions of the last pass, one for each row, or for each token. One is a number, such as that of
            the answer (0 is the answer of the module in whose place this one stands), or a tensor, such as True for
            each part that has a share in the answer.
    """

    def __init__(self, scope: Scope, reads: Sequence[str] = ()) -> None:
        super().__init__()
        self.scope: Scope = scope
        self.reads = tuple(reads)
        self.decision: Tensor | None = None
        self._listener = _Listener()

    def attach(self, root: nn.Module) -> None:
        """Listen to the forward passes of the model in which this module is, and to the modules that it reads."""
        self.detach()
        sources = {path: root.get_submodule(path) for path in self.reads}
        before = root.register_forward_pre_hook(self._before, with_kwargs=True)
        self._listener.handles += [before, root.register_forward_hook(self._after, with_kwargs=True)]
        for path, module in sources.items():
            self._listener.handles.append(module.register_forward_hook(partial(self._read, path)))

    def detach(self) -> None:
        """Listen no more; what was named for the passes of a ``with`` body holds if it is attached again in there."""
        for handle in self._listener.handles:
            handle.remove()
        self._listener = _Listener(lengths=self._listener.lengths, forced=self._listener.forced)

    def rows_of(self, inputs: Tensor) -> Rows:
        """Return what is known of the rows of these inputs; outside of a model's pass, that all tokens decide.

        Args:
            inputs: rows x time x width, or (rows * time) x width where a block flattens them.

        Raises:
            ShapeError: If the cache of a pass holds decisions about another number of rows, or a row has no token on
                which to decide.
        """
        rows = self._listener.rows
        if rows is None or rows.shape[0] * rows.shape[1] != inputs.shape[:-1].numel():
            shape = tuple(inputs.shape[:2]) if inputs.dim() == 3 else (1, inputs.shape[0])
            return Rows((shape[0], shape[1]))
        if rows.held is not None and len(rows.held) != rows.shape[0]:
            raise ShapeError(
                f"{rows.shape[0]} rows go on from a cache whose {len(rows.held)} rows were routed; decide on the "
                "prompts anew: run them without that cache"
            )
        if rows.held is None and rows.deciding is not None and not (tokens := rows.deciding.any(1)).all():
            row = int(tokens.long().argmin())
            raise ShapeError(
                f"row {row} of {rows.shape[0]} has no token on which its route can be decided: give every prompt at "
                "least one token that the attention mask shows"
            )
        return rows

    def output_of(self, path: str, rows: Rows) -> Float[Tensor, "rows time width"]:
        """Return what a module of ``reads`` said in this pass.

        Args:
            path: The module.
            rows: The rows of the pass.

        Raises:
            ConfigError: If it said nothing about these rows.
        """
        output = self._listener.outputs.get(path)
        if output is None or output.shape[:-1].numel() != rows.shape[0] * rows.shape[1]:
            raise ConfigError(
                f"nothing can be decided: {path} did not run on these rows. Run the whole model, or take the module "
                "that reads it back (rollback) before parts of the model are run; in torch.compile, set "
                "torch._dynamo.config.skip_nnmodule_hook_guards to False"
            )
        return output.reshape(*rows.shape, output.shape[-1])

    def settle(self, rows: Rows, decision: Shaped[Tensor, "rows ..."]) -> Shaped[Tensor, "rows time ..."]:
        """Keep a decision, or the earlier one that holds for these rows, and return it for each token.

        Args:
            rows: The rows.
            decision: The decision about each row, or, in the scope ``token``, about each token.
        """
        chosen = rows.held if rows.held is not None else rows.forced
        self.decision = decision if chosen is None else chosen.to(decision.device)
        if self.scope == "token":
            return self.decision
        return self.decision[:, None].expand(*rows.shape, *self.decision.shape[1:])

    def _before(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = {**_by_name(root, args), **kwargs}
        tokens = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        self._listener.rows, self._listener.outputs = None, {}
        if tokens is None:
            return
        shape, past = (int(tokens.shape[0]), int(tokens.shape[1])), call.get("past_key_values")
        held = getattr(past, MEMORY, {}).get(self._name(root)) if past is not None and self._holds else None
        if past is not None and held is not None and not past.get_seq_length():
            held = None  # a cache that was emptied
        if self._listener.lengths is not None:
            places = torch.arange(shape[1], device=tokens.device)
            deciding: Tensor | None = places[None] < self._listener.lengths.to(tokens.device)[:, None]
        else:
            deciding = _shown(call.get("attention_mask"), shape, past)
        self._listener.rows = Rows(shape, deciding, held, self._forced(call.get("input_ids"), deciding))

    @property
    def _holds(self) -> bool:
        """True if a decision holds for what follows on the same cache: that about a prompt, or a named one."""
        return self.scope == "prompt" or self._listener.forced is not None

    def _forced(self, ids: Tensor | None, deciding: Tensor | None) -> Tensor | None:
        """Return the decisions that are named for the texts of a pass."""
        if self._listener.forced is None or ids is None:
            return None
        shown = torch.ones_like(ids, dtype=torch.bool) if deciding is None else deciding.to(ids.device)
        texts = [tuple(row[mask].tolist()) for row, mask in zip(ids, shown, strict=True)]
        return torch.stack([_longest_beginning(self._listener.forced, text) for text in texts]).to(ids.device)

    def _after(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._listener.rows, self._listener.outputs = None, {}
        past = getattr(output, "past_key_values", None)
        if isinstance(output, tuple):  # return_dict=False
            past = next((each for each in output if isinstance(each, Cache)), None)
        past = {**_by_name(root, args), **kwargs}.get("past_key_values") if past is None else past
        if past is not None and self._holds and self.decision is not None:
            setattr(past, MEMORY, {**getattr(past, MEMORY, {}), self._name(root): self.decision})

    def _read(self, path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        said = output[0] if isinstance(output, (tuple, list)) else output
        self._listener.outputs[path] = said.detach()

    def _name(self, root: nn.Module) -> str:
        names: list[str] = [name for name, module in root.named_modules() if module is self]
        return names[0]


def _by_name(root: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Return positional arguments of a model's forward pass by their names."""
    return dict(inspect.signature(root.forward).bind_partial(*args).arguments) if args else {}


def _shown(mask: Any, shape: tuple[int, int], past: Any) -> Bool[Tensor, "rows time"] | None:
    """Return the tokens of a pass that an attention mask shows; None if it does not say.

    A static cache comes with the mask of every query, or with one for each kind of layer. There a token is shown if it
    may attend to itself.

    Args:
        mask: rows x (cached and new tokens), rows x 1 x queries x keys, or several of these by kind of layer.
        shape: Rows and new tokens.
        past: The cache, if there is one.
    """
    if isinstance(mask, Mapping):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    rows, width = shape
    if mask is None or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        last: Tensor = mask[:, -width:].bool()
        return last
    static = past is not None and getattr(past, "is_compileable", False)
    first = int(past.get_seq_length()) if static else mask.shape[-1] - width
    itself: Tensor = mask[:, 0, :, first : first + width].diagonal(dim1=-2, dim2=-1)
    if itself.shape[-1] != width:
        return None
    return (itself if itself.dtype == torch.bool else itself >= 0).expand(rows, width)


def _longest_beginning(decisions: Mapping[tuple[int, ...], Tensor], text: tuple[int, ...]) -> Tensor:
    """Return the decision named for the longest text with which this one begins; zeros if there is none."""
    ends = (end for end in range(len(text), -1, -1) if text[:end] in decisions)
    other = torch.zeros_like(next(iter(decisions.values()))) if decisions else torch.tensor(0)
    return next((decisions[text[:end]] for end in ends), other)


def routed(root: nn.Module) -> list[RoutedModule]:
    """Return the routed modules of a model."""
    return [module for module in root.modules() if isinstance(module, RoutedModule)]


@contextmanager
def prompt_lengths(root: nn.Module, lengths: Int[Tensor, " rows"]) -> Iterator[None]:
    """Have the first so many tokens of each row decide in the passes of the ``with`` body.

    Args:
        root: The model.
        lengths: Tokens of each row's prompt.
    """
    with _named(root, "lengths", lengths):
        yield


@contextmanager
def forced_decisions(root: nn.Module, decisions: Mapping[tuple[int, ...], int | Tensor]) -> Iterator[None]:
    """Have routed modules take given decisions in the passes of the ``with`` body: an oracle, for measuring only.

    Args:
        root: The model, or a routed module in it.
        decisions: Tokens of a prompt -> the decision about it. A text goes by the longest prompt with which it begins
            (no token at all begins every text), and by 0, the answer of the module in whose place the routed one
            stands, if there is none.

    Raises:
        ConfigError: If a module decides on each token, which no prompt can name.
    """
    modules = routed(root)
    if any(module.scope == "token" for module in modules):
        raise ConfigError("scope token: decisions on single tokens cannot be forced; set scope to prompt or sequence")
    with _named(root, "forced", {text: torch.as_tensor(decision) for text, decision in decisions.items()}):
        yield


@contextmanager
def _named(root: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Give the listeners of all routed modules a value for a while; on exit each has its own again."""
    modules = routed(root)
    earlier = [getattr(module._listener, name) for module in modules]
    for module in modules:
        setattr(module._listener, name, value)
    try:
        yield
    finally:
        for module, own in zip(modules, earlier, strict=True):
            setattr(module._listener, name, own)
