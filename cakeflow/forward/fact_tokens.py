"""The token at which a fact is written: named by the user, or the nearest one at which the model can take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Self

from cakeflow.data.request import EditRequest, FactToken
from cakeflow.errors import ConfigError, Fault, RequestError
from cakeflow.forward.packing import pad, plan
from cakeflow.forward.progress import progress_bar
from cakeflow.forward.tokens import EditBatch, Row, TextBatch
from cakeflow.models.architecture import Site
from cakeflow.models.hooks import capture
from cakeflow.models.language import LanguageModel

MASSIVE = 2.5
"""Norm of a token's hidden state, in medians of the batch, from which on nothing can be written there.

Massive activations (Sun et al. 2024): between them and ordinary tokens there is a gap, on SmolLM2 from 2 to 3 medians.
"""


class FactBatch(EditBatch):
    """The requests of one edit batch, and their entries: a fact that is written at two tokens has two of them.

    Args:
        requests: n requests.
        texts: m entries, those of a request next to each other.
        bare: The bare prompt of each request.
        numbers: Place of each request in its run.
        massive: For each request the norm at its fact's token in medians, where that is massive in spite of all.
    """

    def __init__(
        self,
        requests: Sequence[EditRequest],
        texts: TextBatch,
        bare: Sequence[Row],
        numbers: Sequence[int],
        massive: Sequence[float | None],
    ) -> None:
        super().__init__(requests, numbers)
        self.texts, self.bare, self.massive = texts, tuple(bare), tuple(massive)
        place = {number: i for i, number in enumerate(self.numbers)}
        self.owners = [place[number] for number in texts.numbers]
        """For each entry the place of its request."""

    def part(self, facts: Sequence[int]) -> Self:
        """The batch of the requests at some places."""
        chosen = {self.numbers[i] for i in facts}
        texts = self.texts.part([i for i, number in enumerate(self.texts.numbers) if number in chosen])
        parts = ([each[i] for i in facts] for each in (self.requests, self.bare, self.numbers, self.massive))
        requests, bare, numbers, massive = parts
        return type(self)(requests, texts, bare, numbers, massive)  # type: ignore[arg-type]


def check_tokens(texts: TextBatch, fact_token: FactToken) -> None:
    """Check that every request has the token at which its fact is to be written; arguments as for ``choose_tokens``.

    Raises:
        RequestError: Naming every request without such a token.
    """
    remedy = "there is no token between subject and target; write the fact at another one"
    faults = [
        Fault(number, "fact_token", token, remedy)
        for number, rows, token in zip(texts.numbers, texts.rows, _tokens(texts, fact_token), strict=True)
        if token == "after_subject" and any(row.subject + 1 == row.target for row in rows)
    ]
    if faults:
        raise RequestError(faults)


def choose_tokens(
    lm: LanguageModel,
    texts: TextBatch,
    fact_token: FactToken,
    layer: int,
    max_tokens: int = 8192,
    keys: Sequence[int] | None = None,
) -> FactBatch:
    """Choose in every row the token at which its fact is written, and make an entry of the rows that agree.

    A token that carries a massive activation has nearly the same key in every text, so no fact can be written there
    alone. ``auto`` takes the subject's last token, or where that is massive the next one before the target that is not:
    in a model without a token for the beginning of a text, a subject of one token at the start of the prompt is such a
    case, and in a context of the same prompt it is none. Then a fact has two entries, each with contexts of its own.

    Args:
        lm: The unedited model.
        texts: One entry per request, at the subject's last token.
        fact_token: The token, for requests that do not say it themselves.
        layer: First edited layer.
        max_tokens: Most tokens in one forward pass.
        keys: For each row of an entry the key that it belongs to (``Contexts.keys``); one key by default.
    """
    tokens = _tokens(texts, fact_token)
    automatic = [i for i, token in enumerate(tokens) if token == "auto"]
    norms = (
        dict(zip(automatic, relative_norms(lm, texts.part(automatic), layer, max_tokens), strict=True))
        if automatic
        else {}
    )
    parts, massive = list[TextBatch](), list[float | None]()
    for i, (rows, token) in enumerate(zip(texts.rows, tokens, strict=True)):
        if token == "auto":
            offsets = [_free(row, norm) for row, norm in zip(rows, norms[i], strict=True)]
            highest = max(float(norm[row.subject + o]) for row, norm, o in zip(rows, norms[i], offsets, strict=True))
        else:
            offsets, highest = [_offset(row, token) for row in rows], 0.0
        names = [
            (offset if token == "auto" else None, key)
            for offset, key in zip(offsets, keys or [0] * len(rows), strict=True)
        ]
        parts += [
            _entry(texts, i, offsets, [k for k, name in enumerate(names) if name == group])
            for group in dict.fromkeys(names)
        ]
        massive.append(highest if highest > MASSIVE else None)
    bare = [rows[0] for rows in texts.rows]
    return FactBatch(texts.requests, TextBatch.join(parts), bare, texts.numbers, massive)


def _tokens(texts: TextBatch, fact_token: FactToken) -> list[FactToken]:
    return [request.fact_token or fact_token for request in texts.requests]


def _offset(row: Row, token: FactToken) -> int:
    """Return how far a named token lies behind the subject's last one."""
    places = {"subject_last": row.subject, "subject_first": row.start, "after_subject": row.subject + 1}
    return places.get(token, row.target - 1) - row.subject


