"""Policies for the edits of a model: rules for what may be edited, and the record of what they decided."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import regex
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cakeflow.data.normal_forms import normal_forms, pattern_forms
from cakeflow.data.request import EditRequest
from cakeflow.data.schemas import parse_requests
from cakeflow.errors import ConfigError, LedgerError, PolicyError, RequestError, ResumeError, with_faults
from cakeflow.journal.ledger import Entry, bodies
from cakeflow.journal.schema import BatchBody, EvaluationBody, PolicyBody, RollbackBody
from cakeflow.journal.steps import hashes_on_record, request_hash
from cakeflow.storage.cache import content_key
from cakeflow.storage.typed import SHA256, first_fault
from cakeflow.storage.yaml_text import read_yaml

if TYPE_CHECKING:
    from cakeflow.journal.journal import Journal

log = logging.getLogger(__name__)
IN_FORCE, HELD, BROKEN, REFUSED = "in force", "held", "broken", "refused"
"""Outcomes on record: a run began under the policy; it was judged and keeps it; it broke it; it was not allowed."""
SECONDS = 0.4
"""Processor time in which a pattern must be decided for all texts of a request."""
DENIED, UNDECIDED = "denied", f"not decided within {SECONDS} s (shorten it, or simplify the pattern)"
FLAGS = regex.IGNORECASE | regex.FULLCASE


def _pattern(text: str) -> str:
    try:
        regex.compile(text, FLAGS)
    except regex.error as error:
        raise ValueError(f"no regular expression: {error}") from error
    return text


Texts = Annotated[tuple[str, ...], Field(strict=False)]
"""A tuple of texts; YAML gives a list."""
Hashes = Annotated[tuple[SHA256, ...], Field(strict=False)]
Patterns = Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], Field(strict=False)]
Bounds = dict[str, Annotated[float, Field(ge=-math.inf)]]
"""Metric -> bound; nan is refused, because every metric would pass it."""


@dataclass(frozen=True)
class Refusal:
    """A reason why facts may not be edited.

    Attributes:
        reason: The reason, with the text that it is about.
        discreet: The same without texts of requests or rules.
    """

    reason: str
    discreet: str

    def __str__(self) -> str:
        return self.reason


class Policy(BaseModel):
    """Rules for the edits of a run. CAKE's authors ask for such guards around any model editor (ethics statement).

    Attributes:
        models: Fingerprints of the models that may be edited; with ``model_names`` empty too, any model may.
        model_names: Names of further models that may be edited. Anybody can give a model a name.
        max_edits: Largest number of facts in a run.
        denied_subjects: Regular expressions. A fact may not be edited if one matches in its subject, its prompt or its
            targets, in any of their normal forms (``data.normal_forms``), or cannot be decided within ``SECONDS``.
        minimum: Metric -> its least value after the edits: ``efficacy`` and so on, at most 1, or anything logged.
        maximum: Metric -> its largest value after the edits, for example ``neutral/kl``.
        max_drop: Metric -> the most by which it may fall below its value before the edits.

    Raises:
        ConfigError: If a rule is unknown or its value is not of the right type.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    models: Hashes = ()
    model_names: Texts = ()
    max_edits: Annotated[int, Field(gt=0)] | None = None
    denied_subjects: Patterns = ()
    minimum: Bounds = {}
    maximum: Bounds = {}
    max_drop: Bounds = {}

    def __init__(self, **rules: Any) -> None:
        try:  # not in a validator: ConfigError is a ValueError, which pydantic would wrap in its own error
            super().__init__(**rules)
        except ValidationError as invalid:
            fault = first_fault(invalid)
            hint = "; models are fingerprints, names go to model_names" if fault.startswith("models.") else ""
            raise ConfigError(f"policy, {fault}{hint}; rules are {', '.join(type(self).model_fields)}") from invalid

    @classmethod
    def read(cls, path: str | Path) -> Policy:
        """Read a YAML file.

        Raises:
            ConfigError: If it is missing, no YAML, or has unknown rules.
        """
        try:
            rules = read_yaml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"policy {str(path)!r} cannot be read: {error}") from error
        if not isinstance(rules, dict):
            raise ConfigError(f"policy {str(path)!r}: expected rules ({', '.join(cls.model_fields)}), got {rules!r}")
        try:
            return cls(**{str(name): value for name, value in rules.items()})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @property
    def hash(self) -> str:
        """SHA-256 of the rules."""
        return hashlib.sha256(repr(self.model_dump()).encode()).hexdigest()

    def refusals(
        self, names: Sequence[str], requests: Sequence[EditRequest], unknown: int = 0, earlier: int = 0
    ) -> Iterator[Refusal]:
        """Yield the reasons why these facts may not be edited in this model.

        Args:
            names: Name and fingerprint of the model.
            requests: The facts.
            unknown: Number of further facts whose texts are not known.
            earlier: Number of facts that the run has edited already.
        """
        if (self.models or self.model_names) and not (names[-1] in self.models or names[0] in self.model_names):
            allowed = ", ".join([*self.model_names, *(each[:16] for each in self.models)])
            reason = f"model {names[0]!r} with the fingerprint {names[-1][:16]} may not be edited, only {allowed}"
            yield Refusal(reason, reason)
        if self.max_edits is not None and (count := earlier + len(requests) + unknown) > self.max_edits:
            reason = f"{count} edits in a run, at most {self.max_edits} are allowed"
            yield Refusal(reason, reason)
        if self.denied_subjects and unknown:
            reason = f"{unknown} facts are on record without their texts, so denied_subjects cannot be decided"
            yield Refusal(reason, reason)
        yield from self._denied(requests)

    def _denied(self, requests: Sequence[EditRequest]) -> Iterator[Refusal]:
        """Yield the facts in which a pattern matches; one that took too long is not tried again."""
        slow: set[int] = set()
        for index, request in enumerate(requests):
            texts = {name: (text, normal_forms(text)) for name, text in _texts(request).items()}
            for number, pattern in enumerate(self.denied_subjects):
                if number in slow:
                    continue
                field, verdict = _first_match(self._matchers[number], texts)
                if verdict:
                    where, rule = f"entry {index}, {field}", f"denied_subjects.{number}"
                    discreet = f"{where} of the request {request_hash(request)}: {verdict} by {rule}"
                    yield Refusal(f"{where} = {_short(texts[field][0])}: {verdict} by {pattern!r}", discreet)
                    slow |= {number} if verdict != DENIED else set()
                    break

    @cached_property
    def _matchers(self) -> list[list[Any]]:
        """The compiled forms of each pattern; a range of letters may have no sense in another form."""
        return [[_compiled(form, pattern) for form in pattern_forms(pattern)] for pattern in self.denied_subjects]

    def violations(self, before: Mapping[str, float], after: Mapping[str, float]) -> Iterator[str]:
        """Yield the rules that are broken after the edits; a rule about a metric that was not measured is broken."""
        unmeasured = {name: math.nan for rules in (self.minimum, self.maximum, self.max_drop) for name in rules}
        before, after = {**unmeasured, **before}, {**unmeasured, **after}
        for name in unmeasured:
            if math.isnan(after[name]):
                yield f"{name} was not measured after the last edit"
            elif after[name] < self.minimum.get(name, -math.inf):
                yield f"{name} is {after[name]:.4g}, must be at least {self.minimum[name]:.4g}"
            elif after[name] > self.maximum.get(name, math.inf):
                yield f"{name} is {after[name]:.4g}, must be at most {self.maximum[name]:.4g}"
            elif name in self.max_drop and not before[name] - after[name] <= self.max_drop[name]:
                change = f"went from {before[name]:.4g} to {after[name]:.4g}"
                yield f"{name} {change}, may fall by at most {self.max_drop[name]:.4g}"


