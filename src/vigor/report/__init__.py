"""What a run came to: a table on the terminal, curves, and one HTML page."""

from vigor.report.html import write_report
from vigor.report.table import before_after, print_results

__all__ = ["before_after", "print_results", "write_report"]
