"""Every change of a model: applied whole or not at all, stored, audited and taken back bit for bit."""

from cakeflow.journal.audit import Audit, base_of, ledger_of, replay, verify
from cakeflow.journal.journal import Journal
from cakeflow.journal.ledger import Entry, Ledger, bodies, read_entries
from cakeflow.journal.provenance import circumstances
from cakeflow.journal.steps import EditStep, LayerStep, request_hash
from cakeflow.journal.store import JournalStore, run_folder
from cakeflow.journal.weights import EditedWeights

__all__ = [
    "Audit",
    "EditStep",
    "EditedWeights",
    "Entry",
    "Journal",
    "JournalStore",
    "LayerStep",
    "Ledger",
    "base_of",
    "bodies",
    "circumstances",
    "ledger_of",
    "read_entries",
    "replay",
    "request_hash",
    "run_folder",
    "verify",
]
