"""How much a client may ask for in a minute: requests, and tokens of prompts and completions."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from runner.openai.errors import ApiError

_MOST_IDLE = 1024
"""Clients remembered until those are forgotten that have all of their allowance."""


class Bucket:
    """A token bucket: it fills evenly up to what a minute allows, and may be overdrawn."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        """`clock` gives seconds, from whenever it likes."""
        self.per_minute = per_minute
        self._clock, self._filled = clock, float(per_minute)
        self._at = clock()

    @property
    def level(self) -> float:
        """What may be taken now; below 0 where more was used than there was."""
        now = self._clock()
        grown = (now - self._at) * self.per_minute / 60
        self._filled, self._at = min(self.per_minute, self._filled + grown), now
        return self._filled

    def seconds_until(self, amount: float) -> float:
        """Until as much is there."""
        return max(0.0, amount - self.level) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        """Takes something, also what is not there; a negative amount is given back."""
        self._filled = min(self.per_minute, self.level - amount)


@dataclass(frozen=True)
class Allowance:
    """What one client may ask for."""

    requests: Bucket | None
    tokens: Bucket | None

    @property
    def is_whole(self) -> bool:
        """Whether it is as if the client had never asked."""
        return all(it.level >= it.per_minute for it in (self.requests, self.tokens) if it)

    def take_request(self) -> None:
        """Counts a request; raises `ApiError` where it has to wait."""
        if self.requests is not None:
            self._wait(self.requests, 1, "requests")
            self.requests.take(1)

    def take_prompt(self, num_tokens: int) -> None:
        """Counts the tokens of a prompt; raises `ApiError` where it has to wait."""
        if self.tokens is None:
            return
        if num_tokens > (most := self.tokens.per_minute):
            what = f"The prompt has {num_tokens} tokens; a client may use {most} in a minute."
            raise ApiError(what, code="request_too_large", param="prompt")
        self._wait(self.tokens, num_tokens, "tokens")
        self.tokens.take(num_tokens)

    def take_tokens(self, num_tokens: int) -> None:
        """Counts tokens that are there already; those of a negative number are given back."""
        if self.tokens is not None:
            self.tokens.take(num_tokens)

    @property
    def headers(self) -> dict[str, str]:
        """How much is left, as OpenAI's servers say it."""
        shown = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                shown[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
                shown[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level)))
                reset = bucket.seconds_until(bucket.per_minute)
                shown[f"x-ratelimit-reset-{name}"] = f"{reset:.3f}s"
        return shown

    def _wait(self, bucket: Bucket, amount: int, name: str) -> None:
        seconds = bucket.seconds_until(amount)
        if seconds > 0:
            what = f"The limit is {bucket.per_minute} {name} per minute; try again later."
            wait = {"Retry-After": str(math.ceil(seconds))}
            raise ApiError(what, code="rate_limit_exceeded", status=429, headers=wait)


class Limits:
    """The allowances of all clients."""

    def __init__(
        self,
        requests_per_minute: int | None,
        tokens_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """None sets no limit; `clock` gives seconds."""
        self._requests, self._tokens, self._clock = requests_per_minute, tokens_per_minute, clock
        self._clients: dict[str, Allowance] = {}
        self._forget_at = _MOST_IDLE

    def of(self, client: str) -> Allowance:
        """What a client may ask for; it is the same object as long as it is not whole again."""
        if client not in self._clients:
            self._forget()
            self._clients[client] = Allowance(
                self._bucket(self._requests), self._bucket(self._tokens)
            )
        return self._clients[client]

    def __len__(self) -> int:
        return len(self._clients)

    def _bucket(self, per_minute: int | None) -> Bucket | None:
        return None if per_minute is None else Bucket(per_minute, self._clock)

    def _forget(self) -> None:
        """Keeps the memory for clients that come and go in bounds."""
        if len(self._clients) < self._forget_at:
            return
        self._clients = {name: it for name, it in self._clients.items() if not it.is_whole}
        self._forget_at = max(_MOST_IDLE, 2 * len(self._clients))
