"""The outcome of a run as a reader sees it: free answers about edited facts, their neighbors and familiar facts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any

from cakeflow.data.builtin import builtin_facts
from cakeflow.data.request import EditRequest
from cakeflow.data.text import is_over, plain, states, until_any_stop, until_stop
from cakeflow.errors import ConfigError, Fault, RequestError, has_surrogate, listed, require_count
from cakeflow.forward.generation import continuations
from cakeflow.forward.tokens import encode_texts
from cakeflow.journal.schema import FreeAnswer
from cakeflow.metrics.text import AnswerRate
from cakeflow.models.language import LanguageModel
from cakeflow.ranks import spread
from cakeflow.storage.cache import cache_folder, content_key
from cakeflow.storage.typed import parse_lines, write_lines
from cakeflow.tracing.facts import first_name

TOKENS = 12
"""Most tokens of a completion; an answer in a chat, which often repeats the question, has twice as many."""
POOL, CHUNK, SPARE = 160, 32, 8
"""Built-in facts to try for familiar ones, how many at a time, and how many to find beyond those that are needed."""
METRICS = {
    ("fact", "completion"): "learned",
    ("fact", "chat"): "learned_chat",
    ("familiar", "completion"): "familiar",
    ("familiar", "chat"): "familiar_chat",
    ("neighbor", "completion"): "neighbors",
}
"""Topic and form -> name of the metric: share of the answers that contain what is expected."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        answers: Every question with its answers before and after.
        reasons: Place of a fact that did not take -> reason, as its batch noted it.
        side_effects: Rules of the budget that the run broke.
        condition: What the model was asked with (``Questions.condition``).
    """

    answers: Sequence[FreeAnswer]
    reasons: Mapping[int, str] = field(default_factory=dict)
    side_effects: Sequence[str] = ()
    condition: str = ""

    def of(self, topic: str, form: str | None = None) -> list[FreeAnswer]:
        """Return the answers about a topic that count, in one form or in all."""
        return [each for each in self.answers if each.topic == topic and form in (None, each.form) and not each.edited]

    @property
    def failed(self) -> list[FreeAnswer]:
        """The facts whose completion does not state the new target."""
        return [each for each in self.of("fact", "completion") if not is_good(each)]

    @property
    def changed(self) -> list[FreeAnswer]:
        """The other answers that the model gave before, as it should, and does not give any more."""
        others = [*self.of("neighbor"), *self.of("familiar")]
        return [each for each in others if states(each.before, each.expected) and not is_good(each)]

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per question, with whether the answer is as expected: ``pandas.DataFrame(outcome.rows())``."""
        return [{**answer.model_dump(), "good": is_good(answer)} for answer in self.answers]

    @property
    def has_chats(self) -> bool:
        """True if questions were asked in a chat too."""
        return any(each.form == "chat" for each in self.answers)

    @property
    def is_clean(self) -> bool:
        """True if every fact was learned and no rule of the budget was broken."""
        return not (self.failed or self.side_effects)

    @property
    def verdict(self) -> str:
        """What became of the run, in one line; empty where nothing was asked."""
        if not self.answers:
            return ""
        facts, chats = self.of("fact", "completion"), self.of("fact", "chat")
        others = len(self.of("neighbor")) + len(self.of("familiar"))
        chat = f" ({sum(map(is_good, chats))} of {len(chats)} as a chat question)" if chats else ""
        learned = f"answered with {self.condition}, not" if self.condition else ""
        parts = [f"{len(facts) - len(self.failed)} of {len(facts)} facts {learned} learned{chat}".replace("  ", " ")]
        if self.failed:
            parts.append(f"not learned: {listed([self._why(each) for each in self.failed], 5)}")
        if others:
            names = [f"{each.prompt!r} ({_change(each.before, each.after or '')})" for each in self.changed]
            parts.append(f"{len(names)} of {others} other answers changed" + (f": {listed(names, 3)}" if names else ""))
        return "; ".join([*parts, *self.side_effects])

    def _why(self, answer: FreeAnswer) -> str:
        reason = self.reasons.get(answer.request or 0)
        return f"{answer.prompt!r} ({f'{reason}, ' if reason else ''}answers {_short(answer.after or '')!r})"


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 40 else f"{words[:37]}..."


def _change(before: str, after: str) -> str:
    """Return two answers beside each other, from where they part if they begin with the same words.

    Example:
        >>> _change("It is a mammal of the sea", "It is a mammal of the land")
        '... sea -> ... land'
    """
    old, new = before.split(), after.split()
    alike = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
    sign = "... " if alike else ""
    return f"{sign}{_short(' '.join(old[alike:]))} -> {sign}{_short(' '.join(new[alike:]))}"


