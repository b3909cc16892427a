"""Rows with errors that are done again: where they lie until their replacement is committed."""

import pyarrow as pa
import pyarrow.compute as pc


class Retries:
    """The row ids with errors by the part that holds them; memory grows with the errors alone."""

    def __init__(self) -> None:
        self._by_file: dict[str, set[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_file)

    def add(self, file: str, table: pa.Table) -> set[str]:
        """Takes in the rows of a part; returns the ids of those with an error in any sample."""
        found = set(table.filter(pc.is_valid(table["error"]))["row_id"].to_pylist())
        if found:
            self._by_file[file] = found
        return found

    def replaced_by(self, row_ids: set[str]) -> list[str]:
        """The parts that hold errors of these rows."""
        return [file for file, waiting in self._by_file.items() if waiting & row_ids]

    @staticmethod
    def without(table: pa.Table, row_ids: set[str]) -> pa.Table:
        """The rows of a part that have other ids."""
        gone = pa.array(sorted(row_ids), pa.string())
        return table.filter(pc.invert(pc.is_in(table["row_id"], value_set=gone)))

    def moved(self, file: str, new: str) -> None:
        """Notes that what a part keeps lies in another one now."""
        self._by_file[new] = self._by_file.pop(file)

    def forget(self, row_ids: set[str]) -> None:
        """Notes that these rows have their replacement."""
        left = {file: waiting - row_ids for file, waiting in self._by_file.items()}
        self._by_file = {file: waiting for file, waiting in left.items() if waiting}
