"""What to prefill next: policy over counters, without arrays."""

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice

from runner.types import Request

_MAX_PADDING = 2.0
"""Prompts are prefilled together while pads at most double the tokens forwarded."""


class Scheduler:
    """The requests that wait, and which of them are prefilled together next."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_scored_tokens: int = 2048,
        max_scored_positions: int = 2048,
    ) -> None:
        """Takes the limits.

        Args:
            max_batch_size: rows decoded together.
            max_scored_tokens: tokens, pads included, of prompts that are scored together.
            max_scored_positions: those of them that have a logprob.
        """
        self.max_batch_size = max_batch_size
        self._max_scored_tokens = max_scored_tokens
        self._max_scored_positions = max_scored_positions
        self._waiting: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def wants_requests(self) -> bool:
        """Whether more requests should be added, so that a freed row never waits for one."""
        return len(self._waiting) < self.max_batch_size

    @property
    def wants_rows(self) -> bool:
        """Whether any request that waits is to be sampled from."""
        return any(request.needs_row for request in self._waiting)

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
        prompt is kept until all of them have started. One that is only scored needs no row.
        """
        taken: list[Request] = []
        while self._waiting and self._fits([*taken, self._waiting[0]], num_free_rows):
            if not _share_well(taken, *islice(self._waiting, 2)):
                break
            taken.append(self._waiting.popleft())
        return taken

    def _fits(self, requests: list[Request], num_free_rows: int) -> bool:
        num_samples = sum(request.params.n for request in requests if request.needs_row)
        if len(requests) == 1:
            return num_free_rows > 0 or num_samples == 0
        if num_samples > num_free_rows or not self._are_scored_alike(requests):
            return False
        return _padding(requests) <= _MAX_PADDING

    def _are_scored_alike(self, requests: list[Request]) -> bool:
        """Whether none is scored, or all of them, and they are few enough for that.

        Logits are made for every prompt of a prefill, so one that is not scored has no place there.
        """
        scored = [request for request in requests if request.is_scored]
        if not scored or len(scored) < len(requests):
            return not scored
        longest = max(len(request.prompt_token_ids) for request in scored)
        num_columns = longest - 1 - min(request.num_context for request in scored)
        return (
            len(scored) * longest <= self._max_scored_tokens
            and len(scored) * num_columns <= self._max_scored_positions
        )


def _share_well(
    taken: Sequence[Request], request: Request, following: Request | None = None
) -> bool:
    """Whether a request may join a prefill without a context being forwarded twice for it.

    A prefill has continuations of one context, or of a context each, none of which is shared with
    the request that comes after.
    """
    if not request.is_scored or not taken:
        return True
    first, last, context = _context(taken[0]), _context(taken[-1]), _context(request)
    if context == last:
        return first == last
    is_shared = following is not None and _context(following) == context != []
    return not is_shared and (len(taken) == 1 or first != last or not last)


def _context(request: Request) -> list[int]:
    return list(request.prompt_token_ids[: request.num_context])


def _padding(requests: Iterable[Request]) -> float:
    """Tokens forwarded with right padding, per token of the prompts."""
    lengths = [len(request.prompt_token_ids) for request in requests]
    return max(lengths) * len(lengths) / sum(lengths)
