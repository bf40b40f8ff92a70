"""Protocols of scoring a continuation of a prompt: its tokens, and the context of each.

``clean`` tokenises prompt and continuation together, once, special tokens in front; positions come from character
offsets, so what is scored are the continuation's own tokens in the text as the model would meet it. ``official``
does what the code behind the published tables does, errors included, so that its numbers can be compared:

- probabilities and exact matches (CounterFact; MEMIT's and AlphaEdit's ``evaluate_utils_counterfact``, with BLUE's
  special tokens): the continuation is tokenised alone, and its tokens are looked up in the logits of the joint text
  from the position on at which the prompt ends when tokenised alone;
- token accuracies (zsRE; ``evaluate_utils_zsre``): every token has a context of its own, the prompt and the decoded
  tokens before it, tokenised again; the tokens of a neighborhood answer keep the special tokens in front.

``wild`` lets the model answer by itself ("The Mirage of Model Editing", 2025): greedily, 32 new tokens, cut where a
reader would end the answer, and compared as a whole and by containment. ``wild_official`` cuts at any full stop or line
break, as published tables do, so that "St. Petersburg" is "St" there. What is scored beside it is that of ``clean``.

The official code puts a space before every continuation; ``clean`` does what the texts or their request say
(``cakeflow.data.text.join``). A published number without its protocol means nothing: on zsRE the two differ by the
special tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from cakeflow.data.text import until_any_stop
from cakeflow.forward.tokens import Row, encode_prompts, encode_texts

Protocol = Literal["clean", "official", "wild", "wild_official"]
CUTS: Mapping[str, Callable[[str], str]] = {"wild_official": until_any_stop}
"""Protocol -> function that cuts a free answer, where it is not ``until_stop``."""
WILD_TOKENS = 32
"""Most tokens of a free answer in the two protocols of free answers (LocFT's evaluation)."""

Read = tuple[tuple[int, ...], int]
"""A context (the tokens that the model reads) and the token that should come next."""


def joint_reads(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    spaces: Sequence[bool | None] = (),
) -> list[list[Read]]:
    """Return the reads of the ``clean`` protocol: each target token after all tokens before it in the joint text.

    Args:
        tokenizer: Tokenizer of the model.
        prompts: n prompts.
        targets: n targets.
        spaces: For each pair, whether a space stands between them; by default the texts decide.
    """
    return reads_of(encode_prompts(tokenizer, prompts, targets, spaces))


def reads_of(rows: Sequence[Row]) -> list[list[Read]]:
    """Return for each row its target's tokens, each after all tokens before it."""
    return [[(row.ids[:at], row.ids[at]) for at in range(row.target, len(row.ids))] for row in rows]


def official_reads(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str]
) -> list[list[Read]]:
    """Return the official reads of CounterFact: the target tokenised alone, looked up where the prompt alone ends."""
    texts = _tokens(tokenizer, [f"{prompt} {target}" for prompt, target in zip(prompts, targets, strict=True)])
    starts = map(len, _tokens(tokenizer, prompts))
    expected = _tokens(tokenizer, [f" {target}" for target in targets], special=False)
    return [
        [(tuple(text[: start + place]), label) for place, label in enumerate(labels)]
        for text, start, labels in zip(texts, starts, expected, strict=True)
    ]


def official_token_reads(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str], special: Sequence[bool]
) -> list[list[Read]]:
    """Return the official reads of zsRE: a context per target token, decoded and tokenised again.

    Args:
        tokenizer: Tokenizer of the model.
        prompts: n prompts.
        targets: n targets.
        special: For each target, True to score the special tokens that the tokenizer puts before it as well.
    """
    tokens: list[tuple[int, str, str]] = []  # prompt, context and label of each target token
    with_special, without = (_tokens(tokenizer, [f" {t}" for t in targets], special=each) for each in (True, False))
    for index, prompt in enumerate(prompts):
        ids = with_special[index] if special[index] else without[index]
        tokens += [
            (index, prompt + _text(tokenizer, ids[:i]), _text(tokenizer, ids[i : i + 1])) for i in range(len(ids))
        ]
    texts = _tokens(tokenizer, [text for _, text, _ in tokens])
    labels = _tokens(tokenizer, [label for *_, label in tokens], special=False)
    reads: list[list[Read]] = [[] for _ in prompts]
    for (index, *_), text, label in zip(tokens, texts, labels, strict=True):
        if label or tokenizer.eos_token_id is not None:  # a token that reads back as none counts as the end
            reads[index].append((tuple(text), label[0] if label else tokenizer.eos_token_id))
    return reads


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, special: bool = True
) -> Sequence[Sequence[int]]:
    if special:
        return encode_texts(tokenizer, texts)
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))
