"""Everything that is written to a run folder, as types: the same classes write a file and read it back.

Files have format 2; ``format1.upgraded`` reads format 1 (cakeflow 0.1), which numbered weights by layer.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import AliasChoices, Field, JsonValue

from cakeflow.models.loading import RECORDED
from cakeflow.storage.typed import SHA256, Count, Json, Number, Schema, Share

FORMAT: Final = 2
"""Version of what is written to a run folder."""
LoadingOption = Annotated[str, Field(pattern=f"^({'|'.join([*RECORDED, 'commit'])})$")]
"""How a ledger may say that its model was loaded: whoever reads another's ledger gives trust and tokens anew."""


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

    number: Count
    kind: str
    time: str
    body: dict[str, JsonValue]
    previous: str
    hash: str = ""


class ModelBody(Schema):
    """The unedited model: hash and type of its weights, number of batches before this run, and format of the ledger."""

    fingerprint: str
    dtype: str
    earlier: Count = 0
    format: Literal[1, 2] = 1


class Circumstances(Schema):
    """User, versions of packages, number of threads, and the machine: system, processor, its vectors and the GPU."""

    who: str
    versions: dict[str, str]
    threads: Count
    machine: dict[str, str] = Field(default_factory=dict)


class Arithmetic(Schema):
    """What decides the last bits of a run's weights beside model, data and settings.

    Attributes:
        device: Type of the device.
        precision: The Trainer's precision.
        attention: The model's implementation of attention.
        products: PyTorch's precision of float32 matrix products, and the library if it is not PyTorch's choice.
        threads: Number of threads.
    """

    device: str
    precision: str
    attention: str
    products: str
    threads: Count


class RunBody(Circumstances):
    """The start of a run.

    Attributes:
        model: Name of the model, as the user wrote it.
        settings: Everything that decides the outcome, as text.
        edits: Number of requests in the run.
        batch_size: Number of edits in a batch; None for one batch.
        data: SHA-256 of all requests.
        arithmetic: How it is computed; None in format 1.
        format: Format of the entries that follow.
        loading: Options that the model was loaded with, such as its revision, and the hub's commit; never a token.
        method: The config that the method was built from, without the model; empty if Python built it of objects.
    """

    model: str
    settings: dict[str, Json]
    edits: Count
    batch_size: Count | None
    data: str
    arithmetic: Arithmetic | None = None
    format: Literal[1, 2] = 1
    loading: dict[LoadingOption, str] = Field(default_factory=dict)
    method: dict[str, Json] = Field(default_factory=dict)


class EvaluationBody(Schema):
    """Metrics at a stage (``before``, ``after``), and the number of edits before it."""

    stage: str
    edits: Count
    protocol: str
    metrics: dict[str, Number]


class TargetBody(Schema):
    """Result of the target search of one request at one layer: final loss, probability and steps."""

    layer: Count
    loss: Number
    probability: Number
    steps: Number


Reason = Literal["", "blocked", "arrival", "search", "interference"]
"""Why a fact did not take."""


class FactBody(Schema):
    """What became of one fact when its batch was edited.

    Attributes:
        taken: Whether every token of its target was the most likely one on its bare prompt.
        probability: Probability of its target there, the geometric mean over its tokens.
        arrived: Part of the searched change that arrived at its value site.
        walks: Number of walks over the layers that it took part in.
        reason: Why it did not take: ``blocked`` (a massive activation where it is written), ``arrival`` (too little of
            the searched change arrived), ``search`` (the search did not make the target likely), ``interference``
            (nothing of these: the other facts' changes reach the tokens behind it); empty if it took.
    """

    taken: bool
    probability: Number
    arrived: Number
    walks: Count
    reason: Reason = ""


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
        facts: What became of each request; empty where it was not measured.
        owners: For each row of keys, target values and their search the place of its request; empty where each request
            has one.
        numbers: Logged numbers of the batch.
        changes: The changes, in order.
        undone: SHA-256 of each request of an earlier batch that this one takes back.
        undoes: Number of that batch; None if there is none.
        replaced: SHA-256 of a request -> those of earlier batches' requests whose values gave way to its own.
        who: The user who took them back; empty otherwise, as the run says who edits.
        inputs: Name -> SHA-256 of everything that the batch was solved with beside requests and settings: second
            moments, corpus, contexts, policy.
    """

    batch: Count
    files: dict[str, str]
    hashes: list[str]
    requests: list[dict[str, Json]] = Field(default_factory=list)
    targets: list[TargetBody]
    facts: list[FactBody] = Field(default_factory=list)
    owners: list[Count] = Field(default_factory=list)
    numbers: dict[str, Number]
    changes: list[ChangeBody]
    undone: list[str] = Field(default_factory=list)
    undoes: Count | None = None
    replaced: dict[str, list[str]] = Field(default_factory=dict)
    who: str = ""
    inputs: dict[str, SHA256] = Field(default_factory=dict)


class RollbackBody(Circumstances):
    """Numbers of the batches that were rolled back, and SHA-256 of every place that changed by it."""

    batches: list[Count]
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
        contained: 1 if the free answer contains ``expected``, else 0; None without the protocols of free answers.
        judged: What a judge says of the free answer, from 0 to 1; None as for ``contained``.
        answer: The free answer, up to where the protocol cuts it; None without one.
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
    tokens: Share | None = None
    answered: Share | None = None
    contained: Share | None = None
    judged: Share | None = None
    answer: str | None = None

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
    space: bool | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Prompt, subject and new target: common to a request's evaluation and its edit in the ledger."""
        return self.prompt, self.subject, self.target_new


