"""Plain text files as rows: a file each, or each of its lines."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from runner.data.formats import BATCH_ROWS, reading
from runner.errors import DataError

TEXT_SUFFIX = ".txt"


class TextRows:
    """A UTF-8 file: the column `text` holds all of it, or a line without its end per row.

    Lines that hold nothing but space are left out. The column `file` is the file's name. Raises
    DataError for a file that holds nothing to read.
    """

    schema = pa.schema([("text", pa.string()), ("file", pa.string())])

    def __init__(self, path: Path, *, are_lines: bool = False) -> None:
        self.path = path
        self._are_lines = are_lines
        self.num_rows = sum(1 for _ in self._texts())
        if self.num_rows == 0:
            raise DataError(f"{path}: is empty: there is no text in it")

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yields all rows in order."""
        texts: list[str] = []
        for text in self._texts():
            texts.append(text)
            if len(texts) == BATCH_ROWS:
                yield self._batch(texts)
                texts = []
        if texts:
            yield self._batch(texts)

    def _batch(self, texts: list[str]) -> pa.RecordBatch:
        files = [self.path.name] * len(texts)
        return pa.RecordBatch.from_arrays([pa.array(texts), pa.array(files)], schema=self.schema)

    def _texts(self) -> Iterator[str]:
        with reading(self.path), open(self.path, "rb") as file:
            pieces = file if self._are_lines else iter([file.read()])
            for number, piece in enumerate(pieces, start=1):
                content = piece.removeprefix(codecs.BOM_UTF8) if number == 1 else piece
                try:
                    text = content.decode()
                except UnicodeDecodeError as error:
                    where = f", line {number}" if self._are_lines else ""
                    raise DataError(f"{self.path}{where}: is not UTF-8: {error.reason}") from error
                if text.strip():
                    yield text.rstrip("\r\n") if self._are_lines else text
