"""Retrieval of edits by the question, and composition of their changes: pure functions of tensors.

A3E (NeurIPS 2025; official code e2173ac, ``tuners/melo.py``) and its paper's rule. Edits that a question needs are
those whose subjects are similar to one of its tokens. ``composed.py`` has the module that decides and answers by this.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cakeflow.errors import ConfigError, listed, require_choice, require_count
from cakeflow.forward import Row, pad, plan
from cakeflow.models import LanguageModel, Site, capture, prompt_lengths
from cakeflow_sidememory.factors import Factors, cosines, require_rows

Part = Literal["subject", "relation", "answer"]
"""A representation that a question can be compared with."""
Rule = Literal["agreeing", "outermost"]
"""Changes are joined by ``agreeing``: all edits, elements in which two signs disagree are 0 (the paper). Or by
``outermost``, as the official code does it: the edits of smallest and largest index alone, one index taken twice."""

TIE = 1e-4
"""Cosines that differ by no more count as equal: the states of one subject differ so much by the batch that they were
computed in."""


@dataclass(frozen=True, eq=False)
class Representations:
    """The states by which n edits can be retrieved.

    Attributes:
        key: Output of the key block's down projection at the last token of the prompt.
        subject: Output of the similarity block's down projection at the subject's last token.
        relation: The same at the last token of the prompt.
        answer: The same n//2 - 1 tokens behind that one, of an answer of n tokens: one before it, where n is 1.
    """

    key: Float[Tensor, "n width"]
    subject: Float[Tensor, "n width"]
    relation: Float[Tensor, "n width"]
    answer: Float[Tensor, "n width"]

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True)
class Retrieval:
    """The rule by which a question retrieves edits.

    Attributes:
        threshold: An edit has to be more similar than this.
        top: And be among so many of the most similar ones; with fewer edits, all of them are. Edits that are as similar
            as the last of these (``TIE``) come with it, so that their order does not matter: answers of one question
            have one subject, and so one similarity.
        part: The representation that the question's tokens are compared with.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    threshold: float = 0.5
    top: int = 4
    part: Part = "subject"

    def __post_init__(self) -> None:
        require_choice("Retrieval.part", self.part, Part)
        require_count("Retrieval.top", self.top, 1)
        if not -1 <= self.threshold <= 1:
            raise ConfigError(f"Retrieval.threshold is a cosine, from -1 to 1, got {self.threshold}")

    def decide(self, similarity: Float[Tensor, "questions n"]) -> Bool[Tensor, "questions n"]:
        """Return the edits that each question retrieves; none is an answer too.

        A memory grows edit by edit, so fewer than ``top`` are no error here, though the official code fails.

        Args:
            similarity: Similarity of each question to each of the n edits.
        """
        last = similarity.topk(min(self.top, similarity.shape[-1])).values[..., -1:]
        return (similarity > self.threshold) & (similarity >= last - TIE)


