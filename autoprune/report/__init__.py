"""One self-contained HTML page that shows a run, from the files of its folder alone. It measures nothing."""

from autoprune.report.page import figure_files, write_report

__all__ = ["figure_files", "write_report"]
