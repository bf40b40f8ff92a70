"""Taking back single facts of a batch: they are walked back to the values that they would have without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial

import lightning as L
from jaxtyping import Float
from torch import Tensor

from cakeflow.core.contracts import check_arrival
from cakeflow.core.datamodule import EditDataModule
from cakeflow.core.module import EditModule
from cakeflow.core.trainer import quiet
from cakeflow.core.walk import Walk
from cakeflow.data.text import plain
from cakeflow.errors import ConfigError, RequestWarning, listed
from cakeflow.forward.tokens import Undo
from cakeflow.journal.journal import Journal
from cakeflow.journal.steps import EditStep, facts_on_record, request_hash, without_batch
from cakeflow.models.architecture import Site
from cakeflow.solvers.problem import LayerProblem

WALKS, ENOUGH = 3, 0.95
"""Most walks, and the part of the way back after which no further one is made."""


class UndoWalk(Walk):
    """The walk that takes back some facts of a batch, and holds the others of it where they are."""

    @property
    def hashes(self) -> list[str]:
        """The hash of each request of the batch."""
        return [request_hash(request) for request in self.facts.requests]

    def take_back(self, facts: Sequence[int]) -> None:
        """Walk until these requests of the batch are where they would be without it.

        Args:
            facts: Places of the requests in the batch.

        Raises:
            ConfigError: If less than ``min_arrival`` of the way was made, and the module is to fail then; or the solver
                descends to the targets itself, and so would write the facts once more.
        """
        if not self.module.solver.needs_targets:
            name = type(self.module.solver).__name__
            raise ConfigError(f"{name} takes back whole batches only: rollback(batch={self.step.undoes})")
        self.step.owners = []  # a row of keys belongs to no request of this step
        self.leave_out = self.hashes  # all of the batch are in the solve
        entries = [entry for entry, owner in enumerate(self.facts.owners) if owner in facts]
        for _ in range(WALKS):
            self.over(range(len(self.batch)))
            if min(self.arrived[entry] for entry in entries) >= ENOUGH:
                break
        arrived = [self.arrived[entry] for entry in entries]
        self.log("undo/arrived", sum(arrived) / len(arrived))
        module = self.module
        check_arrival(arrived, self.batch.part(entries), module.min_arrival, module.on_low_arrival)

    def search(self, value_site: Site, facts: Sequence[int]) -> None:
        """Take the values that facts would have without their batch, of the others those that they have; once."""
        if value_site not in self.targets:
            module, journal = self.module, self.module.journal
            measure = partial(module.targets.measure, module.lm, max_tokens=self.footprint.suffix_tokens)
            undone = [i for i, owner in enumerate(self.facts.owners) if self.hashes[owner] in self.step.undone]
            with module.phase("targets"):
                present = measure(self.batch, value_site.layer)
                with journal.reverted(without_batch(journal.steps, self.step.undoes)):
                    without = measure(self.batch.part(undone), value_site.layer)
            self.targets[value_site] = present.updated(undone, without)

    def carry(self, value_site: Site, above: Sequence[Site], facts: Sequence[int]) -> set[Site]:
        """Carry nothing: the values at every layer are measured."""
        return set()

    def keys_to_preserve(self, problem: LayerProblem) -> Float[Tensor, "0 d_in"]:
        """None: the history has those of the batch."""
        return problem.keys[:0].cpu()


def facts_about(journal: Journal, name: str) -> list[tuple[EditStep, int]]:
    """Return every fact of a subject, or with a text, that was not taken back, as its batch and its place there.

    Args:
        journal: The journal.
        name: A subject, or a prompt with its subject; case and punctuation make no difference.

    Raises:
        ConfigError: If the name is no text, there is no such fact, texts were not stored, or a later fact that is to
            stay has replaced one of them.
    """
    if not isinstance(name, str):
        raise ConfigError(f"name must be a subject, or a prompt with its subject, as text; got {name!r}")
    facts = [(step, i) for step, i in facts_on_record(journal.steps) if step.requests]
    chosen = [(s, i) for s, i in facts if plain(name) in (plain(s.requests[i].subject), plain(s.requests[i].text))]
    if not chosen:
        names = listed([*dict.fromkeys(step.requests[i].subject for step, i in facts)])
        raise ConfigError(f"no fact in force is about {name!r}; there are facts about {names or 'nothing with a text'}")
    for step, i in chosen:
        require_last(journal, step, i, chosen)
    return chosen


def require_last(journal: Journal, step: EditStep, i: int, chosen: Collection[tuple[EditStep, int]]) -> None:
    """Check that no fact but those that are to be taken back as well has replaced a fact.

    Args:
        journal: The journal.
        step: Batch of the fact.
        i: Place of the fact in its batch.
        chosen: The facts that are to be taken back.

    Raises:
        ConfigError: Naming the fact that replaced it.
    """
    later = [pair for pair in facts_on_record(journal.steps[journal.steps.index(step) + 1 :]) if pair not in chosen]
    for other, place in later:
        if step.hashes[i] in other.replaced.get(other.hashes[place], ()):
            raise ConfigError(
                f"{step.name(i)} of batch {step.number} is out of force: {other.name(place)} of batch {other.number} "
                "has its key and replaced its value; take that one back, and this one is in force again"
            )


def undo_facts(trainers: Callable[[], L.Trainer], module: EditModule, facts: Sequence[tuple[EditStep, int]]) -> None:
    """Take back facts: a step of the journal for each batch that has some of them.

    Args:
        trainers: Makes a Trainer without a logger for each batch.
        module: The edit method, whose model has the edits.
        facts: The facts, from ``facts_about``.

    Raises:
        ConfigError: If the method, or what completed a run, allows whole batches only.
    """
    if any(step.completes for step in module.journal.steps):
        raise ConfigError("the solver changed all weights when the run ended; take back whole batches: rollback")
    for step in reversed(dict.fromkeys(step for step, _ in facts)):
        data = _batch_again(module, step, tuple(i for each, i in facts if each is step))
        with quiet():
            trainers().fit(module, datamodule=data)


def _batch_again(module: EditModule, step: EditStep, places: tuple[int, ...]) -> EditDataModule:
    """Return the requests of a batch as data, with those marked that are to be taken back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RequestWarning)  # they were reviewed before their edit
        data = EditDataModule(list(step.requests))
    data.evaluate = False
    data.attach(module, edit=True, evaluate=False)
    (batch,) = data.train_dataloader()
    batch.undo = Undo(step.number, places)
    return data
