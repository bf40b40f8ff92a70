"""Answers as A3E's official driver writes them: greedily, and repeating less once a comma was written."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.errors import ConfigError
from cakeflow.models import LanguageModel


def less_repeated(
    logits: Float[Tensor, " vocabulary"], written: Sequence[int], commas: Collection[int], divisor: float = 10.0
) -> Float[Tensor, " vocabulary"]:
    """Divide the logits of all tokens that were written, once one of these is a comma (the official driver's rule).

    Logits below 0 grow by it.

    Args:
        logits: Logits of the next token.
        written: Tokens that were written behind the question.
        commas: Tokens that are a comma.
        divisor: What the logits are divided by.
    """
    if not set(commas) & set(written):
        return logits
    lowered = logits.clone()
    lowered[list(set(written))] /= divisor
    return lowered


def comma_tokens(lm: LanguageModel) -> frozenset[int]:
    """Return the tokens that are a comma, white space aside."""
    ids = {ids[-1] for text in ("a,", "a ,") if (ids := lm.tokenizer(text, add_special_tokens=False)["input_ids"])}
    return frozenset(i for i in ids if str(lm.tokenizer.decode([i])).strip() == ",")


@torch.no_grad()
def answer(
    lm: LanguageModel, question: Sequence[int], tokens: int = 15, commas: Collection[int] = ()
) -> tuple[list[int], Float[Tensor, "tokens vocabulary"]]:
    """Answer a question greedily, with the model as it is: what memories are in place decide on the question.

    ``forward.continuations`` writes the same without ``commas``, for many questions at once.

    Args:
        lm: The model.
        question: Tokens of the question.
        tokens: Number of tokens to write; fewer, if the text ends.
        commas: Tokens behind which written ones are less likely (``less_repeated``); none by default.

    Returns:
        The tokens, and the logits from which each was taken, before that rule, in the model's type.

    Raises:
        ConfigError: If the question has no token.
    """
    if not question:
        raise ConfigError("the question has no token, so that nothing can follow it; ask with a text")
    written: list[int] = []
    logits: list[Tensor] = []
    ids, cache = list(question), None
    while len(written) < tokens and (not written or written[-1] != lm.tokenizer.eos_token_id):
        output = lm(input_ids=torch.tensor([ids], device=lm.device), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, -1])
        written.append(int(less_repeated(logits[-1], written, commas).argmax()))
        ids = written[-1:]
    return written, torch.stack(logits)
