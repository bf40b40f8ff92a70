"""Retrieval of edits by the question, composition of their changes, and answers under a composed change.

A3E (NeurIPS 2025; official code e2173ac, ``tuners/melo.py``) and its paper's rule. Which edits a question needs is
decided by the cosine of its tokens with the stored subjects; an oracle names them without looking at any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cakeflow.errors import ConfigError, listed, require_choice
from cakeflow.forward import Row, pad, plan
from cakeflow.models import LanguageModel, Site, capture, inject, logits_at, start_at
from cakeflow_sidememory.factors import Factors, cosines, require_rows

Part = Literal["subject", "relation", "answer"]
"""A representation that a question can be compared with."""
Rule = Literal["agreeing", "outermost"]
"""Changes are joined by ``agreeing``: all edits, elements in which two signs disagree are 0 (the paper). Or by
``outermost``, as the official code does it: the edits of smallest and largest index alone, one index taken twice."""


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

    @classmethod
    def join(cls, parts: Sequence[Representations]) -> Representations:
        """The representations of several groups of edits, one after the other."""
        names = ("key", "subject", "relation", "answer")
        return cls(*(torch.cat([getattr(each, name) for each in parts]) for name in names))


@dataclass(frozen=True)
class Retrieval:
    """The rule by which a question retrieves edits.

    Attributes:
        threshold: An edit has to be more similar than this.
        top: And among so many of the most similar ones; equal ones are taken by index.
        part: The representation that the question's tokens are compared with.

    Raises:
        ConfigError: If a setting is out of its range.
    """

    threshold: float = 0.5
    top: int = 4
    part: Part = "subject"

    def __post_init__(self) -> None:
        require_choice("Retrieval.part", self.part, Part)
        if not (-1 <= self.threshold <= 1 and self.top > 0):
            raise ConfigError(
                f"Retrieval: threshold={self.threshold}, top={self.top}: threshold is a cosine, from -1 to 1, and top "
                "must be at least 1"
            )

    def choose(self, similarity: Float[Tensor, " n"]) -> tuple[int, ...]:
        """Return the edits that a question retrieves, by index; none is an answer too.

        Args:
            similarity: Similarity of the question to each of the n edits.

        Raises:
            ConfigError: If there are fewer edits than ``top``.
        """
        if len(similarity) < self.top:
            raise ConfigError(
                f"top={self.top} edits cannot be retrieved, as {len(similarity)} are stored; edit more facts, or "
                "lower top"
            )
        order = similarity.argsort(descending=True, stable=True)[: self.top].tolist()
        return tuple(sorted(i for i in order if similarity[i] > self.threshold))


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
        with capture(lm, [site], stop=True) as states:
            lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        outputs |= {i: state[: len(rows[i].ids)] for i, state in zip(group, states[site], strict=True)}
    return [outputs[i] for i in range(len(rows))]


def similarities(
    lm: LanguageModel,
    questions: Sequence[Row],
    edits: Representations,
    similarity_layer: int,
    part: Part = "subject",
    max_tokens: int = 8192,
) -> Float[Tensor, "questions n"]:
    """Compute how similar each question is to each edit: its largest cosine over the tokens of the bare question.

    Args:
        lm: The unedited model.
        questions: Rows whose prompt is the question; a target is left out.
        edits: The stored representations.
        similarity_layer: Block that they were read in.
        part: The representation to compare with.
        max_tokens: Most tokens in one forward pass.
    """
    bare = [Row(row.ids[: row.target], row.subject, row.target) for row in questions]
    stored = getattr(edits, part)
    states = _outputs(lm, bare, Site(similarity_layer, "mlp_out"), max_tokens)
    return torch.stack([cosines(state, stored.to(state)).amax(0) for state in states])


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
    lm: LanguageModel,
    question: Sequence[int],
    site: Site,
    change: Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d_out"]],
    tokens: int = 15,
    commas: Collection[int] = (),
) -> tuple[list[int], Float[Tensor, "tokens vocabulary"]]:
    """Answer a question greedily, with a change at its last token and at every token that is written.

    The rest of the question is read unchanged. Each token takes a pass up to the projection and one from its block on.

    Args:
        lm: The model; not touched.
        question: Tokens of the question.
        site: The projection.
        change: What is added to the projection's output, given its inputs (``composed_change``).
        tokens: Number of tokens to write; fewer, if the text ends.
        commas: Tokens behind which written ones are less likely (``less_repeated``); none by default.

    Returns:
        The tokens, and the logits from which each was taken, before that rule.

    Raises:
        ConfigError: If the question has no token.
    """
    if not question:
        raise ConfigError("the question has no token, so that nothing can follow it; ask with a text")
    written: list[int] = []
    logits: list[Tensor] = []
    end = lm.tokenizer.eos_token_id
    while len(written) < tokens and (not written or written[-1] != end):
        logits.append(_next_logits(lm, [*question, *written], len(question) - 1, site, change))
        written.append(int(less_repeated(logits[-1], written, commas).argmax()))
    return written, torch.stack(logits)


def _next_logits(
    lm: LanguageModel, ids: Sequence[int], start: int, site: Site, change: Callable[[Tensor], Tensor]
) -> Float[Tensor, " vocabulary"]:
    """Compute the logits behind a text whose tokens from ``start`` on are changed."""
    text = torch.tensor([ids], device=lm.device)
    inputs = {"input_ids": text, "attention_mask": torch.ones_like(text), "use_cache": False}
    below = Site(max(site.layer - 1, 0))
    with capture(lm, [below]) as states, capture(lm, [site], side="in", stop=True) as reads:
        lm(**inputs)
    at = torch.arange(start, len(ids), device=lm.device)
    row = torch.zeros_like(at)
    delta = change(reads[site][0, start:])
    with (
        start_at(lm, site.layer, states[below]),
        inject(lm, site, delta, at, row),
        logits_at(lm, row[-1:], at[-1:]),
    ):
        logits: Tensor = lm(**inputs).logits[0, 0]
    return logits
