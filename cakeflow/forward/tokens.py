"""Tokenisation: rows with the subject's last token and the target's first token marked by character offsets.

Positions come from the fast tokenizer's offset mapping, never from counting tokens of a prefix. Rows are ragged lists
that are padded on the right before a forward pass (``pad``), where causal attention cannot see the padding; the
tokenizer's own padding side does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest
from cakeflow.errors import Fault, RequestError
from cakeflow.models.language import LanguageModel

ESSENCE = "{} is a"
"""Neutral prompt on which a target value must not change the model's predictions (ROME 3.1, eq. 4)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A tokenised text.

    Attributes:
        ids: Token ids, special tokens at the front included.
        subject: Index of the subject's last token; -1 without a subject.
        target: Index of the first target token; ``len(ids)`` without a target.
        start: Index of the subject's first token; -1 unless ``encode`` received ``starts``.
    """

    ids: tuple[int, ...]
    subject: int
    target: int
    start: int = -1


class EditBatch:
    """The requests of one edit batch. A plain class: a Trainer takes dataclasses, tuples and dicts apart.

    Args:
        requests: n requests.
        first: Place of the first request in its run, for error messages.
    """

    def __init__(self, requests: Sequence[EditRequest], first: int = 0) -> None:
        self.requests, self.first = tuple(requests), first

    def __len__(self) -> int:
        return len(self.requests)

    def name(self, facts: Iterable[int]) -> str:
        """Some of the facts as error messages name them; of many, the first three.

        Args:
            facts: Their places in the batch.
        """
        places = list(facts)
        names = [f"request {self.first + i} ({self.requests[i].text!r})" for i in places[:3]]
        return ", ".join(names) + (f" and {len(places) - 3} more" if len(places) > 3 else "")

    def part(self, facts: slice) -> Self:
        """The batch of some of the facts."""
        return type(self)(self.requests[facts], self.first + (facts.start or 0))

    def split(self, size: int) -> Iterator[Self]:
        """Batches of at most ``size`` facts."""
        for start in range(0, len(self), size):
            yield self.part(slice(start, start + size))


class TextBatch(EditBatch):
    """The requests of one edit batch, tokenized.

    Args:
        requests: n requests.
        rows: For each request its prompt in every context, target included; the bare prompt first.
        essence: For each request the prompt "{subject} is a".
        weights: Weight of each context in the mean key; sums to 1.
        first: Place of the first request in its run.
    """

    def __init__(
        self,
        requests: Sequence[EditRequest],
        rows: tuple[tuple[Row, ...], ...],
        essence: tuple[Row, ...],
        weights: tuple[float, ...],
        first: int = 0,
    ) -> None:
        super().__init__(requests, first)
        self.rows, self.essence, self.weights = rows, essence, weights

    def __repr__(self) -> str:
        return f"TextBatch({self.requests}, {self.rows}, {self.essence}, {self.weights})"

    def part(self, facts: slice) -> Self:
        """The batch of some of the facts."""
        first = self.first + (facts.start or 0)
        return type(self)(self.requests[facts], self.rows[facts], self.essence[facts], self.weights, first)

    def key_groups(self) -> list[int]:
        """For each fact the first fact of the batch with the same key: the same tokens up to the end of the subject.

        Such facts can only have one value, whatever their prompts say after the subject.
        """
        first: dict[tuple[tuple[int, ...], ...], int] = {}
        prefixes = [tuple(row.ids[: row.subject + 1] for row in rows) for rows in self.rows]
        return [first.setdefault(prefix, i) for i, prefix in enumerate(prefixes)]


def join(prompt: str, target: str) -> str:
    """Join prompt and target, with a space between them unless one of them has white space there."""
    return prompt + ("" if prompt[-1].isspace() or target[0].isspace() else " ") + target


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    subjects: Sequence[int],
    targets: Sequence[int],
    starts: Sequence[int] = (),
) -> list[Row]:
    """Tokenise texts and mark subject and target in each.

    Args:
        tokenizer: A fast tokenizer; of the special tokens that it adds, only those at the front stay.
        texts: Complete texts.
        subjects: Index of the character after the subject in each text (0: no subject).
        targets: Index of the target's first character in each text (``len(text)``: no target).
        starts: Index of the subject's first character in each text, to mark its first token too.

    Returns:
        One row per text.
    """
    encoded = tokenizer(
        list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, return_attention_mask=False
    )
    marks = zip(subjects, targets, starts or [-1] * len(texts), strict=True)
    return [_row(encoded.encodings[i], *each) for i, each in enumerate(marks)]


def _row(encoding: object, subject_end: int, target_start: int, subject_start: int) -> Row:
    ids, offsets = list(encoding.ids), list(encoding.offsets)  # type: ignore[attr-defined]
    special = list(encoding.special_tokens_mask)  # type: ignore[attr-defined]
    while special and special[-1]:  # an end-of-text token after the target would not be the target's
        del ids[-1], offsets[-1], special[-1]
    inside = [i for i, (start, end) in enumerate(offsets) if start < subject_end and end > start and not special[i]]
    after = [i for i, (start, end) in enumerate(offsets) if end > max(start, target_start) and not special[i]]
    subject = [i for i in inside if 0 <= subject_start < offsets[i][1]]
    return Row(
        tuple(ids),
        subject=inside[-1] if inside else -1,
        target=after[0] if after else len(ids),
        start=subject[0] if subject else -1,
    )


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str]) -> list[Row]:
    """Tokenise prompts, each followed by a target; the rows have no subject."""
    texts = [join(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
    return encode(tokenizer, texts, [0] * len(texts), [len(prompt) for prompt in prompts])


def encode_batch(lm: LanguageModel, requests: Sequence[EditRequest], contexts: Contexts, first: int = 0) -> TextBatch:
    """Tokenise the requests of one batch in every context.

    Args:
        lm: Model whose tokenizer is used.
        requests: n requests, checked.
        contexts: Templates around each prompt, the bare one first.
        first: Index of the first request in error messages.

    Raises:
        RequestError: If a target has no token of its own, or a text is longer than the model can read.
    """
    texts, subjects, targets, starts = [], [], [], []
    for request in requests:
        for template in contexts.templates:
            prompt = template.replace("{}", request.text)
            texts.append(join(prompt, request.target_new))
            subjects.append(template.index("{}") + request.subject_end)
            targets.append(len(prompt))
            starts.append(template.index("{}") + request.prompt.index("{}"))
    flat = encode(lm.tokenizer, texts, subjects, targets, starts)
    width = len(contexts.templates)
    rows = tuple(tuple(flat[i * width : (i + 1) * width]) for i in range(len(requests)))
    _check_rows(lm, requests, rows, first)
    essence = encode(
        lm.tokenizer,
        [ESSENCE.replace("{}", request.subject) for request in requests],
        [len(request.subject) for request in requests],
        [len(ESSENCE) - 2 + len(request.subject) for request in requests],
    )
    return TextBatch(requests, rows, tuple(essence), contexts.weights, first)


def _check_rows(
    lm: LanguageModel, requests: Sequence[EditRequest], rows: tuple[tuple[Row, ...], ...], first: int
) -> None:
    faults: list[Fault] = []
    for index, (request, variants) in enumerate(zip(requests, rows, strict=True), first):
        longest = max(len(row.ids) for row in variants)
        no_subject = any(row.subject < 0 for row in variants)
        # a token may hold the subject's end and the target's beginning: no row can mark both then
        no_target = any(row.target >= len(row.ids) or row.target <= row.subject for row in variants)
        checks = (
            (no_target, "target_new", "has no token of its own after the prompt; give another target"),
            (no_subject, "subject", "the tokenizer gives it no token; write it otherwise"),
            (longest > lm.longest, "prompt", f"longer than the model's {lm.longest} positions; shorten it"),
        )
        faults += [Fault(index, field, getattr(request, field), remedy) for failed, field, remedy in checks if failed]
    if faults:
        raise RequestError(faults)