def is_good(answer: FreeAnswer) -> bool:
    """True if the answer after the run contains what is expected."""
    return answer.after is not None and states(answer.after, answer.expected)


def by_prompt(answers: Sequence[FreeAnswer]) -> dict[str, dict[str, FreeAnswer]]:
    """Return the answers to each prompt, by their form."""
    prompts: dict[str, dict[str, FreeAnswer]] = {}
    for answer in answers:
        prompts.setdefault(answer.prompt, {})[answer.form] = answer
    return prompts


def fact_questions(requests: Sequence[EditRequest], forms: Iterable[Any]) -> list[FreeAnswer]:
    """Return a question for every fact in every form."""
    return [
        FreeAnswer(topic="fact", form=form, prompt=request.text, expected=request.target_new, request=place)
        for form in forms
        for place, request in enumerate(requests)
    ]


def neighbor_questions(requests: Sequence[EditRequest], limit: int) -> list[FreeAnswer]:
    """Return questions about neighbors, the first of every fact, then the second, up to ``limit`` that count."""
    edited = {request.text for request in requests}
    columns = ([(i, probe) for probe in each.probes if probe.kind == "neighborhood"] for i, each in enumerate(requests))
    pairs = {pair[1].prompt: pair for row in zip_longest(*columns) for pair in row if pair is not None}
    questions: list[FreeAnswer] = []
    for prompt, (place, probe) in pairs.items():
        if sum(not each.edited for each in questions) == limit:
            break
        name = probe.expected or requests[place].target_true or ""
        question = FreeAnswer(topic="neighbor", form="completion", prompt=prompt, expected=name, request=place)
        questions.append(question.model_copy(update={"edited": prompt in edited}))
    return questions


def ask(
    lm: LanguageModel,
    questions: Sequence[FreeAnswer],
    max_bytes: float | None = None,
    question: Callable[[str], str] = str,
) -> list[str]:
    """Return the model's free greedy answer to every question; those of one form and length are a part for a rank.

    Args:
        lm: The model.
        questions: The questions.
        max_bytes: Most bytes beyond the model.
        question: Function that returns a prompt as the model gets it.

    Raises:
        ConfigError: If a question is a chat, and the tokenizer has no chat template.
    """
    names = encode_texts(lm.tokenizer, [question.expected for question in questions])
    lengths = [_length(question, name) for question, name in zip(questions, names, strict=True)]
    kinds = [(question.form, length) for question, length in zip(questions, lengths, strict=True)]

    def run(kind: tuple[str, int]) -> dict[int, str]:
        part = [place for place, each in enumerate(kinds) if each == kind]
        prompts = [question(questions[place].prompt) for place in part]
        form, length = kind
        return dict(zip(part, free_answers(lm, prompts, length, form == "chat", max_bytes), strict=True))

    answers = {place: text for each in spread([*dict.fromkeys(kinds)], run) for place, text in each.items()}
    return [answers[place] for place in range(len(questions))]


def free_answers(
    lm: LanguageModel,
    prompts: Sequence[str],
    tokens: int,
    chat: bool = False,
    max_bytes: float | None = None,
    cut: Callable[[str], str] | None = None,
) -> list[str]:
    """Return the model's greedy answer to every prompt.

    Args:
        lm: The model.
        prompts: Texts to be continued, or what the user says in a chat.
        tokens: Most tokens of an answer.
        chat: Whether to ask in a chat; else an answer ends where a reader would end it (``until_stop``).
        max_bytes: Most bytes beyond the model.
        cut: Function that cuts answers, those in a chat too.

    Raises:
        ConfigError: If it is to be a chat, and the tokenizer has no chat template; if ``tokens`` is no whole number
            from 1 on.
        RequestError: Naming every prompt that is no valid text, or longer than the model.
    """
    require_count("tokens", tokens, 1)
    faults = [each for each in enumerate(prompts) if not isinstance(each[1], str) or has_surrogate(each[1])]
    if faults:
        raise RequestError([Fault(place, "prompt", prompt, "give a valid Unicode text") for place, prompt in faults])
    texts = [lm.user_turn(prompt) for prompt in prompts] if chat else list(prompts)
    lengths = map(len, encode_texts(lm.tokenizer, texts))
    remedy = f"shorten it: with the first token of an answer it is longer than the model's {lm.longest} positions"
    if longer := [place for place, length in enumerate(lengths) if length >= lm.longest]:
        raise RequestError([Fault(place, "prompt", prompts[place], remedy) for place in longer])
    cut = cut or (str if chat else until_stop)
    further: dict[str, Any] = {"ends": partial(is_over, cut=cut)} if cut in (until_stop, until_any_stop) else {}
    return list(map(cut, continuations(lm, texts, tokens, max_bytes=max_bytes, **further)))


