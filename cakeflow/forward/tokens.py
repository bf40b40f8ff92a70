"""Tokenisation: rows with the subject's last token and the target's first token marked by character offsets.

Positions come from the fast tokenizer's offset mapping, never from counting tokens of a prefix. Rows are ragged lists
that are padded on the right before a forward pass (``pad``), where causal attention cannot see the padding; the
tokenizer's own padding side does not matter.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from cakeflow.data.contexts import Contexts
from cakeflow.data.request import EditRequest
from cakeflow.data.text import join, separator
from cakeflow.errors import Fault, RequestError, listed
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
        offset: Tokens from the subject's last one to the one at which a fact is written.
    """

    ids: tuple[int, ...]
    subject: int
    target: int
    start: int = -1
    offset: int = 0

    @property
    def fact(self) -> int:
        """Index of the token at which a fact is written (ROME's ``fact_token``)."""
        return self.subject + self.offset


class Undo(NamedTuple):
    """Facts that are to be taken back: the number of their batch in the journal, and their places there."""

    batch: int
    places: tuple[int, ...]


class EditBatch:
    """The requests of one edit batch. A plain class: a Trainer takes dataclasses, tuples and dicts apart.

    Attributes:
        undo: The facts that are to be taken back, if the batch is one of the journal already; else None.

    Args:
        requests: n requests.
        numbers: Place of each request in its run; 0, 1, ... by default.
    """

    def __init__(self, requests: Sequence[EditRequest], numbers: Sequence[int] = ()) -> None:
        self.requests, self.numbers = tuple(requests), tuple(numbers or range(len(requests)))
        self.undo: Undo | None = None

    def __len__(self) -> int:
        return len(self.requests)

    def name(self, facts: Iterable[int]) -> str:
        """Some of the facts as error messages name them; of many, the first three.

        Args:
            facts: Their places in the batch.
        """
        places = list(facts)
        names = [f"request {self.numbers[i]} ({self.requests[i].text!r})" for i in places[:3]]
        return ", ".join(names) + (f" and {len(places) - 3} more" if len(places) > 3 else "")

    def part(self, facts: Sequence[int]) -> Self:
        """The batch of the facts at some places."""
        return type(self)([self.requests[i] for i in facts], [self.numbers[i] for i in facts])

    def split(self, size: int) -> Iterator[Self]:
        """Batches of at most ``size`` facts."""
        for start in range(0, len(self), size):
            yield self.part(range(start, min(start + size, len(self))))


class TextBatch(EditBatch):
    """Requests with their tokens: n entries, each with one key and one target value.

    Args:
        requests: n requests; one that is written at two tokens has two entries.
        rows: For each entry the prompt in some contexts, target included; the bare prompt first, if it is among them.
        essence: For each entry the prompt "{subject} is a".
        weights: For each entry the weight of each of its rows in the mean key; they sum to 1 for each key.
        numbers: Place of each request in its run.
    """

    def __init__(
        self,
        requests: Sequence[EditRequest],
        rows: Sequence[tuple[Row, ...]],
        essence: Sequence[Row],
        weights: Sequence[tuple[float, ...]],
        numbers: Sequence[int] = (),
    ) -> None:
        super().__init__(requests, numbers)
        self.rows, self.essence, self.weights = tuple(rows), tuple(essence), tuple(weights)

    def __repr__(self) -> str:
        return f"TextBatch({self.requests}, {self.rows}, {self.essence}, {self.weights})"

    def part(self, facts: Sequence[int]) -> Self:
        """The batch of the entries at some places."""
        parts = (self.requests, self.rows, self.essence, self.weights, self.numbers)
        return type(self)(*([each[i] for i in facts] for each in parts))  # type: ignore[arg-type]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """The entries of several batches as one."""
        names = ("requests", "rows", "essence", "weights", "numbers")
        return cls(*([each for part in parts for each in getattr(part, name)] for name in names))

    @property
    def row_entries(self) -> list[int]:
        """For each row of all entries, in order, the place of its entry."""
        return [i for i, rows in enumerate(self.rows) for _ in rows]

    def key_groups(self) -> list[int]:
        """For each entry the first one with the same key: the same tokens up to the one at which the fact is written.

        Such facts can only have one value, whatever their prompts say after it.
        """
        prefixes = [tuple(row.ids[: row.fact + 1] for row in rows) for rows in self.rows]
        return _first_places(prefixes)

    def value_groups(self) -> list[int]:
        """For each entry the first one with the same target value: the same key, or the same fact at the same token."""
        names = [(number, rows[0].offset) for number, rows in zip(self.numbers, self.rows, strict=True)]
        first = self.key_groups()
        for i, place in enumerate(_first_places(names)):  # a fact's entries bring together all facts with their keys
            low, high = sorted((_root(first, i), _root(first, place)))
            first[high] = low
        return [_root(first, i) for i in range(len(first))]


