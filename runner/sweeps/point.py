"""One point of a sweep: its options, and what its directory says of it."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.errors import OutputError
from runner.run_log import is_secret
from runner.status import read_status
from runner.sweeps.columns import Row
from runner.sweeps.measures import MEASURES, Measures, read_measures
from runner.sweeps.numbers import read_numbers
from runner.sweeps.paired import Pair, of_rows

_LEFT_OUT = frozenset({"output.dir"})


@dataclass(kw_only=True)
class Point:
    """One combination of options."""

    name: str
    directory: Path
    options: dict[str, Any]
    """Those that the command line gives."""
    state: str = "waiting"
    """waiting, running, finished, failed, stopped or interrupted."""
    error: str | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    measures: Measures = field(default_factory=dict)

    def take_what_is_there(self) -> None:
        """Reads what an earlier run of the sweep left; what is wrong with it is said by its run."""
        with suppress(OutputError):
            state = read_status(self.directory).state
            self._read()
            self.state = state

    def end(self, state: str, error: str | None) -> None:
        """Takes in how it ended, and what it wrote."""
        self.state, self.error = state, error
        self.numbers, self.measures = {}, {}
        # One that failed may have met the results of something else in its directory.
        if state != "failed":
            self._read()

    def _read(self) -> None:
        self.numbers = read_numbers(self.directory)
        self.measures = read_measures(self.directory)

    def relative(self, base: Path) -> str:
        """Its directory, inside that of the sweep by its name alone: the sweep may be moved."""
        here, place = base.resolve(), self.directory.resolve()
        return str(place.relative_to(here)) if place.is_relative_to(here) else str(self.directory)

    def row(self, number: int, base: Path, to_first: dict[str, Pair]) -> Row:
        """Its row of `sweep.parquet`; `to_first` are its differences to the first point."""
        options = {key: it for key, it in self.options.items() if _is_shown(key)}
        row: Row = {"point": number, "directory": self.relative(base), **options}
        row |= {"state": self.state, "error": self.error} | self.numbers
        for name in (name for name in MEASURES if name in self.measures):
            if one := of_rows(self.measures[name]):
                row |= {name: one.value, f"{name}_stderr": one.stderr}
        for name, it in to_first.items():
            row |= {
                f"{name}_difference": it.difference,
                f"{name}_difference_stderr": it.stderr,
                f"{name}_paired": it.documents,
                f"{name}_left_out": it.left_out,
            }
        return row


def _is_shown(key: str) -> bool:
    return key not in _LEFT_OUT and not is_secret(key)
