"""Everything that is written to a run folder, as types: the same classes write a file and read it back.

Unknown fields are refused. Files have format 2; ``upgraded`` reads format 1 (cakeflow 0.1), which numbered weights by
layer.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    ValidationError,
)

from cakeflow.errors import EditError

FORMAT: Final = 2
"""Version of what is written to a run folder."""


def plain(value: Any) -> Any:
    """Return data as JSON has it: texts as names, lists for tuples, None for numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


Json = Annotated[JsonValue, BeforeValidator(plain)]
"""Any JSON value."""
Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if plain(value) is None else value),
    PlainSerializer(plain, when_used="json"),
]
"""A number; one that is not finite is null in the file, because JSON has none."""
SHA256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
S = TypeVar("S", bound="Schema")


class Schema(BaseModel):
    """Base of everything that is written: strict types, no unknown fields, immutable."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; optional fields that are not set are left out."""
        return self.model_dump(mode="json", exclude_unset=True)


def read_as(kind: type[S], data: object, where: str, error: type[EditError], remedy: str) -> S:
    """Return data from a file as one of our types.

    Args:
        kind: The type.
        data: Parsed JSON.
        where: File and line of the data, for the message.
        error: Type of the error to raise.
        remedy: Advice at the end of the message.

    Raises:
        EditError: ``error``, naming field, value and the expected type.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as invalid:
        raise error(f"{where}, {first_fault(invalid)}; {remedy}") from invalid


def first_fault(invalid: ValidationError) -> str:
    """Return the first fault in words: field, value and the expected type."""
    first = invalid.errors(include_url=False, include_context=False)[0]
    field = ".".join(map(str, first["loc"])) or "content"
    value = "" if first["type"] == "missing" else f" = {reprlib.repr(first['input'])}"
    return f"{field}{value}: {first['msg']}"


def parse_as(kind: type[S], text: str | bytes, where: str, error: type[EditError], remedy: str) -> S:
    """Return JSON text as one of our types; arguments and errors as for ``read_as``."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as invalid:
        raise error(f"{where}: {invalid}; {remedy}") from invalid
    return read_as(kind, data, where, error, remedy)


# ---- the ledger: one entry per line, its body by kind ----


class Line(Schema):
    """A line of the ledger, its body unparsed.

    Attributes:
        number: Place in the ledger, from 0.
        kind: A key of ``BODIES``.
        time: Time of writing (UTC, ISO 8601).
        body: The body as it stands in the file, over which the hash is taken.
        previous: Hash of the line before; empty in the first one.
        hash: SHA-256 of this line without its hash.
    """

    number: int
    kind: str
    time: str
    body: dict[str, JsonValue]
    previous: str
    hash: str = ""


class ModelBody(Schema):
    """The unedited model: hash and type of its weights, and the number of batches before this run."""

    fingerprint: str
    dtype: str
    earlier: int = 0


class Circumstances(Schema):
    """User and machine, versions of packages, and number of threads; they may differ when a run is resumed."""

    who: str
    versions: dict[str, str]
    threads: int


class RunBody(Circumstances):
    """The start of a run.

    Attributes:
        model: Name of the model, as the user wrote it.
        settings: Everything that decides the outcome, as text.
        edits: Number of requests in the run.
        batch_size: Number of edits in a batch; None for one batch.
        data: SHA-256 of all requests.
        format: Format of the entries that follow.
    """

    model: str
    settings: dict[str, Json]
    edits: int
    batch_size: int | None
    data: str
    format: Literal[1, 2] = 1


class EvaluationBody(Schema):
    """Metrics at a stage (``before``, ``after``), and the number of edits before it."""

    stage: str
    edits: int
    protocol: str
    metrics: dict[str, Number]


class TargetBody(Schema):
    """Result of the target search of one request at one layer: final loss, probability and steps."""

    layer: int
    loss: Number
    probability: Number
    steps: Number


class ChangeBody(Schema):
    """One change of a batch.

    Attributes:
        place: Name of the parameter or module that was changed.
        kind: Class of the change.
        numbers: Logged numbers of the change.
        before: SHA-256 of the parameter or module before the batch.
        after: SHA-256 of the parameter or module after the batch.
        prefix: Prefix of the names of its tensors in the batch's file; empty for the place itself.
    """

    place: str
    kind: str
    numbers: dict[str, Number]
    before: str
    after: str
    prefix: str = ""


class BatchBody(Schema):
    """One edit batch.

    Attributes:
        batch: Number of the batch.
        files: File name -> SHA-256.
        hashes: SHA-256 of each request.
        requests: The requests; empty if their texts are not stored.
        targets: Results of the target search, per value site and request.
        numbers: Logged numbers of the batch.
        changes: The changes, in order.
    """

    batch: int
    files: dict[str, str]
    hashes: list[str]
    requests: list[dict[str, Json]] = []
    targets: list[TargetBody]
    numbers: dict[str, Number]
    changes: list[ChangeBody]


