"""One self-contained HTML page that shows a run, or a comparison, from the files of its folder. It measures nothing."""

from autoprune.report.comparison import write_comparison
from autoprune.report.page import figure_files, write_report

__all__ = ["figure_files", "write_comparison", "write_report"]
