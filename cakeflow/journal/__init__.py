"""Every change of a model: applied whole or not at all, stored, audited and taken back bit for bit."""

from cakeflow.journal.audit import Audit, base_of, ledger_of, replay, verify
from cakeflow.journal.changes import Change, ModuleChange, WeightChange, kind_of
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry, Ledger, bodies, read_entries
from cakeflow.journal.policy import Policy
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.schema import EvaluatedRequest, PromptAnswer, RunInfo
from cakeflow.journal.steps import AppliedChange, EditStep, facts_in_force, request_hash
from cakeflow.journal.store import JournalStore

__all__ = [
    "AppliedChange", "Audit", "Change", "EditStep", "Entry", "EvaluatedRequest", "Journal", "JournalStore", "Ledger",
    "ModuleChange", "Policy", "PromptAnswer", "RunInfo", "WeightChange", "base_of", "bodies", "circumstances",
    "facts_in_force", "kind_of", "ledger_of", "read_entries", "replay", "request_hash", "verify",
]  # fmt: skip