class EvaluatedRequest(RequestTexts):
    """The answers to all prompts of one request: a line of ``before.jsonl`` and ``after.jsonl``."""

    index: Count
    case_id: int | str | None = None
    prompts: list[PromptAnswer]
    generations: list[Generation] = Field(default_factory=list)

    def of_kind(self, kind: str) -> list[PromptAnswer]:
        """Return the prompts of a kind."""
        return [prompt for prompt in self.prompts if prompt.kind == kind]


class FreeAnswer(Schema):
    """A question to a model, and its free answers before and after a run: a line of ``answers.jsonl``.

    Attributes:
        topic: An edited ``fact``, a ``neighbor`` of one, or a ``familiar`` fact that the unedited model states.
        form: The prompt to be continued (``completion``), or as the user's turn (``chat``).
        prompt: The prompt.
        expected: Name that the answer should contain: the new target of a fact; of the others the unedited model's.
        request: Place of the fact in the run, also of a neighbor's.
        edited: Whether a neighbor is edited itself, so that its answer should change; it does not count.
        before: Answer before the run; a completion up to its first stop.
        after: Answer after the run; None until it was asked.
    """

    topic: Literal["fact", "neighbor", "familiar"]
    form: Literal["completion", "chat"]
    prompt: str
    expected: str
    request: Count | None = None
    edited: bool = False
    before: str = ""
    after: str | None = None


class ModelInfo(Schema):
    """The model of a run: its name, hash and type before the edits, and module paths."""

    source: str
    fingerprint_before: str = ""
    dtype: str = ""
    architecture: dict[str, str] = Field(default_factory=dict)


class MomentPoint(Schema):
    """A layer's second moment C when some of its tokens had been read.

    Attributes:
        tokens: Their number.
        change: Change of C since the point before over C, in Frobenius norms.
        null: Number of eigenvalues of C below ``threshold``.
    """

    tokens: Count
    change: Number
    threshold: Number
    null: Count


class RunInfo(Schema):
    """``run.json``: the model, everything that decides the outcome, and what was measured.

    Attributes:
        model: The model.
        settings: Everything that decided the outcome, sampled contexts and chosen layers included, as text.
        versions: Versions of the packages.
        metrics: Stage -> metric -> value.
        protocol: Protocol of the metrics; only numbers under the same one are comparable.
        edits: Number of facts edited in the run.
        timed: How many of them ``timings`` are of; fewer where the run was interrupted and went on.
        timings: Seconds per phase.
        peaks: Peak memory per phase beyond the model, in bytes.
        verdict: What became of the run, in a sentence; empty where the model was not asked freely.
        side_effects: Rules of the budget for side effects that the run broke.
        convergence: Layer -> how its second moment settled, where that is known.
    """

    model: ModelInfo
    settings: dict[str, Json]
    versions: dict[str, str]
    metrics: dict[str, dict[str, Number]] = Field(default_factory=dict)
    protocol: str = "?"
    edits: Count | None = None
    timed: Count | None = None
    timings: dict[str, Number] = Field(default_factory=dict)
    peaks: dict[str, Number] = Field(default_factory=dict)
    verdict: str = ""
    side_effects: list[str] = Field(default_factory=list)
    convergence: dict[str, list[MomentPoint]] = Field(default_factory=dict)
