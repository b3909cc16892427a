"""A sweep: its points, the model they share, and the files that put them side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa

from runner.data.durable import stopping
from runner.models.load import LoadedModel
from runner.sweeps.columns import Row, typed_table, write_parquet
from runner.sweeps.kept_model import KeptModel
from runner.sweeps.paired import Pair, of_rows, pair
from runner.sweeps.picture import draw
from runner.sweeps.point import Point
from runner.sweeps.table import print_table
from runner.sweeps.view import Line, view

POINTS_FILE = "sweep.parquet"
PAIRS_FILE = "sweep_pairs.parquet"
_PAIRS_SCHEMA = pa.schema(
    [
        ("point_a", pa.int64()),
        ("point_b", pa.int64()),
        ("directory_a", pa.string()),
        ("directory_b", pa.string()),
        ("measure", pa.string()),
        ("documents", pa.int64()),
        ("left_out", pa.int64()),
        ("value_a", pa.float64()),
        ("value_b", pa.float64()),
        ("difference", pa.float64()),
        ("stderr", pa.float64()),
    ]
)


class Sweep:
    """The points of one directory; whoever runs them tells of each when it begins and ends.

    Its files are written after every point, so that they hold whatever is finished.
    """

    def __init__(self, directory: Path, points: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Takes the directory and, of every point in order, its name and the options it has."""
        self.directory = directory
        self.points = {
            name: Point(name=name, directory=directory / name, options=dict(options))
            for name, options in points
        }
        self._model = KeptModel()
        self._pairs: dict[tuple[str, str], dict[str, Pair]] = {}
        for point in self.points.values():
            point.take_what_is_there()

    def load_model(self, path: str, **options: Any) -> LoadedModel:
        """A model as `runner.models.load.load_model` gives it, kept from one point to the next."""
        return self._model.load(path, **options)

    def begin(self, name: str, directory: Path) -> None:
        """Says which point runs now."""
        point = self.points[name]
        point.directory, point.state = directory, "running"
        number = list(self.points).index(name)
        print(f"\nPoint {number + 1} of {len(self.points)}: {name}", flush=True)

    def end(self, name: str, state: str, error: str | None = None) -> None:
        """Takes in how a point ended, and writes what is known by now."""
        self.points[name].end(state, error)
        self._pairs = {names: it for names, it in self._pairs.items() if name not in names}
        self._write()

    def finish(self) -> None:
        """Prints the table, makes the picture and says where everything is."""
        found = view([self._line(point) for point in self.points.values()])
        print_table(found)
        files = [POINTS_FILE, PAIRS_FILE, *(draw(found, self.directory) if found.panels else [])]
        print(f"\n{', '.join(files)} in {self.directory}")

    def _write(self) -> None:
        self._compare()
        rows = [
            point.row(number, self.directory, self._to_first(point.name))
            for number, point in enumerate(self.points.values())
        ]
        pairs = pa.Table.from_pylist(self._pair_rows(), schema=_PAIRS_SCHEMA)
        with stopping(self.directory):
            write_parquet(self.directory / POINTS_FILE, typed_table(rows))
            write_parquet(self.directory / PAIRS_FILE, pairs)

    def _compare(self) -> None:
        """Compares every two points of which one has changed."""
        for names in combinations(self.points, 2):
            if names not in self._pairs:
                a, b = (self.points[name].measures for name in names)
                found = {it: pair(a[it], b[it]) for it in a if it in b}
                self._pairs[names] = {it: one for it, one in found.items() if one is not None}

    def _to_first(self, name: str) -> dict[str, Pair]:
        return self._pairs.get((next(iter(self.points)), name), {})

    def _pair_rows(self) -> list[Row]:
        numbers = {name: number for number, name in enumerate(self.points)}
        return [
            {
                "point_a": numbers[a],
                "point_b": numbers[b],
                "directory_a": self.points[a].relative(self.directory),
                "directory_b": self.points[b].relative(self.directory),
                "measure": measure,
            }
            | asdict(it)
            for a, b in combinations(self.points, 2)
            for measure, it in self._pairs[a, b].items()
        ]

    def _line(self, point: Point) -> Line:
        return Line(
            name=point.name,
            state=point.state,
            numbers=point.numbers,
            values={name: of_rows(rows) for name, rows in point.measures.items()},
            to_first=self._to_first(point.name),
        )
