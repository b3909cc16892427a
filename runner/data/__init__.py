"""Rows in, rows out: the input datasets and the Arrow files that hold the results."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.data.background import WriteBehind as WriteBehind
    from runner.data.background import prepare_ahead as prepare_ahead
    from runner.data.background import read_ahead as read_ahead
    from runner.data.readers import Dataset as Dataset
    from runner.data.writers import ResultWriter as ResultWriter

_PUBLIC = {
    "Dataset": "runner.data.readers",
    "ResultWriter": "runner.data.writers",
    "WriteBehind": "runner.data.background",
    "prepare_ahead": "runner.data.background",
    "read_ahead": "runner.data.background",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that a job without rows never imports Arrow."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'runner.data' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