def _first_places(names: Iterable[Hashable]) -> list[int]:
    """Return for each name the first place of an equal one."""
    first: dict[Hashable, int] = {}
    return [first.setdefault(name, i) for i, name in enumerate(names)]


def _root(first: Sequence[int], place: int) -> int:
    """Return where the way from a place to an earlier one, and on from there, ends."""
    while first[place] != place:
        place = first[place]
    return place


class _Tokens(NamedTuple):
    """Tokens of a text, without the special ones that the tokenizer puts behind it: nothing goes on from there."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    special: list[int]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[_Tokens]:
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, return_attention_mask=False
    )
    rows = [_Tokens(list(e.ids), list(e.offsets), list(e.special_tokens_mask)) for e in encoded.encodings]
    for ids, offsets, special in rows:
        while len(ids) > 1 and special[-1]:
            del ids[-1], offsets[-1], special[-1]
    return rows


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Tokenise texts from which a model goes on: of the special tokens, only those at the front stay."""
    return [tuple(row.ids) for row in _tokens(tokenizer, texts)]


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
    rows: list[Row] = []
    marks = zip(subjects, targets, starts or [-1] * len(texts), strict=True)
    for text, tokens, (subject, target, start) in zip(texts, _tokens(tokenizer, texts), marks, strict=True):
        parts = _parts(tokenizer, text, target) if _is_shared(text, tokens, target) else None
        rows.append(_row(parts or tokens, subject, target, start))
    return rows


def _is_shared(text: str, tokens: _Tokens, at: int) -> bool:
    """Return True if a token has characters on both sides of a place, white space before it aside."""
    return any(start < at < end and text[start:at].strip() for start, end in tokens.offsets)


def _parts(tokenizer: PreTrainedTokenizerBase, text: str, at: int) -> _Tokens | None:
    """Tokenise a text in two parts: its first part as it stands alone, which is how a model meets a prompt.

    The second part stands behind a line break, where no tokenizer adds a space to it. None if that does not part them.
    """
    before, after = _tokens(tokenizer, [text[:at], "\n" + text[at:]])
    rest = [i for i, (start, end) in enumerate(after.offsets) if end > max(start, 1) and not after.special[i]]
    if not rest or after.offsets[rest[0]][0] != 1:
        return None
    before.ids.extend(after.ids[i] for i in rest)
    before.offsets.extend((after.offsets[i][0] + at - 1, after.offsets[i][1] + at - 1) for i in rest)
    before.special.extend(0 for _ in rest)
    return before


def _row(tokens: _Tokens, subject_end: int, target_start: int, subject_start: int) -> Row:
    ids, offsets, special = tokens
    inside = [i for i, (start, end) in enumerate(offsets) if start < subject_end and end > start and not special[i]]
    after = [i for i, (start, end) in enumerate(offsets) if end > max(start, target_start) and not special[i]]
    subject = [i for i in inside if 0 <= subject_start < offsets[i][1]]
    return Row(
        tuple(ids),
        subject=inside[-1] if inside else -1,
        target=after[0] if after else len(ids),
        start=subject[0] if subject else -1,
    )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    spaces: Sequence[bool | None] = (),
) -> list[Row]:
    """Tokenise prompts, each followed by a target; the rows have no subject.

    Args:
        tokenizer: A fast tokenizer.
        prompts: n prompts.
        targets: n targets.
        spaces: For each pair, whether a space stands between them; by default the texts decide (``join``).
    """
    pairs = zip(prompts, targets, spaces or [None] * len(prompts), strict=True)
    texts = [join(prompt, target, space) for prompt, target, space in pairs]
    return encode(tokenizer, texts, [0] * len(texts), [len(prompt) for prompt in prompts])


