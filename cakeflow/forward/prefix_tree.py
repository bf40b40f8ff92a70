"""Next-token predictions after many contexts, whose common beginnings are run once.

Contexts are packed into prefix trees. A tree is one row of tokens in which each token attends to its ancestors and
stands at the position of its depth, so every node is exactly the end of one context. A record of CounterFact is 26
prompts with their targets; padded, as the official code reads them, that is five to six times the tokens of its tree.
Attention whose positions come from the mask alone (ALiBi), or that slides over less than a whole text, cannot branch:
there a row is one text, which still gives the predictions after each of its beginnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cakeflow.forward.packing import GIB, alike, logits_bytes, pad, pass_bytes, plan, require_bytes
from cakeflow.models.hooks import logits_at
from cakeflow.models.language import LanguageModel
from cakeflow.models.routing import prompt_lengths

Context = tuple[int, ...]
"""Token ids before a prediction."""
ENDS_BYTES = GIB / 2
"""Most bytes of the logits of one pass where no limit is named."""
SIZE = 256
"""Most tokens in a tree, unless one context is longer: large trees share more, but attention grows with their size."""


@dataclass
class PrefixTree:
    """Contexts in one row.

    Attributes:
        ids: The token of each node.
        parent: Index of the node before each node; -1 at the beginning.
        deciding: Number of nodes, from the first, on which routed modules decide.
    """

    ids: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    deciding: int = 0

    def extend(self, path: list[int], tokens: Sequence[int]) -> list[int]:
        """Append tokens below the last node of ``path`` and return the longer path."""
        for token in tokens:
            self.parent.append(path[-1] if path else -1)
            path = [*path, len(self.ids)]
            self.ids.append(token)
        return path

    def ancestors(self, width: int) -> Bool[Tensor, "width width"]:
        """Return the attention mask: a node attends to itself and its ancestors, padding up to ``width`` to itself."""
        mask = torch.eye(width, dtype=torch.bool)
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                mask[node] |= mask[parent]
        return mask


def grow(contexts: Sequence[Context], size: int = SIZE) -> tuple[list[PrefixTree], dict[Context, tuple[int, int]]]:
    """Pack contexts into trees of at most ``size`` tokens where possible; size 0 makes every tree a single text.

    Args:
        contexts: Contexts, repetitions allowed.
        size: Most tokens in a tree of several branches.

    Returns:
        The trees, and the (tree, node) at which each context ends.

    Example:
        >>> trees, place = grow([(5, 1), (5, 2, 3), (5,)])
        >>> trees[0].ids, trees[0].parent, place[5, 2, 3]
        ([5, 1, 2, 3], [-1, 0, 0, 2], (0, 3))
    """
    trees: list[PrefixTree] = []
    place: dict[Context, tuple[int, int]] = {}
    path: list[int] = []
    last: Context = ()
    # sorted, a context follows its beginnings directly, and contexts with a common beginning are neighbors
    for context in sorted(set(contexts)):
        shared = alike(context, last)
        fits = bool(trees) and (len(trees[-1].ids) + len(context) - shared <= size if size else shared == len(last))
        if not fits:
            trees.append(PrefixTree())
            shared = 0
        path = trees[-1].extend(path[:shared], context[shared:])
        place[context], last = (len(trees) - 1, path[-1]), context
    return trees, place


def grow_apart(
    contexts: Sequence[Context], deciding: Sequence[Context], size: int = SIZE
) -> tuple[list[PrefixTree], list[tuple[int, int]]]:
    """Pack contexts into trees, those apart that are routed by different texts.

    Args:
        contexts: Contexts, repetitions allowed.
        deciding: For each context the text on which it is routed: its beginning, or a text that it begins.
        size: As for ``grow``.

    Returns:
        The trees, and for each context the (tree, node) at which it ends.
    """
    groups: dict[Context, list[int]] = {}
    for index, text in enumerate(deciding):
        groups.setdefault(text, []).append(index)
    trees: list[PrefixTree] = []
    place: list[tuple[int, int]] = [(0, 0)] * len(contexts)
    for text, members in groups.items():
        longer = any(len(contexts[index]) < len(text) for index in members)  # the text must stand in one row
        new, ends = grow([text, *(contexts[index] for index in members)], 0 if longer else size)
        for tree in new:
            tree.deciding = len(text)
        for index in members:
            tree_number, node = ends[contexts[index]]
            place[index] = (len(trees) + tree_number, node)
        trees += new
    return trees, place


@torch.no_grad()
def predict(
    lm: LanguageModel,
    contexts: Sequence[Context],
    labels: Sequence[int],
    max_tokens: int = 4096,
    max_bytes: float | None = None,
    deciding: Sequence[Context] | None = None,
) -> tuple[Float[Tensor, " m"], Bool[Tensor, " m"]]:
    """Compute the log-probability of each label as the next token.

    Args:
        lm: The model.
        contexts: m contexts, none of them empty.
        labels: Token id after each context.
        max_tokens: Most tokens in one forward pass.
        max_bytes: Most bytes beyond the model; by default half a GiB of logits, and ``max_tokens``.
        deciding: For each context the text on which routed modules decide; by default the context itself.

    Returns:
        Log-probabilities (natural logarithm), and True where the label is the arg-max.

    Raises:
        ConfigError: If the longest context does not fit ``max_bytes``.
    """
    longest = max(map(len, contexts), default=0)
    branching = lm.places_tokens and lm.sees_all(longest)
    size, max_ends = SIZE if branching else 0, max(1, int(ENDS_BYTES / logits_bytes(lm)))
    if max_bytes is not None:
        most_tokens, max_ends = _most(lm, max_bytes, longest, max(size, longest))
        max_tokens, size = min(max_tokens, most_tokens), min(size, most_tokens)
    if lm.scope in (None, "token"):
        trees, ends_of = grow(contexts, size)
        place = [ends_of[context] for context in contexts]
    else:
        trees, place = grow_apart(contexts, contexts if deciding is None else deciding, size)
    # few passes should have more predictions than fit
    max_tokens = min(max_tokens, max_ends * sum(len(tree.ids) for tree in trees) // max(1, len(set(place))))
    logprobs, hits = torch.zeros(len(labels)), torch.zeros(len(labels), dtype=torch.bool)
    indices: list[list[int]] = [[] for _ in trees]  # of the contexts in each tree
    for index, (tree, _) in enumerate(place):
        indices[tree].append(index)
    for group in plan([len(tree.ids) for tree in trees], max_tokens, slack=SIZE):
        chosen = [(row, index) for row, tree in enumerate(group) for index in indices[tree]]
        ends = torch.tensor([(row, place[index][1]) for row, index in chosen], device=lm.device)
        ends, rows = ends.unique(dim=0, return_inverse=True)  # one row of logits for all labels of a context
        where = torch.tensor([index for _, index in chosen])
        label = torch.tensor([labels[index] for _, index in chosen], device=lm.device)
        inputs = _inputs(lm, [trees[tree] for tree in group], branching)
        lengths = torch.tensor([trees[tree].deciding for tree in group])
        for first in range(0, len(ends), max_ends):  # all of them at once, unless their logits do not fit
            with logits_at(lm, *ends[first : first + max_ends].T), prompt_lengths(lm.model, lengths):
                logits = lm(**inputs, use_cache=False).logits[0]
            here = (rows >= first) & (rows < first + max_ends)
            row, target, at = rows[here] - first, label[here], where[here.cpu()]
            of_label = logits[row, target].float() - logits.float().logsumexp(-1)[row]
            logprobs[at], hits[at] = of_label.cpu(), (logits.argmax(-1)[row] == target).cpu()
    return logprobs, hits


def _most(lm: LanguageModel, max_bytes: float, longest: int, width: int) -> tuple[int, int]:
    """Return how many tokens and how many predictions of a pass fit, each in half of the bytes.

    Args:
        lm: The model.
        max_bytes: Most bytes beyond the model.
        longest: Tokens in the longest context.
        width: Most tokens in a row: so many scores of attention, and entries of the mask, does a token have.
    """
    heads, size = int(lm.model.config.num_attention_heads), lm.embedding.element_size()
    token, end = pass_bytes(lm) + 2 * (heads + 1) * width * size, logits_bytes(lm)
    require_bytes(max_bytes, 2 * max(longest * token, end), f"scoring a text of {longest} tokens")
    return int(max_bytes / 2 / token), int(max_bytes / 2 / end)


def _inputs(lm: LanguageModel, trees: Sequence[PrefixTree], branching: bool) -> dict[str, Tensor]:
    """Return the arguments of the forward pass, one row per tree, padded on the right."""
    ids = pad([tree.ids for tree in trees], lm.device)
    if not branching:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    visible = torch.stack([tree.ancestors(ids.shape[1]) for tree in trees]).to(lm.device)
    mask = torch.zeros(visible.shape, dtype=lm.dtype, device=lm.device).masked_fill(~visible, torch.finfo(lm.dtype).min)
    return {"input_ids": ids, "attention_mask": mask[:, None], "position_ids": visible.sum(-1) - 1}
