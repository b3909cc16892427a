"""What to prefill next: policy over counters, without arrays."""

from collections import deque
from collections.abc import Iterable

from runner.types import Request

_MAX_PADDING = 2.0
"""Prompts are prefilled together while pads at most double the tokens forwarded."""


class Scheduler:
    """The requests that wait, and which of them are prefilled together next."""

    def __init__(self, *, max_batch_size: int) -> None:
        self.max_batch_size = max_batch_size
        self._waiting: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def wants_requests(self) -> bool:
        """Whether more requests should be added, so that a freed row never waits for one."""
        return len(self._waiting) < self.max_batch_size

    def add(self, request: Request) -> None:
        """Appends a request to the queue."""
        self._waiting.append(request)

    def remove(self, request_id: str) -> Request | None:
        """Takes a waiting request out; None where it is not waiting."""
        found = next((r for r in self._waiting if r.request_id == request_id), None)
        if found is not None:
            self._waiting.remove(found)
        return found

    def next_prompts(self, num_free_rows: int) -> list[Request]:
        """Takes the requests to prefill together now: in order, as many as the free rows hold.

        The first is taken as soon as one row is free, also where its n samples need more: its
        prompt is kept until all of them have started.
        """
        taken: list[Request] = []
        while self._waiting and self._fits([*taken, self._waiting[0]], num_free_rows):
            taken.append(self._waiting.popleft())
        return taken

    def _fits(self, requests: list[Request], num_free_rows: int) -> bool:
        if num_free_rows <= 0 or len(requests) == 1:
            return num_free_rows > 0
        num_samples = sum(request.params.n for request in requests)
        return num_samples <= num_free_rows and _padding(requests) <= _MAX_PADDING


def _padding(requests: Iterable[Request]) -> float:
    """Tokens forwarded with right padding, per token of the prompts."""
    lengths = [len(request.prompt_token_ids) for request in requests]
    return max(lengths) * len(lengths) / sum(lengths)
