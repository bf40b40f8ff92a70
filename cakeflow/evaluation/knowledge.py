"""Knowledge or suppression: whether an edited model takes the new fact for true, or only says it after one prompt.

Readings of papers of 2026, each of our own making, so that their numbers compare with nothing but themselves: a
choice among the old answer, the new one and "uncertain" (after SA-MCQ, 2604.05995), a negated prompt (after
2510.00625), and a mask over a small part of the prompt (after One Mask, 2605.28839). Beside them the fact the other way
round (the reversal curse, 2309.12288).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from cakeflow.data.builtin import reversed_prompts
from cakeflow.data.request import EditRequest
from cakeflow.errors import ConfigError, RequestWarning, listed
from cakeflow.evaluation.outcome import free_answers
from cakeflow.evaluation.protocols import WILD_TOKENS
from cakeflow.evaluation.scoring import score_targets
from cakeflow.forward.tokens import Row, encode_prompts
from cakeflow.metrics.preference import Efficacy
from cakeflow.metrics.text import AnswerRate
from cakeflow.models.language import LanguageModel

UNCERTAIN = "uncertain"
"""The third choice."""
CHOICE = "Complete the sentence: {prompt} ...\nChoices: {choices}\nAnswer:"
"""The question of a choice; each order of the choices is asked."""
SHARES = (0.04, 0.08, 0.12, 0.15)
"""Parts of a prompt's positions that masks hide."""


@dataclass(frozen=True)
class Choice:
    """Shares of the answers in ``choose``; they sum to 1.

    Attributes:
        old: Share of the questions in which the true target is chosen.
        new: The same of the new target.
        uncertain: The same of "uncertain".
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
    rate = AnswerRate(sync_on_compute=False)
    rate.update(answers, [name for _, name in pairs])
    return float(rate.compute())


@dataclass(frozen=True)
class Reversal:
    """Answers of a model to reversed facts.

    Attributes:
        linked: Share of the facts whose subject is likelier after the new object than after the old one (``Efficacy``
            over mean log-probabilities per token); nan where no fact has a true target.
        answered: Share of the facts whose subject is named in the free answer about the new object (``AnswerRate``).
            Most objects have many subjects, so that other answers are right too: this one is a lower bound.
    """

    linked: float
    answered: float


def reverse(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    further: Mapping[str, str] | None = None,
    max_bytes: float | None = None,
) -> Reversal:
    """Ask facts the other way round: the object is given, the subject is asked for.

    Facts of a relation that has no such question are left out, with a warning that names it.

    Args:
        lm: The model.
        requests: The facts.
        further: Relation -> prompt with ``{}`` for the object, beside ``cakeflow.data.reversed_prompts``.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: If no fact can be reversed, or a prompt has not exactly one ``{}``.
    """
    facts, asked, before = _turned(requests, reversed_prompts() | dict(further or {}))
    subjects = [fact.subject for fact in facts]
    old = [i for i, text in enumerate(before) if text is not None]
    texts = [*asked, *(text for text in before if text is not None)]
    scores, hits = score_targets(lm, texts, subjects + [subjects[i] for i in old], max_bytes=max_bytes)
    rivals, places = torch.full((len(facts),), torch.nan), torch.arange(len(facts))
    rivals[torch.tensor(old, dtype=torch.long)] = scores[len(facts) :]
    linked, rate = Efficacy(sync_on_compute=False), AnswerRate(sync_on_compute=False)
    linked.update(scores[: len(facts)], rivals, hits[: len(facts)] == 1, places, torch.zeros_like(places))
    rate.update(free_answers(lm, asked, WILD_TOKENS, max_bytes=max_bytes), subjects)
    return Reversal(float(linked.compute()), float(rate.compute()))


def relation_of(fact: EditRequest) -> str:
    """Return the name of a fact's relation, by default its prompt."""
    return fact.prompt if fact.relation is None else fact.relation


def _turned(
    requests: Sequence[EditRequest], prompts: Mapping[str, str]
) -> tuple[list[EditRequest], list[str], list[str | None]]:
    """Return the facts that can be reversed, and what is asked about their new and, if they have one, old objects."""
    if bad := [prompt for prompt in prompts.values() if prompt.count("{}") != 1]:
        raise ConfigError(f"a reversed prompt needs {{}} exactly once, where the object goes; got {bad[0]!r}")
    lacking = sorted({repr(name) for name in map(relation_of, requests) if name not in prompts})
    facts = [fact for fact in requests if relation_of(fact) in prompts]
    if not facts:
        raise ConfigError(
            f"no fact can be reversed: {listed(lacking)} has no prompt for it; give one, or leave reversed facts out"
        )
    if lacking:
        message = f"left out of reversed facts, since there is no prompt for their relation: {listed(lacking)}"
        warnings.warn(message, RequestWarning, stacklevel=3)
    pairs = [(prompts[relation_of(fact)], fact) for fact in facts]
    old = [prompt.replace("{}", fact.target_true) if fact.target_true else None for prompt, fact in pairs]
    return facts, [prompt.replace("{}", fact.target_new) for prompt, fact in pairs], old


