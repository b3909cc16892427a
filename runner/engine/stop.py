"""Stop strings: found in the text as it grows, also where they straddle tokens."""

from collections.abc import Sequence
from functools import partial
from typing import Protocol


class Decode(Protocol):
    """Token ids -> text, given by whoever owns a tokenizer."""

    def __call__(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of the tokens."""


class TextStream:
    """Text of a growing list of token ids, without ever showing half a character.

    Decodes a short window twice and takes the difference, because many tokenizers decode a token
    differently at the start of a text than inside it.
    """

    def __init__(self, decode: Decode, *, skip_special_tokens: bool) -> None:
        self._decode = partial(decode, skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []
        self._window_start = 0
        self._num_read = 0

    def push(self, token_id: int) -> str:
        """Adds a token; returns the characters that are complete now, often none."""
        self._token_ids.append(token_id)
        known = self._decode(self._token_ids[self._window_start : self._num_read])
        text = self._decode(self._token_ids[self._window_start :])
        if len(text) <= len(known) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._window_start = self._num_read
        self._num_read = len(self._token_ids)
        return text[len(known) :]


class StopStringMatcher:
    """Watches one sequence for the first of its stop strings."""

    def __init__(
        self,
        stop: Sequence[str],
        decode: Decode,
        *,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """A stop string that the first `min_tokens` tokens complete is text like any other."""
        assert stop and all(stop), "nothing to watch for"
        self._stop = stop
        self._num_held_back = min_tokens
        self._overlap = max(map(len, stop)) - 1
        self._stream = TextStream(decode, skip_special_tokens=skip_special_tokens)
        self._tail = ""

    def push(self, token_id: int) -> str | None:
        """Adds a token; returns the stop string that the text holds now, the earliest one."""
        seen = len(self._tail)
        text = self._tail + self._stream.push(token_id)
        self._tail = text[max(0, len(text) - self._overlap) :]
        if self._num_held_back > 0:
            self._num_held_back -= 1
            return None
        # From where a match reaches into the new text: an older one was passed over on purpose.
        found = [(text.find(stop, max(0, seen - len(stop) + 1)), stop) for stop in self._stop]
        found = [match for match in found if match[0] >= 0]
        return min(found)[1] if found else None
