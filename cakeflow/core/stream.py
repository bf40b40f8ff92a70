"""All facts of a stream of edits, of which those that the model does not state are edited again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cakeflow.data.request import EditRequest
from cakeflow.evaluation.scoring import score_rows
from cakeflow.forward.fact_tokens import FactBatch
from cakeflow.forward.tokens import TextBatch
from cakeflow.journal.journal import Journal
from cakeflow.journal.steps import facts_on_record, request_hash
from cakeflow.models.language import LanguageModel


def earlier_requests(journal: Journal, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the requests of all facts in force whose texts are known, each once, but for those named."""
    known = {request_hash(request) for request in requests}
    earlier = {s.hashes[i]: s.requests[i] for s, i in facts_on_record(journal.steps) if s.requests}
    return [request for name, request in earlier.items() if name not in known]


@dataclass(frozen=True, eq=False)
class Stream:
    """The facts of a run and of all before it.

    Attributes:
        texts: n requests with their tokens.
        facts: The same with the tokens at which they are written.
    """

    texts: TextBatch
    facts: FactBatch

    def lost(self, lm: LanguageModel, journal: Journal, max_bytes: float | None) -> list[int]:
        """Return the places of facts in force that the model does not state on their bare prompts.

        Facts that can have one value only, because their keys coincide, come together. Left out are those at whose
        prompt a later fact says something else, and those that cannot be written (``FactBatch.massive``).

        Args:
            lm: The model as it is.
            journal: What it was edited by.
            max_bytes: Most bytes beyond the model.
        """
        names = [request_hash(request) for request in self.facts.requests]
        last = {name: at for at, name in enumerate(s.hashes[i] for s, i in facts_on_record(journal.steps))}
        newest: dict[str, int] = {}
        for name, request in zip(names, self.facts.requests, strict=True):
            newest[request.text] = max(newest.get(request.text, -1), last.get(name, -1))
        asked = [
            place
            for place, (name, request) in enumerate(zip(names, self.facts.requests, strict=True))
            if last.get(name, -1) == newest[request.text] >= 0 and self.facts.massive[place] is None
        ]
        _, taken = score_rows(lm, [self.facts.bare[place] for place in asked], max_bytes)
        part = self.facts.part(asked)
        entries = list(zip(part.texts.value_groups(), part.owners, strict=True))
        failed = {group for group, owner in entries if not taken[owner]}
        places = sorted({asked[owner] for group, owner in entries if group in failed})
        if journal.store and journal.store.goes_on_without([self.facts.requests[place] for place in places]):
            return []  # when the run was interrupted they could not be edited again
        return places
