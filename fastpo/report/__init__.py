"""One self-contained HTML page about one run or several, and the helpers that read a run."""

from fastpo.report.page import write_report
from fastpo.report.runs import load_metrics, load_run, minority_auroc

__all__ = ["load_metrics", "load_run", "minority_auroc", "write_report"]
