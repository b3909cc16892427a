"""Rows of a dataset on the Hugging Face hub, streamed: nothing is downloaded as a whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa

from runner.data.schemas import plain_schema
from runner.errors import DataError

SHUFFLE_BUFFER = 10_000
"""Rows that are held while shuffled rows are streamed."""

_HEAD_ROWS = 1024
_TIMEOUT_SECONDS = 10.0


@contextmanager
def _asking(path: str) -> Iterator[None]:
    try:
        yield
    # The network, the hub and the reader of any file format raise their own kinds here.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"{path}: not a local file, and as a Hugging Face dataset it cannot be read: {reason}"
        ) from error


def _look_up(path: str) -> None:
    """Asks for the dataset once: `datasets` itself retries for half a minute without a network."""
    huggingface_hub.HfApi().dataset_info(path, timeout=_TIMEOUT_SECONDS)


class HubSource:
    """One split of a hub dataset; shuffling is approximate, within `SHUFFLE_BUFFER` rows."""

    def __init__(self, path: str, *, name: str | None, split: str) -> None:
        self._path = path
        with _asking(path):
            _look_up(path)
            dataset = datasets.load_dataset(path, name, split=split, streaming=True)
            # Images and sound stay bytes, which Arrow can hold.
            self._dataset: Any = dataset if dataset.features is None else dataset.decode(False)
            self.schema = plain_schema(self._find_schema())
        split_info = (self._dataset.info.splits or {}).get(split)
        self.num_rows: int | None = split_info.num_examples if split_info else None

    def _find_schema(self) -> pa.Schema:
        if self._dataset.features is not None:
            return self._dataset.features.arrow_schema
        return pa.Table.from_pylist(list(self._dataset.take(_HEAD_ROWS))).schema

    def rows(
        self, *, offset: int, limit: int | None, shuffle_seed: int | None
    ) -> Iterator[dict[str, Any]]:
        """Yields rows, shuffled first, then from `offset`, at most `limit`."""
        dataset = self._dataset
        if shuffle_seed is not None:
            dataset = dataset.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        dataset = dataset.skip(offset) if offset else dataset
        dataset = dataset if limit is None else dataset.take(limit)
        with _asking(self._path):
            for row in dataset:
                yield {name: row.get(name) for name in self.schema.names}
