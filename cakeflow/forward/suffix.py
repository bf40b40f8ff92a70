"""Suffixes: the part of a forward pass that depends on a change at one position.

A change at one position of one block changes nothing below that block and nothing before that position. So each row's
*suffix*, from the changed token to the last token whose prediction counts, runs through the upper blocks only and
attends to keys and values of its prefix that were computed once; logits are computed only where the objective reads
them. The results equal those of a full pass up to rounding (ROME's ``compute_z`` does the full pass at every step).
Attention that takes its positions from the mask alone (ALiBi), and layers that carry a state from token to token
(hybrid models), cannot start in the middle of a row; there the suffix is the whole row, and only the blocks below are
saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from cakeflow.errors import ArchitectureError
from cakeflow.forward.packing import pad, plan
from cakeflow.forward.tokens import Row
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture, inject, logits_at, start_at
from cakeflow.models.language import LanguageModel


class _FrozenPrefix(Cache):
    """Attention keys and values of prefixes; states appended in a forward pass are used there and not stored."""

    def __init__(self, keys: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
        super().__init__(layers=[])
        self.prefix = list(zip(keys, values, strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix[layer_idx]
        if keys is None or values is None:
            return key_states, value_states
        return _prepend(keys, key_states), _prepend(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and mask are explicit: models must not shift them by a cached length


def _prepend(prefix: Tensor, states: Tensor) -> Tensor:
    """Put a prefix before the states of one or several copies of its rows."""
    return torch.cat([repeat(prefix, "rows ... -> (copies rows) ...", copies=len(states) // len(prefix)), states], 2)


@dataclass(frozen=True, eq=False)
class Suffixes:
    """Rows of similar suffix length, ready to run again with a change at one position of each.

    Attributes:
        first: First block that runs.
        fact: Index of each row's fact.
        tokens: Tokens of the suffixes (ids or embeddings), padded on the right.
        positions: Positions of the tokens in the full rows.
        hidden: Input of block ``first``.
        mask: Additive attention mask, suffix over (prefix, suffix); None where whole rows run.
        keys, values: Attention keys and values of the prefixes, one entry per block; copies of the rows share them.
        changed_column: Column of each row at which changes are made.
        row, column: Row and column of each logit to read.
        label: The token that each of these positions should predict (-1: none).
    """

    first: int
    fact: Int[Tensor, " rows"]
    tokens: Tensor
    positions: Int[Tensor, "rows time"]
    hidden: Float[Tensor, "rows time width"]
    mask: Float[Tensor, "rows 1 time keys"] | None
    keys: tuple[Float[Tensor, "rows heads prefix size"] | None, ...]
    values: tuple[Float[Tensor, "rows heads prefix size"] | None, ...]
    changed_column: Int[Tensor, " rows"]
    row: Int[Tensor, " read"]
    column: Int[Tensor, " read"]
    label: Int[Tensor, " read"]

    def logits(
        self, lm: LanguageModel, sites: Sequence[Site], delta: Float[Tensor, "rows sites width"]
    ) -> Float[Tensor, "read vocabulary"]:
        """Compute the logits with ``delta`` added to the sites' outputs at each row's changed column."""
        return self.run(lm, *(inject(lm, site, delta[:, i], self.changed_column) for i, site in enumerate(sites)))

    def run(self, lm: LanguageModel, *changes: AbstractContextManager[None]) -> Float[Tensor, "read vocabulary"]:
        """Compute the logits at (row, column) under some changes of the model."""
        with self._changed(lm, changes), logits_at(lm, self.row, self.column):
            return self._forward(lm).logits[0]  # type: ignore[no-any-return]

    def output(
        self, lm: LanguageModel, site: Site, *changes: AbstractContextManager[None]
    ) -> Float[Tensor, "rows time width"]:
        """Compute the output of a site under some changes of the model; the blocks above are not run."""
        with self._changed(lm, changes), capture(lm, [site], stop=True) as outputs:
            self._forward(lm)
        return outputs[site]

    @contextmanager
    def _changed(self, lm: LanguageModel, changes: Sequence[AbstractContextManager[None]]) -> Iterator[None]:
        with ExitStack() as stack:
            for change in (start_at(lm, self.first, self.hidden), *changes):
                stack.enter_context(change)
            yield

    def _forward(self, lm: LanguageModel) -> Any:
        kind = "inputs_embeds" if self.tokens.is_floating_point() else "input_ids"
        if self.mask is None:
            mask = torch.ones(self.tokens.shape[:2], dtype=torch.long, device=self.tokens.device)
            return lm(attention_mask=mask, use_cache=False, **{kind: self.tokens})
        try:
            return lm(
                position_ids=self.positions,
                attention_mask=self.mask,
                past_key_values=_FrozenPrefix(self.keys, self.values),
                use_cache=True,
                **{kind: self.tokens},
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:  # a model's own code refuses the cache or the mask
            raise ArchitectureError(
                f"{type(lm.model).__name__}: its attention cannot run on cached keys and an explicit mask: {error}"
            ) from error

    def copies(self, count: int) -> Suffixes:
        """Repeat the rows ``count`` times, one copy after the other."""
        names = ("fact", "tokens", "positions", "hidden", "mask", "changed_column", "column", "label")
        parts: dict[str, Any] = {
            name: repeat(part, "rows ... -> (copies rows) ...", copies=count)
            for name in names
            if (part := getattr(self, name)) is not None
        }
        first_row = len(self.fact) * torch.arange(count, device=self.row.device)
        return replace(self, **parts, row=rearrange(first_row[:, None] + self.row, "copies read -> (copies read)"))

    def only(self, active: Tensor) -> Suffixes:
        """Select the rows whose fact is marked in ``active`` (one boolean per fact)."""
        rows = active[self.fact]
        if bool(rows.all()):
            return self
        number = rows.cumsum(0) - 1  # old row -> new row
        read = rows[self.row]
        parts: dict[str, Any] = {
            name: getattr(self, name)[rows] for name in ("fact", "tokens", "positions", "hidden", "changed_column")
        }
        parts["mask"] = None if self.mask is None else self.mask[rows]
        for name in ("keys", "values"):
            parts[name] = tuple(None if part is None else part[rows.to(part.device)] for part in getattr(self, name))
        parts |= {"row": number[self.row[read]], "column": self.column[read], "label": self.label[read]}
        return replace(self, **parts)


@dataclass(frozen=True, eq=False)
class Recording:
    """A full pass over rows, from which suffixes are cut.

    Attributes:
        tokens: The input: ids, or embeddings.
        outputs: Outputs of the recorded sites.
        cache: Attention keys and values, one entry per block; None where the attention cannot run on them.
    """

    tokens: Tensor
    outputs: dict[Site, Float[Tensor, "rows time width"]]
    cache: list[tuple[Tensor, Tensor]] | None

    @classmethod
    @torch.no_grad()
    def of(cls, lm: LanguageModel, tokens: Tensor, sites: Sequence[Site]) -> Recording:
        """Run rows of ids or embeddings, padded on the right; the head is not computed."""
        cache = DynamicCache() if lm.places_tokens else None
        kind = "inputs_embeds" if tokens.is_floating_point() else "input_ids"
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)  # padding is to the right of all
        with capture(lm, sites) as outputs, capture(lm, [Site(lm.depth - 1)], stop=True):
            lm(attention_mask=mask, past_key_values=cache, use_cache=cache is not None, **{kind: tokens})
        layers: list[Any] = cache.layers if cache else []
        return cls(tokens, outputs, [(layer.keys, layer.values) for layer in layers] if cache else None)

    def cut(
        self,
        first: int,
        start: Int[Tensor, " rows"],
        width: int,
        fact: Int[Tensor, " rows"],
        reads: Sequence[tuple[int, int, int]],
    ) -> Suffixes:
        """Cut the rows from ``start`` on, ``width`` columns, to run again from block ``first``.

        Args:
            first: Lowest block to run again; the output of the block below must be recorded.
            start: First column of each row's suffix.
            width: Number of columns.
            fact: Index of each row's fact.
            reads: (row, column in the suffix, label) of the logits to read.
        """
        row, column, label = torch.tensor(reads, device=start.device).T
        entering = self.outputs[Site(max(first - 1, 0))]
        if self.cache is None:  # every row from its beginning
            whole = torch.arange(self.tokens.shape[1], device=start.device).expand(len(start), -1)
            return Suffixes(
                first, fact, self.tokens, whole, entering, None, (), (), start, row, column + start[row], label
            )
        prefix = int(start.max())
        columns = (start[:, None] + torch.arange(width, device=start.device)).clamp_max(self.tokens.shape[1] - 1)
        # clones, so that the keys and values of the whole rows can be freed
        pairs = [tuple(part[:, :, :prefix].clone() for part in pair) for pair in self.cache[first:]]
        keys, values = zip(*[(None, None)] * first, *pairs, strict=True)
        return Suffixes(
            first=first,
            fact=fact,
            tokens=take(self.tokens, columns),
            positions=columns,
            hidden=take(entering, columns),
            mask=_mask(start, prefix, width, entering.dtype),
            keys=keys,
            values=values,
            changed_column=torch.zeros_like(start),
            row=row,
            column=column,
            label=label,
        )


def take(values: Tensor, columns: Int[Tensor, "rows width"]) -> Tensor:
    """Select columns of each row."""
    return values[torch.arange(len(columns), device=columns.device)[:, None], columns]


def first_changed(site: Site) -> int:
    """Return the first block that has to run again when the output of ``site`` changes."""
    return site.layer + (site.role == "block")


def cut(
    lm: LanguageModel,
    rows: Sequence[Row],
    facts: Sequence[int],
    sites: Sequence[Site],
    max_tokens: int,
    *,
    read_first: bool = False,
) -> tuple[list[Suffixes], Float[Tensor, "rows sites width"]]:
    """Run rows once in full and cut them at the token at which the fact is written.

    Args:
        lm: The model.
        rows: Tokenised texts with a subject; the last token is a label only.
        facts: Index of each row's fact.
        sites: Sites at which vectors will be injected.
        max_tokens: Most tokens in one group of suffixes.
        read_first: Read logits at the first position only (no labels) instead of before each target token.

    Returns:
        Groups of suffixes, and the sites' own outputs at each row's token of the fact.
    """
    _require_full_attention(lm, max(len(row.ids) for row in rows))
    ends = [row.fact + 1 if read_first else len(row.ids) - 1 for row in rows]
    lengths = [end - row.fact for end, row in zip(ends, rows, strict=True)]
    first = min(map(first_changed, sites))
    recorded = [*dict.fromkeys([Site(max(first - 1, 0)), *sites])]
    groups: list[Suffixes] = []
    outputs: dict[int, Tensor] = {}
    slack = 8 if lm.device.type == "cpu" else 512  # tokens that one more pass costs
    for group in plan(lengths, max_tokens, slack):
        recording = Recording.of(lm, pad([rows[i].ids[: ends[i]] for i in group], lm.device), recorded)
        start = torch.tensor([rows[i].fact for i in group], device=lm.device)
        fact = torch.tensor([facts[i] for i in group], device=lm.device)
        reads = _first_position(len(group)) if read_first else before_targets([rows[i] for i in group])
        groups.append(recording.cut(first, start, lengths[group[0]], fact, reads))
        at_fact = [take(recording.outputs[site], start[:, None])[:, 0] for site in sites]
        outputs.update(zip(group, torch.stack(at_fact, 1), strict=True))
    return groups, torch.stack([outputs[i] for i in range(len(rows))])


def _require_full_attention(lm: LanguageModel, longest: int) -> None:
    """Refuse texts longer than a window of attention: the masks here let every token attend to all before it."""
    if not lm.sees_all(longest):
        raise ArchitectureError(
            f"a text of {longest} tokens is longer than the window or chunk that the model attends to; "
            "shorten the prompt or the contexts"
        )


def _first_position(count: int) -> list[tuple[int, int, int]]:
    return [(row, 0, -1) for row in range(count)]


def before_targets(rows: Sequence[Row], *, from_fact: bool = True) -> list[tuple[int, int, int]]:
    """Return (row, column, label) of every target token; the column before it, from the fact's or the row's start."""
    starts = [row.fact if from_fact else 0 for row in rows]
    return [
        (i, at - 1 - start, row.ids[at])
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
        for at in range(row.target, len(row.ids))
    ]


def _mask(start: Int[Tensor, " rows"], prefix: int, width: int, dtype: torch.dtype) -> Tensor:
    """Build the additive mask: 0 for a position's own prefix and the suffix up to it, the lowest number elsewhere."""
    before = torch.arange(prefix, device=start.device) < start[:, None]
    causal = torch.ones(width, width, dtype=torch.bool, device=start.device).tril()
    allowed = torch.cat([before[:, None].expand(-1, width, -1), causal.expand(len(start), -1, -1)], 2)
    return torch.zeros(allowed.shape, dtype=dtype, device=start.device).masked_fill(~allowed, torch.finfo(dtype).min)[
        :, None
    ]