def read_representations(
    lm: LanguageModel, rows: Sequence[Row], key_layer: int, similarity_layer: int, max_tokens: int = 8192
) -> Representations:
    """Read the representations of edits in the unedited model.

    Args:
        lm: The model.
        rows: For each edit its bare prompt with the answer, and a subject.
        key_layer: Block of the key, officially 14 of 32.
        similarity_layer: Block of subject, relation and answer, officially 5 of 32.
        max_tokens: Most tokens in one forward pass.

    Raises:
        RequestError: If a row has no token of a prompt or an answer.
        ConfigError: If a row has no subject.
    """
    require_rows(rows)
    if absent := [i for i, row in enumerate(rows) if row.subject < 0]:
        raise ConfigError(f"rows {listed(absent)} have no subject, by which edits are retrieved; mark it in encode")
    key, near = Site(key_layer, "mlp_out"), Site(similarity_layer, "mlp_out")
    keys, states = _outputs(lm, rows, key, max_tokens), _outputs(lm, rows, near, max_tokens)
    prompt = [row.target - 1 for row in rows]
    answer = [max(0, at + (len(row.ids) - row.target) // 2 - 1) for at, row in zip(prompt, rows, strict=True)]
    places = (prompt, [row.subject for row in rows], prompt, answer)
    parts = (
        torch.stack([state[at] for state, at in zip(source, chosen, strict=True)])
        for source, chosen in zip((keys, states, states, states), places, strict=True)
    )
    return Representations(*parts)


@torch.no_grad()
def _outputs(lm: LanguageModel, rows: Sequence[Row], site: Site, max_tokens: int) -> list[Float[Tensor, "time width"]]:
    """Return the output of a site at all tokens of each row."""
    outputs: dict[int, Tensor] = {}
    for group in plan([len(row.ids) for row in rows], max_tokens):
        ids = pad([rows[i].ids for i in group], lm.device)
        prompts = torch.tensor([rows[i].target for i in group])
        with prompt_lengths(lm.model, prompts), capture(lm, [site], stop=True) as states:
            lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        outputs |= {i: state[: len(rows[i].ids)] for i, state in zip(group, states[site], strict=True)}
    return [outputs[i] for i in range(len(rows))]


def similarities(
    states: Float[Tensor, "questions time width"],
    mask: Bool[Tensor, "questions time"],
    edits: Float[Tensor, "n width"],
) -> Float[Tensor, "questions n"]:
    """Compute how similar each question is to each edit: its largest cosine over the tokens of the bare question.

    Args:
        states: Output of the similarity block's down projection.
        mask: True at the tokens of the bare question; without any, it is like no edit (minus infinity).
        edits: A representation of each edit, of the same projection.
    """
    cosine = cosines(states.to(edits), edits)
    return cosine.masked_fill(~mask[..., None], -torch.inf).amax(1)


def require_edits(edits: Collection[int], count: int) -> tuple[int, ...]:
    """Return an oracle's edits in order, each once.

    Args:
        edits: Indices of the edits that a question needs.
        count: Number of edits that are stored.

    Raises:
        ConfigError: If one of them is not stored.
    """
    if absent := sorted(i for i in edits if not 0 <= i < count):
        raise ConfigError(f"edits {listed(absent)} are not stored; there are {count}, numbered from 0")
    return tuple(sorted(set(edits)))


def conflicts(changes: Float[Tensor, "n ..."]) -> Bool[Tensor, "*shape"]:
    """Return True for each element in which two of n changes have opposite signs; 0 agrees with both."""
    return (changes > 0).any(0) & (changes < 0).any(0)


def compose(changes: Float[Tensor, "n ..."]) -> Float[Tensor, "*shape"]:
    """Join the changes of several edits: the sum of each element in which no two signs disagree, 0 elsewhere.

    To the bit, the order of the edits does not matter. No edit at all changes nothing.

    Example:
        >>> compose(torch.tensor([[1.0, -2.0, 0.0], [2.0, 1.0, -3.0]]))
        tensor([ 3.,  0., -3.])
    """
    total = changes.sort(0).values.sum(0)
    return total.masked_fill(conflicts(changes), 0)


def outermost(edits: Collection[int], count: int) -> tuple[int, ...]:
    """Return the edits that the official code joins: those of smallest and largest index, whatever lies between.

    One index is both, so that its change is doubled, unless no other edit is stored; none raises there, and here
    nothing is joined.

    Args:
        edits: Indices of the edits of a question.
        count: Number of edits that are stored.
    """
    if not edits:
        return ()
    return (min(edits),) if count == 1 else (min(edits), max(edits))


def distinct(factors: Factors, edits: Collection[int]) -> tuple[int, ...]:
    """Return some edits in order, of equal ones the first: an edit that is stored twice acts once.

    Args:
        factors: Factors of all edits.
        edits: Indices of those of a question.
    """
    chosen = sorted(set(edits))
    return tuple(i for place, i in enumerate(chosen) if not any(_is_same(factors, i, j) for j in chosen[:place]))


def _is_same(factors: Factors, first: int, second: int) -> bool:
    tensors = (factors.direction, factors.output, factors.neurons)
    return all(torch.equal(each[first], each[second]) for each in tensors)


def composed_change(
    factors: Factors,
    edits: Collection[int],
    inputs: Float[Tensor, "*tokens d_in"],
    rule: Rule = "agreeing",
) -> Float[Tensor, "*tokens d_out"]:
    """Compute what some edits together add to the projection's output at each token.

    Args:
        factors: Factors of all edits.
        edits: Indices of those of a question; none adds nothing.
        inputs: The projection's inputs.
        rule: How changes are joined.

    Raises:
        ConfigError: If an edit is not stored, or ``rule`` names no rule.
    """
    require_choice("rule", rule, Rule)
    chosen: Sequence[int] = require_edits(edits, len(factors))
    chosen = outermost(chosen, len(factors)) if rule == "outermost" else distinct(factors, chosen)
    return compose(factors.part(chosen).changes(inputs))
