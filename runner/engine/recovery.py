"""When memory runs out: what says so, what is left to do, how many rows go on."""

from collections.abc import Iterable, Sequence

from runner.engine.sequence import Sequence as Row
from runner.types import Request

Unfinished = tuple[Request, list[int]]
"""A request and which of its samples are left to do."""

_FAILURES = (
    "[malloc",
    "::malloc]",
    "unable to allocate",
    "attempting to allocate",
    "out of memory",
    "outofmemory",
    "insufficient memory",
)
"""What mlx says, in lower case, when Metal or CUDA have no memory left. On a CPU it says nothing
and the process ends: there only the memory budget helps."""


def is_allocation_failure(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or any(it in message for it in _FAILURES)


def unfinished(
    rows: Iterable[Row], ready: Iterable[Unfinished], prefilling: Iterable[Unfinished]
) -> list[Unfinished]:
    """Each request in flight with the samples of it that are left, in the order of the rows."""
    left: dict[str, Unfinished] = {}
    parts = [((row.request, [row.index]) for row in rows), ready, prefilling]
    for request, indices in (pair for part in parts for pair in part):
        left.setdefault(request.request_id, (request, []))[1].extend(indices)
    return [(request, sorted(indices)) for request, indices in left.values()]


def smaller_batch_size(
    max_batch_size: int, *, num_rows: int, ready: Sequence[Unfinished], num_prefilling: int
) -> int:
    """Half of what was tried together; 0 where that was one row or prompt alone."""
    num_ready = sum(len(indices) for _, indices in ready)
    return min(max_batch_size, num_rows + num_ready + num_prefilling) // 2