def encode_batch(lm: LanguageModel, requests: Sequence[EditRequest], contexts: Contexts, first: int = 0) -> TextBatch:
    """Tokenise the requests of one batch in every context.

    Args:
        lm: Model whose tokenizer is used.
        requests: n requests, checked.
        contexts: Templates around each prompt, the bare one first.
        first: Index of the first request in error messages.

    Raises:
        RequestError: If a target has no token of its own, a subject or target has one that stands for whatever the
            tokenizer does not know, or a text is longer than the model can read or has a token that it has not.
    """
    texts, subjects, targets, starts = [], [], [], []
    for request in requests:
        gap = separator(request.text, request.target_new, request.space)  # of the bare prompt, whatever the context
        for template, key in zip(contexts.templates, contexts.keys, strict=True):
            prompt = template.replace("{}", request.text)
            between = separator(prompt, request.target_new) if key else gap  # in a chat the answer begins a text
            texts.append(prompt + between + request.target_new)
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
    count = len(requests)
    return TextBatch(requests, rows, essence, [contexts.weights] * count, range(first, first + count))


def _check_rows(
    lm: LanguageModel, requests: Sequence[EditRequest], rows: tuple[tuple[Row, ...], ...], first: int
) -> None:
    faults: list[Fault] = []
    front = lm.front
    for index, (request, variants) in enumerate(zip(requests, rows, strict=True), first):
        problems = _problems(lm, request, variants, front)
        faults += [Fault(index, field, getattr(request, field), remedy) for field, remedy in problems]
    if faults:
        raise RequestError(faults)


def _problems(
    lm: LanguageModel, request: EditRequest, variants: tuple[Row, ...], front: tuple[int, ...]
) -> Iterator[tuple[str, str]]:
    """Yield the field and remedy of each problem that a model has with a request."""
    longest = max(len(row.ids) for row in variants)
    # a token may hold the subject's end and the target's beginning: no row can mark both then
    if any(row.target >= len(row.ids) or row.target <= row.subject for row in variants):
        yield "target_new", "has no token of its own after the prompt; give another target"
    if any(row.subject < 0 for row in variants):
        yield "subject", "the tokenizer gives it no token; write it otherwise"
    if longest > lm.longest:
        yield "prompt", f"longer than the model's {lm.longest} positions; shorten it"
    bare = variants[0]
    parts = {"subject": bare.ids[bare.start : bare.subject + 1], "target_new": bare.ids[bare.target :]}
    remedies = {
        field: unknown_tokens(lm, ids, getattr(request, field)) or unreadable_token(lm, ids)
        for field, ids in parts.items()
    }
    if not any(remedies.values()):
        remedies["prompt"] = next(filter(None, (unreadable_token(lm, row.ids, front) for row in variants)), "")
    yield from ((field, remedy) for field, remedy in remedies.items() if remedy)


def unknown_tokens(lm: LanguageModel, ids: Sequence[int], text: str) -> str:
    """Return a remedy if some tokens of a text stand for what the tokenizer does not know, else nothing."""
    tokenizer, unknown = lm.tokenizer, lm.tokenizer.unk_token_id
    if unknown not in ids or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return ""  # GPT-2 has one token for all roles, and knows every byte
    (alone,) = _tokens(tokenizer, [text])
    pieces = [text[slice(*alone.offsets[i])].strip() for i, token in enumerate(alone.ids) if token == unknown]
    return (
        f"the tokenizer does not know {listed([repr(piece) for piece in pieces or [text]])}, which becomes "
        f"{tokenizer.unk_token}; write it otherwise, or edit a model that knows it"
    )


def unreadable_token(lm: LanguageModel, ids: Sequence[int], front: Sequence[int] = ()) -> str:
    """Return a remedy if a text has a token beyond the embedding, or repeats the special ones at its front.

    Args:
        lm: The model.
        ids: Tokens of the text.
        front: Special tokens that the tokenizer puts in front (``LanguageModel.front``).
    """
    size, highest = len(lm.embedding), max(ids, default=0)
    if highest >= size:
        return (
            f"has the token {lm.tokenizer.convert_ids_to_tokens(highest)!r}, number {highest}, and the model's "
            f"embedding ends with {size - 1}: resize it (model.resize_token_embeddings), or leave the token out"
        )
    if front and len(ids) > len(front) and ids[len(front)] in front:
        return (
            f"begins with {lm.tokenizer.convert_ids_to_tokens(ids[len(front)])!r}, which the tokenizer puts in front "
            "by itself: leave it out, or the model reads it twice"
        )
    return ""


def require_readable(lm: LanguageModel, rows: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    """Check the tokens of texts (``unreadable_token``).

    Raises:
        RequestError: Naming every text that the model cannot read.
    """
    front = lm.front
    remedies = [unreadable_token(lm, ids, front) for ids in rows]
    if faults := [Fault(i, "prompt", texts[i], remedy) for i, remedy in enumerate(remedies) if remedy]:
        raise RequestError(faults)
