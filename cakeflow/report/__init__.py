"""Reports for people: tables for the terminal, plots, the page of a run, and runs side by side."""

from cakeflow.report.comparison import compare_runs, plot_runs, to_csv, to_markdown
from cakeflow.report.figures import (
    curves_of,
    plot_convergence,
    plot_curves,
    plot_heads,
    plot_intervals,
    plot_layers,
    plot_losses,
    plot_trace,
    plot_weights,
    save_plot,
)  # fmt: skip
from cakeflow.report.folder import RunFolder
from cakeflow.report.frame import metrics_frame
from cakeflow.report.intervals import Interval
from cakeflow.report.page import render_page
from cakeflow.report.tables import (
    answers_table,
    ledger_table,
    metrics_table,
    phases_table,
    plugins_table,
    requests_table,
    runs_table,
    trace_table,
    verdict,
)  # fmt: skip

__all__ = [
    "Interval", "RunFolder", "answers_table", "compare_runs", "curves_of", "ledger_table", "metrics_frame",
    "metrics_table", "phases_table", "plot_convergence", "plot_curves", "plot_heads", "plot_intervals", "plot_layers",
    "plot_losses", "plot_runs", "plot_trace", "plot_weights", "plugins_table", "render_page",
    "requests_table", "runs_table", "save_plot", "to_csv", "to_markdown", "trace_table", "verdict",
]  # fmt: skip