class RollbackBody(Circumstances):
    """Numbers of the batches that were rolled back, and SHA-256 of every place that changed by it."""

    batches: list[int]
    places: dict[str, str]


class PolicyBody(Schema):
    """A decision of a policy: its outcome, the rules that were broken, and the hash of the rules."""

    outcome: str
    faults: list[str]
    policy: str


class EndBody(Schema):
    """The end of a complete run, and its files: name -> SHA-256."""

    files: dict[str, str]


BODIES: dict[str, type[Schema]] = {
    "model": ModelBody,
    "run": RunBody,
    "evaluation": EvaluationBody,
    "batch": BatchBody,
    "rollback": RollbackBody,
    "policy": PolicyBody,
    "end": EndBody,
}
"""Kind of an entry -> its body."""


def upgraded(kind: str, body: Mapping[str, Any], place: Callable[[int], str]) -> dict[str, Any]:
    """Return a body in format 2; one of format 2 as it is.

    Args:
        kind: Kind of the entry.
        body: The body as it stands in the ledger.
        place: Names the weight of a layer.
    """
    if kind not in ("batch", "rollback") or "layers" not in body:
        return dict(body)
    rest = {name: value for name, value in body.items() if name not in ("layers", "order")}
    layers: dict[str, Any] = body["layers"]
    if kind == "rollback":
        return {**rest, "places": {place(int(layer)): hashed for layer, hashed in layers.items()}}
    changes = [
        {**layers[str(layer)], "place": place(int(layer)), "kind": "WeightChange", "prefix": str(layer)}
        for layer in body["order"]
    ]
    return {**rest, "changes": changes}


# ---- the other files of a run ----


class PromptAnswer(Schema):
    """The model's answer to one prompt.

    Attributes:
        kind: ``rewrite``, ``paraphrase`` or ``neighborhood``.
        prompt: Text of the prompt.
        expected: The continuation that is right after the edit.
        rival: The continuation that was right before, if the request names one; for a neighborhood, the new target.
        expected_logprob: Mean log-probability per token of ``expected``, natural logarithm.
        rival_logprob: Mean log-probability per token of ``rival``.
        correct: True if every token of ``expected`` is the most likely one.
        tokens: Share of the tokens of ``expected`` that are.
        answered: 1 if the free answer is ``expected``, else 0; None without free answers.
    """

    kind: str
    prompt: str
    expected: str = Field(validation_alias=AliasChoices("expected", "wanted"))
    rival: str | None = None
    expected_logprob: float | None = Field(
        default=None, validation_alias=AliasChoices("expected_logprob", "wanted_logprob")
    )
    rival_logprob: float | None = None
    correct: bool
    tokens: float | None = None
    answered: float | None = None

    @property
    def success(self) -> bool | None:
        """True if ``expected`` is more likely than ``rival``, False if it is not a number, None without a rival."""
        if self.rival_logprob is None:
            return None
        return self.expected_logprob is not None and self.expected_logprob > self.rival_logprob


class Generation(Schema):
    """A free text after a prompt, the prompt left out."""

    prompt: str
    text: str


class RequestTexts(Schema):
    """The texts of a request in a run folder."""

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    relation: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Prompt, subject and new target: common to a request's evaluation and its edit in the ledger."""
        return self.prompt, self.subject, self.target_new


class EvaluatedRequest(RequestTexts):
    """The answers to all prompts of one request: a line of ``before.jsonl`` and ``after.jsonl``."""

    index: int
    case_id: int | str | None = None
    prompts: list[PromptAnswer]
    generations: list[Generation] = []

    def of_kind(self, kind: str) -> list[PromptAnswer]:
        """Return the prompts of a kind."""
        return [prompt for prompt in self.prompts if prompt.kind == kind]


class ModelInfo(Schema):
    """The model of a run: its name, hash and type before the edits, and module paths."""

    source: str
    fingerprint_before: str = ""
    dtype: str = ""
    architecture: dict[str, str] = {}


class RunInfo(Schema):
    """``run.json``: the model, everything that decides the outcome, and what was measured.

    Attributes:
        model: The model.
        settings: Everything that decided the outcome, sampled contexts and chosen layers included, as text.
        versions: Versions of the packages.
        metrics: Stage -> metric -> value.
        protocol: Protocol of the metrics; only numbers under the same one are comparable.
        edits: Number of facts edited in the run.
        timings: Seconds per phase.
        peaks: Peak memory per phase beyond the model, in bytes.
    """

    model: ModelInfo
    settings: dict[str, Json]
    versions: dict[str, str]
    metrics: dict[str, dict[str, Number]] = {}
    protocol: str = "?"
    edits: int | None = None
    timings: dict[str, Number] = {}
    peaks: dict[str, Number] = {}
