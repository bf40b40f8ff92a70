"""The part of a forward pass that depends on an injected vector, cut free from the rest.

A vector added at one position of one block changes nothing below that block and nothing before that position. So
each row's *suffix* (from the injected token to the last token whose prediction counts) runs through the upper blocks
only, attending to keys and values of its prefix that were computed once; logits are taken only where the objective
reads them. Exact: the same numbers as a full pass, up to rounding (field of locate-then-edit methods: ROME's
``compute_z`` runs everything at every step).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache

from cakeflow.architecture import Site
from cakeflow.batch import Row, pad, plan
from cakeflow.errors import ArchitectureError
from cakeflow.model import LanguageModel
from cakeflow.tap import capture, inject, narrow, resume


class _FrozenPrefix(Cache):
    """Attention keys and values of prefixes; what is appended in a forward pass is used there and forgotten."""

    def __init__(self, keys: Sequence[Tensor | None], values: Sequence[Tensor | None]) -> None:
        super().__init__(layers=[])
        self.prefix = list(zip(keys, values, strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.prefix[layer_idx]
        if keys is None or values is None:
            return key_states, value_states
        return torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


@dataclass(frozen=True, eq=False)
class Suffixes:
    """Rows of similar suffix length, ready to run with a vector injected at their first position.

    Attributes:
        fact: Which fact each row belongs to.
        ids: Tokens of the suffixes, padded on the right.
        positions: Their positions in the full rows.
        hidden: What enters the first block that the vector can change.
        mask: Additive attention mask, suffix over (prefix, suffix).
        keys, values: Attention keys and values of the prefixes, one entry per block.
        row, column: Where logits are read.
        label: The token that each of those positions should predict (-1: none).
    """

    fact: Int[Tensor, " rows"]
    ids: Int[Tensor, "rows time"]
    positions: Int[Tensor, "rows time"]
    hidden: Float[Tensor, "rows time width"]
    mask: Float[Tensor, "rows 1 time seen"]
    keys: tuple[Float[Tensor, "rows heads prefix size"] | None, ...]
    values: tuple[Float[Tensor, "rows heads prefix size"] | None, ...]
    row: Int[Tensor, " read"]
    column: Int[Tensor, " read"]
    label: Int[Tensor, " read"]

    def logits(
        self, lm: LanguageModel, site: Site, delta: Float[Tensor, "rows width"]
    ) -> Float[Tensor, "read vocabulary"]:
        """Logits at (row, column) with ``delta`` added to the site's output at each row's first position."""
        at = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
        with (
            resume(lm, first_changed(site), self.hidden),
            inject(lm, site, delta, at),
            narrow(lm, self.row, self.column),
        ):
            return self._run(lm).logits[0]  # type: ignore[no-any-return]

    def _run(self, lm: LanguageModel) -> Any:
        try:
            return lm.model(
                input_ids=self.ids,
                position_ids=self.positions,
                attention_mask=self.mask,
                past_key_values=_FrozenPrefix(self.keys, self.values),
                use_cache=True,
            )
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            raise ArchitectureError(
                f"{type(lm.model).__name__}: its attention cannot go on from cached keys and an explicit mask: {error}"
            ) from error

    def only(self, kept: Tensor) -> Suffixes:
        """The rows whose fact is marked in ``kept`` (one boolean per fact)."""
        rows = kept[self.fact]
        if bool(rows.all()):
            return self
        number = rows.cumsum(0) - 1
        read = rows[self.row]
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("fact", "ids", "positions", "hidden", "mask"):
            parts[name] = parts[name][rows]
        for name in ("keys", "values"):
            parts[name] = tuple(None if part is None else part[rows] for part in parts[name])
        parts |= {"row": number[self.row[read]], "column": self.column[read], "label": self.label[read]}
        return Suffixes(**parts)


def first_changed(site: Site) -> int:
    """The first block that has to run again when the output of ``site`` changes."""
    return site.layer + (site.role == "block")


def cut(
    lm: LanguageModel, rows: Sequence[Row], facts: Sequence[int], site: Site, budget: int, *, read_first: bool = False
) -> tuple[list[Suffixes], Float[Tensor, "rows width"]]:
    """Run rows once in full and cut them at the subject's last token.

    Args:
        lm: The model.
        rows: Tokenised texts with a subject; the last token is a label only.
        facts: Which fact each row belongs to.
        site: Where vectors will be injected.
        budget: Most tokens in one group of suffixes.
        read_first: Read logits at the first position only (no labels) instead of before each target token.

    Returns:
        Groups of suffixes, and the site's own output at each row's subject.
    """
    _require_full_attention(lm, max(len(row.ids) for row in rows))
    ends = [row.subject + 1 if read_first else len(row.ids) - 1 for row in rows]
    lengths = [end - row.subject for end, row in zip(ends, rows, strict=True)]
    groups: list[Suffixes] = []
    outputs: dict[int, Tensor] = {}
    for group in plan(lengths, budget, slack=8):
        full = pad([rows[i].ids[: ends[i]] for i in group], lm.device)
        reads = _first_position(len(group)) if read_first else before_targets([rows[i] for i in group])
        lookup = torch.tensor([rows[i].subject for i in group], device=lm.device)
        parts, output = _run_once(lm, full, lookup, lengths[group[0]], site)
        row, column, label = torch.tensor(reads, device=lm.device).T
        fact = torch.tensor([facts[i] for i in group], device=lm.device)
        groups.append(Suffixes(fact=fact, row=row, column=column, label=label, **parts))
        outputs.update(zip(group, output, strict=True))
    return groups, torch.stack([outputs[i] for i in range(len(rows))])


def _require_full_attention(lm: LanguageModel, longest: int) -> None:
    """Our masks let every token see all before it; a sliding window shorter than the text would be ignored."""
    config = lm.model.config
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    window = window or getattr(config, "window_size", None)
    if window is not None and longest > window:
        raise ArchitectureError(
            f"a text of {longest} tokens is longer than the model's sliding attention window ({window}); "
            "shorten the prompt or the contexts"
        )


def _first_position(count: int) -> list[tuple[int, int, int]]:
    return [(row, 0, -1) for row in range(count)]


def before_targets(rows: Sequence[Row], *, from_subject: bool = True) -> list[tuple[int, int, int]]:
    """(row, column, label) of every target token: the column that predicts it, from the subject or the row's start."""
    starts = [row.subject if from_subject else 0 for row in rows]
    return [
        (i, at - 1 - start, row.ids[at])
        for i, (row, start) in enumerate(zip(rows, starts, strict=True))
        for at in range(row.target, len(row.ids))
    ]