def _free(row: Row, norm: Float[Tensor, " time"]) -> int:
    """Return the offset of the nearest token from the subject's last one on that is not massive; 0 if all are."""
    free = [place for place in range(row.subject, row.target) if float(norm[place]) <= MASSIVE]
    return free[0] - row.subject if free else 0


def _entry(texts: TextBatch, i: int, offsets: Sequence[int], places: Sequence[int]) -> TextBatch:
    """Return the entry of some of a request's rows, its fact written at tokens with the given offsets."""
    rows, essence = [texts.rows[i][k] for k in places], texts.essence[i]
    total = sum(texts.weights[i][k] for k in places)
    weights = (
        tuple(texts.weights[i][k] / total for k in places) if len(places) < len(texts.rows[i]) else texts.weights[i]
    )
    if places[0] > 0:  # the bare prompt is not among them: the neutral prompt stands in the first context as well
        first, tail = rows[0], essence.ids[essence.subject + 1 :]
        ids = first.ids[: first.subject + 1] + tail
        essence = Row(ids, first.subject, len(ids), first.start)
    essence = replace(essence, offset=min(offsets[places[0]], len(essence.ids) - 1 - essence.subject))
    moved = tuple(replace(row, offset=offsets[k]) for row, k in zip(rows, places, strict=True))
    return TextBatch([texts.requests[i]], [moved], [essence], [weights], [texts.numbers[i]])


@torch.no_grad()
def relative_norms(
    lm: LanguageModel, texts: TextBatch, layer: int, max_tokens: int = 8192
) -> list[list[Float[Tensor, " time"]]]:
    """Measure the hidden states that enter a block: their norms in medians over all tokens but the first ones.

    Args:
        lm: The model.
        texts: n entries.
        layer: The block; below the first one there is only the embedding, so block 0 is measured at its output.
        max_tokens: Most tokens in one forward pass.

    Returns:
        For each entry and row the norm at every token before the target.
    """
    site, rows = Site(max(layer - 1, 0)), [row.ids[: row.target] for rows in texts.rows for row in rows]
    norms: dict[int, Tensor] = {}
    with progress_bar(len(rows), "choosing tokens", "text") as bar:
        for group in plan([len(ids) for ids in rows], max_tokens, slack=8):
            ids = pad([rows[i] for i in group], lm.device)
            with capture(lm, [site], stop=True) as outputs:
                lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            lengths = outputs[site].float().norm(dim=2).cpu()
            norms |= {i: each[: len(rows[i])] for i, each in zip(group, lengths, strict=True)}
            bar.update(len(group))
    behind = torch.cat([each[1:] for each in norms.values()])  # a first token is massive in most models
    middle = behind.median() if len(behind) else torch.ones(())
    flat = iter(norms[i] / middle for i in range(len(rows)))
    return [[next(flat) for _ in entry] for entry in texts.rows]


def with_end(lm: LanguageModel, texts: TextBatch) -> TextBatch:
    """Return facts whose targets end with the end-of-text token, so that an edit teaches where an answer ends (LocFT).

    Args:
        lm: The model.
        texts: n facts.

    Raises:
        ConfigError: If the tokenizer has no such token.
        RequestError: Naming every fact that leaves no room for it.
    """
    if (token := lm.tokenizer.eos_token_id) is None:
        raise ConfigError("the tokenizer has no end-of-text token to teach: set end_of_text to false")
    rows = [tuple(replace(row, ids=(*row.ids, token)) for row in variants) for variants in texts.rows]
    remedy = f"longer than the model's {lm.longest} positions with the end of the text; shorten it"
    long = [i for i, variants in enumerate(rows) if max(len(row.ids) for row in variants) > lm.longest]
    if long:
        raise RequestError([Fault(texts.numbers[i], "prompt", texts.requests[i].prompt, remedy) for i in long])
    return TextBatch(texts.requests, rows, texts.essence, texts.weights, texts.numbers)
