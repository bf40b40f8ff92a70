"""Suites: many methods on the same facts, resumable, as one page with intervals and paired differences."""

from cakeflow.suites.page import render_suite, to_markdown
from cakeflow.suites.plan import Estimate, plan
from cakeflow.suites.rows import Row, Rows
from cakeflow.suites.suite import Arm, Suite, arms_of, read_suite
from cakeflow.suites.tables import Line, Table, tables_of

__all__ = [
    "Arm", "Estimate", "Line", "Row", "Rows", "Suite", "Table", "arms_of", "plan", "read_suite", "render_suite",
    "tables_of", "to_markdown",
]  # fmt: skip
