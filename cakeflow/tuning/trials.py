"""Trials of a model's numbers: a batch of edits that is measured and taken back, each made once and stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

from cakeflow.callbacks import OutcomeCheck
from cakeflow.data.contexts import Contexts
from cakeflow.data.files import read_text
from cakeflow.data.request import EditRequest
from cakeflow.editor import Editor
from cakeflow.errors import ConfigError, NumericalError
from cakeflow.journal.steps import request_hash
from cakeflow.models.language import LanguageModel
from cakeflow.storage.cache import content_key
from cakeflow.storage.typed import Count, Number, Schema, parse_lines, write_lines

SHARES = ("learned", "generalization", "specificity")
"""Metrics that a trial is judged by: free answers, paraphrases and neighbors."""


@dataclass(frozen=True)
class Numbers:
    """The numbers of a model config; by default those of the papers' Llama-3.

    Attributes:
        layers: Layers to edit.
        lr: Learning rate of the target search.
        steps: Most steps of it.
        null_threshold: Limit below which eigenvalues of C count as null.
        cov_weight: Number of keys that C counts for in a least-squares solve.
    """

    layers: tuple[int, ...]
    lr: float = 0.1
    steps: int = 25
    null_threshold: float = 0.02
    cov_weight: float = 15_000.0

    def parts(self) -> dict[str, Any]:
        """Return the numbers as parts of a model config."""
        return {
            "layers": list(self.layers),
            "targets": {"steps": self.steps, "lr": self.lr},
            "statistics": {"null_threshold": self.null_threshold, "cov_weight": self.cov_weight},
        }


class Trial(Schema):
    """One batch of edits with some numbers, measured and taken back.

    Attributes:
        key: Hash of everything that decides it.
        name: What was tried, such as ``lr 0.5``.
        recipe: The method.
        edits: Number of facts.
        shares: Metrics of ``SHARES`` after the batch, as far as the facts allow them.
        seconds: Time of the batch with its evaluations.
        fault: Why the batch was undone, if it was.
    """

    key: str
    name: str
    recipe: str
    edits: Count
    shares: dict[str, Number]
    seconds: Number
    fault: str = ""

    @property
    def score(self) -> float:
        """Harmonic mean of the shares; 0 if the batch was undone."""
        return harmonic_mean([*self.shares.values()]) if self.shares else 0.0

    @property
    def result(self) -> str:
        """The score with the shares, in %, or why there is none."""
        shares = ", ".join(f"{name} {100 * share:.1f}" for name, share in self.shares.items())
        return self.fault or f"{100 * self.score:.1f} ({shares})"


class Trials:
    """Trials of one model, which are made once and then lie in a file.

    Args:
        lm: The model, not edited.
        contexts: Texts around the prompts.
        corpus: Settings of the second moments' corpus.
        path: File of the trials; a search that was interrupted goes on from there.
        notify: Called with every trial of this search, also where it was in the file.

    Raises:
        ConfigError: If the file is not one of trials.
    """

    def __init__(
        self, lm: LanguageModel, contexts: Contexts, corpus: dict[str, Any], path: Path, notify: Callable[[Trial], Any]
    ) -> None:
        self.lm, self.contexts, self.corpus, self.path, self.notify = lm, contexts, corpus, path, notify
        self.stored: dict[str, Trial] = {}
        self.made: dict[str, Trial] = {}
        if path.exists():
            remedy = "delete the file, and the trials are made again"
            trials = parse_lines(Trial, read_text(path), path, ConfigError, remedy)
            self.stored = {trial.key: trial for trial in trials}

    def key(self, numbers: Numbers, facts: Sequence[EditRequest], recipe: str) -> str:
        """Return the hash of everything that decides a trial."""
        hashes = [request_hash(fact) for fact in facts]
        return content_key(self.lm.fingerprint(), asdict(numbers), self.contexts.groups, self.corpus, hashes, recipe)

    def make(self, name: str, numbers: Numbers, facts: Sequence[EditRequest], recipe: str) -> Trial:
        """Edit facts with some numbers, measure, and take the batch back; what the file has is not made again."""
        key = self.key(numbers, facts, recipe)
        if key not in self.stored:
            start, measured = time.monotonic(), self._measured(numbers, facts, recipe)
            seconds = time.monotonic() - start
            self.stored[key] = Trial(key=key, name=name, recipe=recipe, edits=len(facts), seconds=seconds, **measured)
            write_lines(self.path, self.stored.values())
        if key not in self.made:
            self.made[key] = self.stored[key].model_copy(update={"name": name})
            self.notify(self.made[key])
        return self.made[key]

    def _measured(self, numbers: Numbers, facts: Sequence[EditRequest], recipe: str) -> dict[str, Any]:
        parts = numbers.parts()
        editor = Editor.from_pretrained(
            self.lm.model,
            recipe,
            tokenizer=self.lm.tokenizer,
            architecture=self.lm.architecture,
            contexts=self.contexts,
            trainer={"logger": False, "enable_progress_bar": False, "callbacks": [OutcomeCheck(0, 0, chat=False)]},
            **{**parts, "statistics": {**self.corpus, **parts["statistics"]}},
        )
        try:
            metrics = editor.fit(facts).after
        except NumericalError as error:
            return {"shares": {}, "fault": str(error)}
        finally:
            editor.rollback()
        return {"shares": {name: metrics[name] for name in SHARES if name in metrics}}