class Policies:
    """The policies that a journal obeys: asked before every batch, and each owes a run its judgement.

    Attributes:
        rules: The policies.
        name: Name of the model, as the user wrote it.

    Args:
        journal: The journal.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal, self.name = journal, journal.model.name
        self.rules: list[Policy] = []
        self._due: dict[str, int] = {}  # hash of a policy that has not judged its run -> first batch of the run
        self._earlier: set[str] = set()  # hashes of the facts that were edited before the run

    @property
    def inputs(self) -> dict[str, str]:
        """What a batch is decided by: the hash of the rules under ``policy``, if there are any."""
        hashes = [policy.hash for policy in self.rules]
        return {"policy": hashes[0] if len(hashes) == 1 else content_key(*hashes)} if hashes else {}

    def obey(self, policy: Policy) -> None:
        """Ask a policy before every batch from now on."""
        if policy not in self.rules:
            self.rules.append(policy)

    def begin(self, requests: Sequence[EditRequest]) -> None:
        """Ask for all facts of a run, before its first batch.

        Raises:
            PolicyError: Naming every fact that may not be edited.
        """
        self._earlier = hashes_on_record(self._journal.steps)
        self.require(requests, new=True)

    def require(self, requests: Sequence[EditRequest], unknown: int = 0, *, new: bool = False) -> None:
        """Ask whether facts may be edited now; refusals are put on record.

        Args:
            requests: The facts.
            unknown: Number of further facts whose texts are not known.
            new: Whether a fact that was edited already counts as a further one.

        Raises:
            PolicyError: If a policy does not allow it.
        """
        edited = hashes_on_record(self._journal.steps)
        again = 0 if new else len(requests) - len({*map(request_hash, requests)} - edited)
        self.refuse(self.answers(requests, unknown, len(edited) - len(self._earlier & edited) - again))

    def answers(
        self, requests: Sequence[EditRequest], unknown: int = 0, earlier: int = 0
    ) -> list[tuple[Policy, list[Refusal]]]:
        """Return what each policy has against facts; arguments as for ``Policy.refusals``."""
        base = self._journal.base.fingerprint if any(rule.models or rule.model_names for rule in self.rules) else ""
        return [(rule, [*rule.refusals([self.name, base], requests, unknown, earlier)]) for rule in self.rules]

    def refuse(self, answers: Sequence[tuple[Policy, Sequence[Refusal]]]) -> None:
        """Put refusals on record.

        Raises:
            PolicyError: If there are any.
        """
        texts = self._journal.store is None or self._journal.store.texts
        for policy, refusals in answers:
            if refusals:
                self.record(policy, REFUSED, [each.reason if texts else each.discreet for each in refusals])
        if reasons := [each for _, refusals in answers for each in refusals]:
            raise PolicyError(with_faults("the policy is broken; nothing was changed:", reasons))

    def require_recorded(self, entries: Iterable[Entry]) -> None:
        """Ask for the batches on record that were not taken back.

        Raises:
            PolicyError: As ``require``.
            LedgerError: If a request on record is none.
        """
        entries = list(entries)
        removed = {number for body in bodies(entries, RollbackBody) for number in body.batches}
        batches = [body for body in bodies(entries, BatchBody) if body.batch not in removed]
        try:
            requests = [parse_requests(body.requests) for body in batches if body.requests and self.rules]
        except RequestError as error:
            raise LedgerError(f"requests on record cannot be read: {error}; take the ledger from a copy") from error
        facts = [request for each in requests for request in each]
        self.require(facts, sum(len(body.hashes) for body in batches) - len(facts) if self.rules else 0)

    def require_same(self, entries: Iterable[Entry]) -> None:
        """Check that a run that goes on still has the policies that it was started with.

        Raises:
            ResumeError: Naming each policy that is missing.
        """
        if missing := sorted(set(due(entries)) - {policy.hash for policy in self.rules}):
            raise ResumeError(
                f"the run was started under the policy with the hash {', '.join(each[:16] for each in missing)}, which "
                "has not judged it yet; give that policy (PolicyGuard), unchanged, or start a run in another folder"
            )

    def require_judged(self, entries: Sequence[Entry] = ()) -> None:
        """Check that every run that began under a policy was judged, and that these rules hold for what is on record.

        Args:
            entries: A ledger whose batches were repeated.

        Raises:
            PolicyError: Naming the policy.
        """
        batches = {step.number for step in self._journal}
        open_runs = [each for each, first in self._due.items() if any(number >= first for number in batches)]
        open_runs += [each for each, numbers in due(entries).items() if numbers]
        if open_runs:
            raise PolicyError(
                f"a run was stopped before the policy with the hash {open_runs[0][:16]} judged it; let it go on to its "
                "end (the same command with its run_dir), or take its batches back"
            )
        stages = {body.stage: body for body in bodies(entries, EvaluationBody)}
        metrics = {s: stages[s].metrics if s in stages else {} for s in ("before", "after")}
        if "after" in stages and stages["after"].edits != self._journal.edits:
            metrics["after"] = {}  # of another state
        held = {body.policy for body in bodies(entries, PolicyBody) if body.outcome == HELD}
        rules = [policy for policy in self.rules if entries and batches and policy.hash not in held]
        if faults := [fault for policy in rules for fault in policy.violations(metrics["before"], metrics["after"])]:
            raise PolicyError(with_faults("the policy is broken; nothing was changed:", faults))

    def start(self, policy: Policy) -> None:
        """Put on record that a run begins under a policy, which owes it a judgement; once if the run goes on."""
        store = self._journal.store
        self._due.setdefault(policy.hash, max((step.number for step in self._journal), default=-1) + 1)
        if store is None or policy.hash not in due(store.ledger.entries):
            self.record(policy, IN_FORCE)

    def record(self, policy: Policy, outcome: str, faults: Sequence[str] = ()) -> None:
        """Write a decision to the log and the ledger."""
        log.log(logging.WARNING if faults else logging.INFO, "policy %s %s", outcome, "; ".join(faults[:10]))
        if outcome == HELD:
            self._due.pop(policy.hash, None)
        if self._journal.store:
            self._journal.store.note(PolicyBody(outcome=outcome, faults=list(faults), policy=policy.hash))


def due(entries: Iterable[Entry]) -> dict[str, set[int]]:
    """Return the policies that have not judged a run on record -> its batches that were not taken back."""
    runs: dict[str, set[int]] = {}
    for body in (entry.body for entry in entries):
        if isinstance(body, PolicyBody) and body.outcome == IN_FORCE:
            runs.setdefault(body.policy, set())
        elif isinstance(body, PolicyBody) and body.outcome == HELD:
            runs.pop(body.policy, None)
        elif isinstance(body, BatchBody):
            runs = {policy: batches | {body.batch} for policy, batches in runs.items()}
        elif isinstance(body, RollbackBody):
            runs = {policy: batches - set(body.batches) for policy, batches in runs.items()}
    return runs


def _texts(request: EditRequest) -> dict[str, str]:
    """Return what an edit says, by field: a name may stand across prompt and target."""
    targets = {"target_new": request.target_new, "target_true": request.target_true or ""}
    whole = {f"prompt and {name}": f"{request.text} {target}" for name, target in targets.items() if target}
    return {"subject": request.subject, "prompt": request.text, **targets, **whole}


def _first_match(matchers: Sequence[Any], texts: Mapping[str, tuple[str, tuple[str, ...]]]) -> tuple[str, str]:
    """Return the first field in which a pattern matches or takes too long, and the verdict; empty if there is none."""
    end = time.process_time() + SECONDS
    for field, (_, forms) in texts.items():
        for matcher, form in dict.fromkeys(zip(matchers, forms, strict=True)):
            try:
                if matcher.search(form, timeout=max(1e-3, end - time.process_time())):
                    return field, DENIED
            except TimeoutError:
                return field, UNDECIDED
    return "", ""


def _compiled(form: str, pattern: str) -> Any:
    try:
        return regex.compile(form, FLAGS)
    except regex.error:
        return regex.compile(pattern, FLAGS)


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
