"""What to prefill next: policy over token ids and counters, without arrays."""

import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from runner.engine.sequence import num_columns
from runner.errors import ParameterError
from runner.types import Request

_MAX_PADDING = 0.25
"""Pads per token of prompts that are prefilled together, at most."""
_FEW_PADS = 32
"""Pads that are always worth one forward instead of two."""
_MIN_SHARED = 16
"""Tokens that prompts begin with alike before that counts, as in the prefix cache."""
_WINDOW = 4
"""Batches of requests that wait, to choose from."""
_PATIENCE = 16
"""Batches of requests that may be admitted past one that waits."""

Order: TypeAlias = Literal["offline", "fcfs"]
FreeRows: TypeAlias = Callable[[int], int]
"""Rows of up to so many columns that could start now."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    token_ids: tuple[int, ...]
    num_columns: int
    """Columns that a row of it may come to fill: its expected work."""
    num_admitted_before: int

    @property
    def num_samples(self) -> int:
        """Rows that it needs; one that is only scored needs none."""
        return self.request.params.n if self.request.needs_row else 0

    @property
    def context(self) -> tuple[int, ...]:
        """What of a scored prompt comes before the first token whose logprob is wanted."""
        return self.token_ids[: self.request.num_context] if self.request.is_scored else ()


class Scheduler:
    """The requests that wait, and which of them are prefilled together next.

    `offline` takes those with the same adapter one after another, of these those that share a
    prefix, and of these, as of all others, the longest first, so that stragglers start early and
    rows of like length stand together. The choice is among `4 * max_batch_size` requests, so that
    memory stays constant however many come; one that has seen `16 * max_batch_size` others
    admitted goes next. `fcfs` takes them as they came, those of a lower `priority` before all
    others. What a row gets does not depend on it.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_prefill_tokens: int,
        max_scored_positions: int = 2048,
        order: Order = "offline",
        max_model_len: int | None = None,
        shares_prefixes: bool = True,
    ) -> None:
        """Takes the limits.

        Args:
            max_batch_size: rows decoded together.
            max_prefill_tokens: tokens, pads included, of prompts that are prefilled together.
            max_scored_positions: those of them that have a logprob.
            order: `offline` or `fcfs`.
            max_model_len: tokens of prompt and completion together; None for no limit.
            shares_prefixes: whether a prompt is cheaper after one that begins alike.
        """
        if order not in get_args(Order):
            raise ParameterError(f"order={order!r} is not allowed: {', '.join(get_args(Order))}")
        self.max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._max_scored_positions = max_scored_positions
        self._order = order
        self._max_model_len = max_model_len
        self._shares_prefixes = shares_prefixes
        self._waiting: dict[str, _Waiting] = {}
        self._last: tuple[int, ...] = ()
        self._last_adapter: str | None = None
        self._num_admitted = 0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def wants_requests(self) -> bool:
        """Whether more requests should be added, so that there is a choice for each freed row."""
        return len(self._waiting) < _WINDOW * self.max_batch_size

    @property
    def fills_up_first(self) -> bool:
        """Whether rows may wait until a batch that is mostly empty is full; clients do not."""
        return self._order == "offline"

    @property
    def next_num_columns(self) -> int:
        """Columns of the request that is next; 0 where none waits."""
        return self._lead(self._waiting.values()).num_columns if self._waiting else 0

    def wants_rows(self, is_admitted: Callable[[str | None], bool] = lambda _: True) -> bool:
        """Whether any request that waits, and whose adapter is admitted, is to be sampled from."""
        requests = [entry.request for entry in self._waiting.values()]
        return any(it.needs_row and is_admitted(it.adapter) for it in requests)

    def add(self, request: Request) -> None:
        """Appends a request to those that wait."""
        last = next(reversed(self._waiting.values()), None)
        self._waiting[request.request_id] = self._entry(request)
        if last is not None and request.priority < last.request.priority:
            self._sort()

    def put_back(self, requests: Iterable[Request]) -> None:
        """Lets requests wait again, before all that have not been admitted yet."""
        entries = {request.request_id: self._entry(request) for request in requests}
        self._waiting = entries | self._waiting
        self._sort()

    def _sort(self) -> None:
        """Puts lower priorities first; of each, those that came first."""
        if self._order == "fcfs":
            entries = sorted(self._waiting.items(), key=lambda item: item[1].request.priority)
            self._waiting = dict(entries)

    def _entry(self, request: Request) -> _Waiting:
        columns = num_columns(request, self._max_model_len)
        return _Waiting(request, tuple(request.prompt_token_ids), columns, self._num_admitted)

    def remove(self, request_id: str) -> Request | None:
        """Takes a waiting request out; None where it is not waiting."""
        entry = self._waiting.pop(request_id, None)
        return None if entry is None else entry.request

    def next_prompts(
        self, free_rows: FreeRows, is_admitted: Callable[[str | None], bool] = lambda _: True
    ) -> list[Request]:
        """Takes the requests to prefill together now, as many as the free rows hold.

        The first is taken as soon as one row is free, also where its n samples need more: its
        prompt is kept until all of them have started. Where none is free for it, all others wait
        but those that are only scored, which need no row. Those whose adapter is not admitted wait.
        """
        waiting = list(self._waiting.values())
        adapters = {it.request.adapter: is_admitted(it.request.adapter) for it in waiting}
        waiting = [it for it in waiting if adapters[it.request.adapter] or not it.request.needs_row]
        if waiting and self._free(self._lead(waiting), free_rows) < 1:
            waiting = [entry for entry in waiting if not entry.request.needs_row]
        if not waiting:
            return []
        lead = self._lead(waiting)
        is_alone = self._free(lead, free_rows) <= lead.num_samples
        taken = [lead] if is_alone else self._with_mates(lead, free_rows)
        for entry in taken:
            del self._waiting[entry.request.request_id]
        self._num_admitted += len(taken)
        self._last, self._last_adapter = lead.token_ids, lead.request.adapter
        return [entry.request for entry in taken]

    @staticmethod
    def _free(entry: _Waiting, free_rows: FreeRows) -> int:
        """Rows that could start now where the longest is this one; without end if it needs none."""
        return free_rows(entry.num_columns) if entry.request.needs_row else sys.maxsize

    def _lead(self, waiting: Collection[_Waiting]) -> _Waiting:
        oldest = next(iter(waiting))
        num_passed = self._num_admitted - oldest.num_admitted_before
        if self._order == "fcfs" or num_passed >= _PATIENCE * self.max_batch_size:
            return oldest
        return max(
            waiting,
            key=lambda it: (
                it.request.adapter == self._last_adapter,
                self._nearness(self._last, it),
                it.request.needs_row,  # Decodes while others are scored.
                it.num_columns,
            ),
        )

    def _nearness(self, token_ids: tuple[int, ...], entry: _Waiting) -> int:
        """2 where a prompt begins for its greater part like `token_ids`, 1 where a little, or 0."""
        half = max(_MIN_SHARED, (len(entry.token_ids) + 1) // 2)
        for nearness, size in ((2, half), (1, _MIN_SHARED)):
            head = entry.token_ids[:size]
            if self._shares_prefixes and len(head) == size and head == token_ids[:size]:
                return nearness
        return 0

    def _with_mates(self, lead: _Waiting, free_rows: FreeRows) -> list[_Waiting]:
        """The lead and those to prefill with it.

        The lead goes alone where what the others share with it is worth waiting for: it is then in
        the prefix cache for them.
        """
        pooling = lead.request.pooling
        others = [it for it in self._of_one_adapter(lead) if it.request.pooling == pooling]
        if pooling is not None:
            if self._order == "offline":
                others.sort(key=lambda it: -it.num_columns)
            return self._fitting(lead, others, free_rows, shared=0)
        if lead.request.is_scored:
            return self._fitting(lead, _scored_with(lead, others), free_rows, shared=0)
        others = [entry for entry in others if not entry.request.is_scored]
        if self._order == "fcfs":
            return self._fitting(lead, others, free_rows, shared=0)
        nearness = [self._nearness(lead.token_ids, entry) for entry in others]
        nearest = max(nearness, default=0)
        near = [it for it, level in zip(others, nearness, strict=True) if level == nearest]
        near.sort(key=lambda it: -it.num_columns)
        least = 0
        if nearest:
            least = min(_num_shared(lead.token_ids, it.token_ids) for it in near)
        taken = self._fitting(lead, near, free_rows, shared=least)
        num_saved = (least - _num_shared(lead.token_ids, self._last)) * (len(taken) - 1)
        return [lead] if num_saved >= len(lead.token_ids) else taken

    def _of_one_adapter(self, lead: _Waiting) -> list[_Waiting]:
        """The others with the lead's adapter; in order of arrival, up to the first with another."""
        others = [entry for entry in self._waiting.values() if entry is not lead]
        is_mate = [entry.request.adapter == lead.request.adapter for entry in others]
        if self._order == "fcfs" and not all(is_mate):
            return others[: is_mate.index(False)]
        return [entry for entry, it in zip(others, is_mate, strict=True) if it]

    def _fitting(
        self, lead: _Waiting, others: list[_Waiting], free_rows: FreeRows, *, shared: int
    ) -> list[_Waiting]:
        """The lead, and of the others those that fit; in order of arrival none overtakes one."""
        taken = [lead]
        num_samples, most_columns = lead.num_samples, lead.num_columns
        for entry in others:
            samples = num_samples + entry.num_samples
            columns = max(most_columns, entry.num_columns)
            is_room = samples == 0 or samples <= free_rows(columns)
            if is_room and self._fit([*taken, entry], shared):
                taken.append(entry)
                num_samples, most_columns = samples, columns
            elif self._order == "fcfs":
                break
        return taken

    def _fit(self, entries: list[_Waiting], shared: int) -> bool:
        """Whether the prompts are of like length beyond what they share, and few enough."""
        longest = max(len(entry.token_ids) for entry in entries)
        forwarded = [len(entry.token_ids) - shared for entry in entries]
        num_pads = max(forwarded) * len(forwarded) - sum(forwarded)
        num_scored = 0
        if entries[0].request.is_scored:
            num_scored = len(entries) * (longest - 1 - min(len(it.context) for it in entries))
        return (
            num_pads <= max(_FEW_PADS, _MAX_PADDING * sum(forwarded))
            and longest * len(entries) <= self._max_prefill_tokens
            and num_scored <= self._max_scored_positions
        )


def _scored_with(lead: _Waiting, others: list[_Waiting]) -> list[_Waiting]:
    """Those that may be scored together with the lead without a context being forwarded twice.

    Logits are made for every prompt of a prefill, so all of it is scored: continuations of one
    context, or texts that have a context each which no other shares.
    """
    scored = [entry for entry in others if entry.request.is_scored]
    together = [entry for entry in scored if entry.context == lead.context != ()]
    if together:
        return sorted(together, key=lambda it: -len(it.token_ids))
    count = Counter(entry.context for entry in scored)
    alone = [entry for entry in scored if entry.context == () or count[entry.context] == 1]
    return sorted(alone, key=lambda it: -len(it.token_ids))


def _num_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Tokens that two prompts begin with alike."""
    size = min(len(one), len(other))
    return bisect_left(range(size), True, key=lambda i: one[: i + 1] != other[: i + 1])
