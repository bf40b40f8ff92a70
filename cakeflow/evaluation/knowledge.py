"""Knowledge or suppression: whether an edited model takes the new fact for true, or only says it after one prompt.

Three readings of papers of 2026, each of our own making, so that their numbers compare with nothing but themselves: a
choice among the old answer, the new one and "uncertain" (after SA-MCQ, 2604.05995), a negated prompt (after
2510.00625), and a mask over a small part of the prompt (after One Mask, 2605.28839).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.data.request import EditRequest
from cakeflow.data.text import states
from cakeflow.errors import ConfigError
from cakeflow.evaluation.outcome import free_answers
from cakeflow.evaluation.protocols import WILD_TOKENS
from cakeflow.evaluation.scoring import score_targets
from cakeflow.forward.tokens import encode_prompts
from cakeflow.models.language import LanguageModel

UNCERTAIN = "uncertain"
"""The third choice."""
CHOICE = "Complete the sentence: {prompt} ...\nChoices: {choices}\nAnswer:"
"""The question of a choice; each order of the choices is asked."""
SHARE = (0.04, 0.15)
"""Least and largest part of the positions that a mask hides."""


@dataclass(frozen=True)
class Choice:
    """Share of each answer in ``choose``; they sum to 1.

    Attributes:
        old: Mean probability share of the true target.
        new: Mean probability share of the new target.
        uncertain: Mean probability share of "uncertain".
    """

    old: float
    new: float
    uncertain: float


def choose(lm: LanguageModel, requests: Sequence[EditRequest], max_bytes: float | None = None) -> Choice:
    """Return how often a model chooses the old answer, the new one or "uncertain", by mean log-probability per token.

    Every fact is asked with the choices in each of three turns, so that no place is favored.

    Args:
        lm: The model.
        requests: Facts; those without a true target are left out.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: If no fact has a true target, so that there is nothing to choose from.
    """
    facts = _with_truth(requests)
    options = [[str(fact.target_true), fact.target_new, UNCERTAIN] for fact in facts]
    turns = [
        (fact, names[turn:] + names[:turn]) for fact, names in zip(facts, options, strict=True) for turn in range(3)
    ]
    texts = [CHOICE.replace("{choices}", "; ".join(n)).replace("{prompt}", f.text) for f, n in turns for _ in range(3)]
    targets = [name for names in options for _ in range(3) for name in names]
    scores = score_targets(lm, texts, targets, max_bytes=max_bytes)[0].reshape(-1, 3)
    counts = torch.bincount(scores.argmax(1), minlength=3).double() / len(scores)
    return Choice(*counts.tolist())


def negated(prompt: str) -> str | None:
    """Return a prompt with "not" behind its last auxiliary verb, or None where it does not end with one.

    Example:
        >>> negated("The capital of France is"), negated("Lyon is located in the country of"), negated("He plays")
        ('The capital of France is not', 'Lyon is not located in the country of', None)
    """
    words = prompt.split(" ")
    places = [i for i, word in enumerate(words) if word in ("is", "was", "are", "were", "can", "will", "has")]
    return " ".join([*words[: places[-1] + 1], "not", *words[places[-1] + 1 :]]) if places else None


def states_when_negated(lm: LanguageModel, requests: Sequence[EditRequest], max_bytes: float | None = None) -> float:
    """Return the share of facts whose negated prompt is still completed with the new target: a phrase, not knowledge.

    Args:
        lm: The model.
        requests: Facts; those whose prompts cannot be negated are left out.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: If no prompt can be negated.
    """
    pairs = [(text, each.target_new) for each in requests if (text := negated(each.text))]
    if not pairs:
        raise ConfigError("no prompt has a verb to negate, such as is, was or can; leave negated prompts out")
    answers = free_answers(lm, [text for text, _ in pairs], WILD_TOKENS, max_bytes=max_bytes)
    return sum(states(answer, name) for answer, (_, name) in zip(answers, pairs, strict=True)) / len(pairs)


def returns_when_masked(
    lm: LanguageModel, requests: Sequence[EditRequest], share: tuple[float, float] = SHARE
) -> float:
    """Return the share of facts for which hiding a few positions of the prompt makes the old target likelier again.

    Our reading of the attack: every run of neighboring positions that holds between the two shares of the prompt, at
    least one position, is hidden from attention, one after another, the last position excepted; a fact returns if one
    of them does it. Only facts of which the new target is likelier without a mask count.

    Args:
        lm: The model.
        requests: Facts; those without a true target are left out.
        share: Least and largest part of the positions.

    Returns:
        The share, nan where no fact has the new target as the likelier one.

    Raises:
        ConfigError: If no fact has a true target, or the shares are not in order within (0, 1).
    """
    if not 0 < share[0] <= share[1] < 1:
        raise ConfigError(f"share needs two parts of the positions in order, within 0 and 1; got {share}")
    returned = [value for fact in _with_truth(requests) if (value := _returns(lm, fact, share)) is not None]
    return sum(returned) / len(returned) if returned else float("nan")


def _returns(lm: LanguageModel, fact: EditRequest, share: tuple[float, float]) -> bool | None:
    """Return whether a mask brings a fact's old target back; None where the new one is not likelier without."""
    prompts, targets = [fact.text] * 2, [fact.target_new, str(fact.target_true)]
    rows = encode_prompts(lm.tokenizer, prompts, targets, [fact.space] * 2)
    length = min(row.target for row in rows)
    masks = torch.ones(1, length, dtype=torch.long)
    for size in range(max(1, round(share[0] * length)), max(1, int(share[1] * length)) + 1):
        starts = range(len(lm.front), length - size)
        hidden = torch.ones(len(starts), length, dtype=torch.long)
        for place, start in enumerate(starts):
            hidden[place, start : start + size] = 0
        masks = torch.cat([masks, hidden])
    new, old = (_masked_scores(lm, row.ids, row.target, masks) for row in rows)
    return bool((old > new)[1:].any()) if new[0] > old[0] else None


@torch.no_grad()
def _masked_scores(lm: LanguageModel, ids: tuple[int, ...], target: int, masks: Tensor) -> Float[Tensor, " masks"]:
    """Return the mean log-probability per token of a row's target under each mask of its prompt."""
    tokens = torch.tensor([ids] * len(masks), device=lm.device)
    rest = torch.ones(len(masks), len(ids) - masks.shape[1], dtype=torch.long)
    mask = torch.cat([masks, rest], 1).to(lm.device)
    places = torch.arange(len(ids), device=lm.device).expand_as(tokens)  # a hidden token keeps its place
    logits: Tensor = lm(input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False).logits
    logprobs = logits[:, target - 1 : -1].double().log_softmax(-1)
    return logprobs.gather(2, tokens[:, target:, None]).squeeze(2).mean(1).cpu()


def _with_truth(requests: Sequence[EditRequest]) -> list[EditRequest]:
    facts = [each for each in requests if each.target_true]
    if not facts:
        raise ConfigError("no fact has a target_true, the old answer; add it, or leave this measurement out")
    return facts
