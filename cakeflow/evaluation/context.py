"""Edited facts behind other text: a system prompt, earlier turns of a chat, and many other tokens.

A fact that is written at one prompt may be lost where the prompt is not the beginning of the text (EAMET found 98.5 to
fall to 66.5 behind 200 tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from cakeflow.data.builtin import neutral_text
from cakeflow.data.request import EditRequest
from cakeflow.data.text import until_stop
from cakeflow.errors import ConfigError
from cakeflow.evaluation.outcome import TOKENS, free_answers
from cakeflow.metrics.text import AnswerRate
from cakeflow.models.language import LanguageModel

Message = Mapping[str, str]
"""A message of a chat: ``role`` and ``content``."""
SYSTEM: Message = {"role": "system", "content": "You answer in one short sentence."}
EARLIER: Sequence[Message] = (
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am an assistant."},
)
LENGTHS = (50, 200)
"""Numbers of other tokens."""


def contexts(
    lm: LanguageModel, lengths: Sequence[int] = LENGTHS, text: str | None = None
) -> dict[str, Callable[[str], str]]:
    """Return how a prompt is written in each context, by name.

    ``alone`` is the prompt, ``text_{n}`` the prompt behind n tokens of other text. Where the tokenizer has a chat
    template: ``chat``, ``chat_{n}``, both in one turn of the user's, ``turns`` behind an earlier exchange and, unless
    the template takes none, ``system`` behind a system prompt.

    Args:
        lm: The model.
        lengths: Numbers of other tokens.
        text: The other text; by default some 900 tokens about everyday matters.

    Raises:
        ConfigError: If the text has fewer tokens, or a length is less than 1.
    """
    other = neutral_text() if text is None else text
    ids = lm.tokenizer(other, add_special_tokens=False)["input_ids"]
    if any(not 1 <= length <= len(ids) for length in lengths):
        raise ConfigError(f"lengths must be from 1 to the {len(ids)} tokens of the other text, got {list(lengths)}")
    texts = {length: str(lm.tokenizer.decode(ids[:length])).strip() for length in lengths}
    places: dict[str, Callable[[str], str]] = {"alone": str}
    places |= {f"text_{length}": partial(_behind, before) for length, before in texts.items()}
    if not lm.chats:
        return places
    places["chat"] = lm.user_turn
    places |= {f"chat_{length}": partial(_behind_in_turn, lm, before) for length, before in texts.items()}
    places["turns"] = partial(lm.user_turn, earlier=EARLIER)
    with suppress(ConfigError):  # some templates take no system prompt
        lm.user_turn("Hello", [SYSTEM])
        places["system"] = partial(lm.user_turn, earlier=[SYSTEM])
    return places


def states_in_contexts(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    lengths: Sequence[int] = LENGTHS,
    text: str | None = None,
    max_bytes: float | None = None,
) -> dict[str, float]:
    """Return for each context the share of facts whose free answer there has the new target in it.

    Answers are those of a run's outcome: greedy, 12 new tokens up to the end of the sentence, in a chat 24.

    Args:
        lm: The model.
        requests: The facts.
        lengths: Numbers of other tokens.
        text: The other text.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: As for ``contexts``.
        RequestError: If a prompt is longer than the model, with what stands before it.
    """
    rates = {}
    for name, write in contexts(lm, lengths, text).items():
        chat = not name.startswith(("alone", "text"))
        prompts = [write(request.text) for request in requests]
        tokens, cut = (2 * TOKENS, str) if chat else (TOKENS, until_stop)
        rate = AnswerRate(sync_on_compute=False)
        answers = free_answers(lm, prompts, tokens, max_bytes=max_bytes, cut=cut)
        rate.update(answers, [request.target_new for request in requests])
        rates[name] = float(rate.compute())
    return rates


def _behind(before: str, prompt: str) -> str:
    return f"{before} {prompt}"


def _behind_in_turn(lm: LanguageModel, before: str, prompt: str) -> str:
    return lm.user_turn(_behind(before, prompt))
