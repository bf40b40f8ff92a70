"""The metrics of runs as one table, for pandas and ``datasets``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from cakeflow.journal.audit import ledger_of
from cakeflow.journal.ledger import bodies, read_entries
from cakeflow.journal.schema import EvaluationBody


def metrics_frame(*runs: str | Path) -> pd.DataFrame:
    """Return every metric of every evaluation of some runs, one a row, as their ledgers have them.

    ``datasets.Dataset.from_pandas`` takes the table as it is.

    Args:
        runs: Run folders.

    Returns:
        Columns ``run`` (folder), ``stage``, ``edits`` (facts before it), ``protocol``, ``metric`` and ``value``.

    Raises:
        RunFolderError: If one is no run folder.
        LedgerError: If a ledger is not as it was written.
    """
    rows = [
        (str(run), body.stage, body.edits, body.protocol, metric, value)
        for run in runs
        for body in bodies(read_entries(ledger_of(Path(run))), EvaluationBody)
        for metric, value in body.metrics.items()
    ]
    return pd.DataFrame(rows, columns=["run", "stage", "edits", "protocol", "metric", "value"])
