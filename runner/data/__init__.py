"""Rows in, rows out: the input datasets and the Arrow files that hold the results."""

from runner.data.background import WriteBehind, read_ahead
from runner.data.readers import Dataset
from runner.data.writers import ResultWriter

__all__ = ["Dataset", "ResultWriter", "WriteBehind", "read_ahead"]
