"""What runs came to: a table on the terminal, curves, and one HTML page for a run or for many."""

from vigor.report.html import write_report, write_runs
from vigor.report.table import before_after, print_results

__all__ = ["before_after", "print_results", "write_report", "write_runs"]