def _length(question: FreeAnswer, name: Sequence[int]) -> int:
    """Return how many tokens an answer may have; it depends on nothing but the question."""
    return (2 if question.form == "chat" else 1) * max(TOKENS, min(len(name) + 2, 4 * TOKENS))


def with_own_answers(questions: Sequence[FreeAnswer], answers: Sequence[str]) -> Iterator[FreeAnswer]:
    """Yield questions with the unedited model's answers; what is not a fact expects the answer that this model gives.

    That is the true one where the model states it, else the first name or words of its answer; a question without an
    answer is left out.
    """
    for question, answer in zip(questions, answers, strict=True):
        names = [question.expected]
        if question.topic == "neighbor":
            names += [first_name(answer), " ".join(plain(answer).split()[:3])]
            names = [name for name in names if name and states(answer, name)]
        for name in names[:1]:
            yield question.model_copy(update={"expected": name, "before": answer})


def rates(answers: Sequence[FreeAnswer], stage: str) -> dict[str, float]:
    """Return the metrics of a stage, ``before`` or ``after``, by name; none without answers."""
    values = {}
    for name, chosen in by_metric(answers).items():
        metric = AnswerRate(sync_on_compute=False)
        metric.update([getattr(each, stage) or "" for each in chosen], [each.expected for each in chosen])
        values[name] = float(metric.compute())
    return values


def by_metric(answers: Sequence[FreeAnswer]) -> dict[str, list[FreeAnswer]]:
    """Return the answers that count for each metric; metrics without any are left out."""
    groups: dict[str, list[FreeAnswer]] = {}
    for answer in answers:
        if not answer.edited and (name := METRICS.get((answer.topic, answer.form))):
            groups.setdefault(name, []).append(answer)
    return groups


def familiar_facts(
    lm: LanguageModel,
    fingerprint: str,
    forms: Sequence[Any],
    limit: int,
    leave_out: Iterable[str] = (),
    max_bytes: float | None = None,
) -> list[FreeAnswer]:
    """Return built-in facts that the unedited model states, in each form; found once per model, and cached.

    Args:
        lm: The unedited model.
        fingerprint: Its hash.
        forms: Forms of the questions.
        limit: Most facts in each form.
        leave_out: Subjects that are edited.
        max_bytes: Most bytes beyond the model.
    """
    path = cache_folder() / "familiar" / f"{content_key('familiar', 1, fingerprint, list(forms), limit)[:16]}.jsonl"
    pool = _cached(path)
    if pool is None:
        pool = list(_stated(lm, forms, limit + SPARE, max_bytes))
        with suppress(OSError):  # a cache that cannot be written costs these seconds again
            write_lines(path, pool)
    names = [plain(name) for name in leave_out]
    free = [each for each in pool if not any(states(each.prompt, name) for name in names)]
    return [each for form in forms for each in [each for each in free if each.form == form][:limit]]


def _cached(path: Any) -> list[FreeAnswer] | None:
    """Return the answers in a file of the cache; None if there is none, or it is damaged: it costs seconds only."""
    try:
        return parse_lines(FreeAnswer, path.read_text(encoding="utf-8"), path, ConfigError, "")
    except (OSError, UnicodeDecodeError, ConfigError):
        return None


def _stated(lm: LanguageModel, forms: Sequence[Any], enough: int, max_bytes: float | None) -> Iterator[FreeAnswer]:
    """Yield facts that the model states, until there are enough of each form or a whole chunk has none."""
    facts = builtin_facts()
    pool = random.Random(0).sample(facts, POOL)
    count = dict.fromkeys(forms, 0)
    for start in range(0, POOL, CHUNK):
        short = [form for form in forms if count[form] < enough]
        questions = [
            FreeAnswer(topic="familiar", form=form, prompt=fact.text, expected=fact.target_true or "")
            for form in short
            for fact in pool[start : start + CHUNK]
        ]
        answers = zip(questions, ask(lm, questions, max_bytes), strict=True)
        good = [each.model_copy(update={"before": text}) for each, text in answers if states(text, each.expected)]
        yield from good
        for each in good:
            count[each.form] += 1
        if not good:
            return