@torch.no_grad()
def _run_once(
    lm: LanguageModel, full: Int[Tensor, "rows time"], lookup: Int[Tensor, " rows"], width: int, site: Site
) -> tuple[dict[str, Any], Float[Tensor, "rows width"]]:
    """The full pass: what enters the first changed block, the prefixes' keys and values, and the site's output."""
    first, cache = first_changed(site), DynamicCache()
    entering = Site(max(first - 1, 0))
    with capture(lm, [entering, site]) as seen, capture(lm, [Site(lm.depth - 1)], stop=True):
        lm.model(input_ids=full, attention_mask=torch.ones_like(full), past_key_values=cache, use_cache=True)
    rows, prefix = torch.arange(len(full), device=full.device), int(lookup.max())
    columns = (lookup[:, None] + torch.arange(width, device=full.device)).clamp_max(full.shape[1] - 1)
    layers: list[Any] = cache.layers
    kept = [layers[i] if i >= first else None for i in range(lm.depth)]
    parts = {
        "ids": full.gather(1, columns),
        "positions": columns,
        "hidden": seen[entering][rows[:, None], columns],
        "mask": _mask(lookup, prefix, width, lm.dtype),
        "keys": tuple(layer and layer.keys[:, :, :prefix].clone() for layer in kept),
        "values": tuple(layer and layer.values[:, :, :prefix].clone() for layer in kept),
    }
    return parts, seen[site][rows, lookup]


def _mask(lookup: Int[Tensor, " rows"], prefix: int, width: int, dtype: torch.dtype) -> Tensor:
    """0 where a suffix position may look (its own prefix, and the suffix up to itself), the lowest number elsewhere."""
    before = torch.arange(prefix, device=lookup.device) < lookup[:, None]
    causal = torch.ones(width, width, dtype=torch.bool, device=lookup.device).tril()
    allowed = torch.cat([before[:, None].expand(-1, width, -1), causal.expand(len(lookup), -1, -1)], 2)
    return torch.zeros(allowed.shape, dtype=dtype, device=lookup.device).masked_fill(~allowed, torch.finfo(dtype).min)[
        :, None
    ]