@dataclass(frozen=True)
class MaskedFact:
    """Effect of masks over the prompt on one fact.

    Attributes:
        prompt: The prompt.
        old: The true target.
        new: The new target.
        positions: Tokens of the prompt.
        returned: Part of the positions -> whether hiding so many of them makes the old target likelier again; empty
            where the new target is not the likelier one without a mask, so that there is nothing to return from.
    """

    prompt: str
    old: str
    new: str
    positions: int
    returned: Mapping[float, bool]


def hidden_positions(share: float, length: int) -> int:
    """Return how many of so many positions a share allows to hide: at least one.

    Example:
        >>> hidden_positions(0.15, 20), hidden_positions(0.04, 12)
        (3, 1)
    """
    return max(1, int(share * length))


def mask_attack(
    lm: LanguageModel, requests: Sequence[EditRequest], shares: Sequence[float] = SHARES
) -> list[MaskedFact]:
    """Return for each fact which masks over its prompt make the old target likelier again.

    Our reading of the attack: as many neighboring positions as a share allows, at least one, are hidden from attention,
    at one place of the prompt after another, the last position excepted.

    Args:
        lm: The model.
        requests: Facts; those without a true target are left out.
        shares: Parts of the positions.

    Raises:
        ConfigError: If no fact has a true target, or a share is not within (0, 1).
    """
    if not shares or not all(0 < share < 1 for share in shares):
        raise ConfigError(f"shares needs parts of the positions within 0 and 1; got {list(shares)}")
    facts = []
    for fact in _with_truth(requests):
        rows, length = _prompt_rows(lm, fact)
        sizes = {share: hidden_positions(share, length) for share in shares}
        by_size = _returns(lm, rows, length, sorted({*sizes.values()}))
        returned = {} if by_size is None else {share: by_size[size] for share, size in sizes.items()}
        facts.append(MaskedFact(fact.text, str(fact.target_true), fact.target_new, length, returned))
    return facts


def preferences(
    lm: LanguageModel, requests: Sequence[EditRequest], max_bytes: float | None = None
) -> Float[Tensor, "n 2"]:
    """Return the mean log-probability per token of each fact's new and old target; facts without an old one are out.

    Args:
        lm: The model.
        requests: The facts.
        max_bytes: Most bytes beyond the model.

    Raises:
        ConfigError: If no fact has a true target.
    """
    facts = _with_truth(requests)
    prompts = [fact.text for fact in facts for _ in range(2)]
    targets = [name for fact in facts for name in (fact.target_new, str(fact.target_true))]
    return score_targets(lm, prompts, targets, max_bytes=max_bytes)[0].reshape(-1, 2)


def _prompt_rows(lm: LanguageModel, fact: EditRequest) -> tuple[list[Row], int]:
    """Return a fact's prompt with the new and the old target, and the tokens that both prompts have."""
    targets = [fact.target_new, str(fact.target_true)]
    rows = encode_prompts(lm.tokenizer, [fact.text] * 2, targets, [fact.space] * 2)
    return list(rows), min(row.target for row in rows)


def _returns(lm: LanguageModel, rows: Sequence[Row], length: int, sizes: Sequence[int]) -> dict[int, bool] | None:
    """Return for each size whether a mask of it brings the old target back; None where the new one is not likelier."""
    masks, owners = [torch.ones(1, length, dtype=torch.long)], [0]
    for size in sizes:
        starts = range(len(lm.front), length - size)
        hidden = torch.ones(len(starts), length, dtype=torch.long)
        for place, start in enumerate(starts):
            hidden[place, start : start + size] = 0
        masks.append(hidden)
        owners += [size] * len(starts)
    new, old = (_masked_scores(lm, row.ids, row.target, torch.cat(masks)) for row in rows)
    if new[0] <= old[0]:
        return None
    returned = {size for size, back in zip(owners[1:], (old > new)[1:].tolist(), strict=True) if back}
    return {size: size in returned for size in sizes}


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
