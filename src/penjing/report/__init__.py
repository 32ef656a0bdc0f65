"""Report a study to a person: one HTML page, and a table on the terminal."""

from penjing.report.page import write
from penjing.report.terminal import table

__all__ = ["table", "write"]
