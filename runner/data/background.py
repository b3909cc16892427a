"""Reading ahead and writing behind: threads that keep disks out of the way of the model."""

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

from runner.data.writers import ResultWriter

Item = TypeVar("Item")
Result = TypeVar("Result")
READING_THREAD = "read ahead"
_ITEMS = 32
"""Rows that change threads at once: one at a time, the threads mostly wait for each other."""
_STOP_SECONDS = 0.05
_END_SECONDS = 1.0


def read_ahead(items: Iterable[Item], *, depth: int = 8) -> Generator[Item]:
    """Yields `items`, of which a thread holds up to `depth` times 32 ready.

    What `items` raises is raised here, after what came before it. Closing ends the thread.
    """
    return prepare_ahead(items, lambda chunk: chunk, depth=depth)


def prepare_ahead(
    items: Iterable[Item],
    prepare: Callable[[list[Item]], list[Result]],
    *,
    depth: int = 8,
    length: Callable[[Item], int] = lambda item: 0,
    most: int = 1,
) -> Generator[Result]:
    """Like `read_ahead`, but yields what `prepare` makes of up to 32 items at a time.

    The thread calls it. It gets fewer items where their `length` adds up to `most` before.
    """
    ready: queue.Queue[_Chunk[Result]] = queue.Queue(depth)
    stopped = threading.Event()
    chunks = _chunks(iter(items), prepare, length, most)
    thread = threading.Thread(
        target=_read, args=(chunks, ready, stopped), name=READING_THREAD, daemon=True
    )
    thread.start()
    try:
        while True:
            chunk = ready.get()
            yield from chunk.items
            if chunk.error is not None:
                raise chunk.error
            if chunk.is_last:
                return
    finally:
        stopped.set()
        # The interpreter may not end while a tokenizer is at work; a source that waits may be left.
        thread.join(_END_SECONDS)


@dataclass(slots=True)
class _Chunk(Generic[Result]):
    """What changes threads at once; the consumer raises what reading or preparing has raised."""

    items: list[Result]
    is_last: bool
    error: BaseException | None


def _chunks(
    source: Iterator[Item],
    prepare: Callable[[list[Item]], list[Result]],
    length: Callable[[Item], int],
    most: int,
) -> Iterator[_Chunk[Result]]:
    is_last = False
    while not is_last:
        read: list[Item] = []
        prepared: list[Result] = []
        error: BaseException | None = None
        try:
            _read_some(source, read, length, most)
        except BaseException as failure:
            error = failure
        is_last = error is not None or not read
        try:
            prepared = prepare(read) if read else []
        # What could not be prepared was read before what could not be read.
        except BaseException as failure:
            error, is_last = failure, True
        yield _Chunk(prepared, is_last, error)


def _read_some(
    source: Iterator[Item], into: list[Item], length: Callable[[Item], int], most: int
) -> None:
    total = 0
    for item in islice(source, _ITEMS):
        into.append(item)
        total += length(item)
        if total >= most:
            return


def _read(
    chunks: Iterator[_Chunk[Result]],
    ready: "queue.Queue[_Chunk[Result]]",
    stopped: threading.Event,
) -> None:
    """Puts chunks until the last one, or until nobody wants them."""
    for chunk in chunks:
        # Of rows that are all done nothing is left.
        while not stopped.is_set() and (chunk.items or chunk.is_last):
            try:
                ready.put(chunk, timeout=_STOP_SECONDS)
                break
            except queue.Full:
                continue
        if stopped.is_set():
            return


class WriteBehind:
    """Hands rows to a `ResultWriter` in a thread of its own, which also commits what is due.

    `write` waits while the thread has `depth` groups to write. What the thread raises is raised by
    the next `write`, or by `close`. The thread calls `committed` after every commit but the one of
    `close`.
    """

    def __init__(
        self,
        writer: ResultWriter,
        *,
        depth: int = 256,
        committed: Callable[[], object] = lambda: None,
    ) -> None:
        self._writer = writer
        self._committed = committed
        self._groups: queue.Queue[Sequence[Mapping[str, Any]] | None] = queue.Queue(depth)
        self._wants_commit = threading.Event()
        self._failure: BaseException | None = None
        self._is_raised = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Claims the directory, and starts the thread."""
        self._writer.start()
        self._thread.start()

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the rows of one group."""
        self._raise()
        self._groups.put(rows)

    def commit(self) -> None:
        """Waits until everything that was taken is committed, also what is not due yet.

        A failure of the thread is raised once, here or by `write` or `close`.
        """
        self._wants_commit.set()
        self._groups.put(())
        self._groups.join()
        self._raise()

    def close(self, *, complete: bool, input: Any = None) -> None:
        """Writes what was taken, ends the thread and closes the writer."""
        if self._thread.is_alive():
            self._groups.put(None)
            self._thread.join()
        try:
            self._raise()
        finally:
            self._writer.close(complete=complete and self._failure is None, input=input)

    def _raise(self) -> None:
        failure = self._failure
        if failure is not None and not self._is_raised:
            self._is_raised = True
            raise failure

    def _run(self) -> None:
        while True:
            try:
                is_due = None if self._failure else self._writer.seconds_left
                rows = self._groups.get(timeout=is_due)
            except queue.Empty:
                self._write(())
                continue
            if rows is None:
                return
            self._write(rows)
            self._groups.task_done()

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        before = self._writer.num_rows
        try:
            self._writer.write(rows)
            if self._wants_commit.is_set() and self._groups.empty():
                self._wants_commit.clear()
                self._writer.commit()
            self._writer.commit_if_due()
            if self._writer.num_rows != before:
                self._committed()
        # Whatever it is, the thread that started the run is to end it.
        except BaseException as failure:
            self._failure = self._failure or failure
