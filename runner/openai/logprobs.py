"""Logprobs as OpenAI's responses hold them: one shape for completions, another for chat.

The numbers are raw: of the model's own distribution, before penalties, biases, temperature and
truncation, which is what OpenAI's clients and vLLM's default take them for. They are finite.
"""

import codecs
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from runner.types import Completion, Logprob

TokenBytes: TypeAlias = Callable[[int], bytes]
"""The bytes that a token id stands for, also where they are half a character."""

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for a token that cannot be; JSON has no infinity."""


def finite(logprob: float) -> float:
    """A logprob as JSON can hold it."""
    assert not math.isnan(logprob), "a sample with a NaN is an error before it is shown"
    return max(logprob, LEAST_LOGPROB)


class Spelling:
    """How tokens are written in one response."""

    def __init__(self, token_bytes: TokenBytes, *, as_token_ids: bool) -> None:
        """`as_token_ids` writes `token_id:17`, which tells any two tokens apart, as in vLLM."""
        self.bytes_of = token_bytes
        self._as_token_ids = as_token_ids

    def in_completion(self, token_id: int) -> str:
        """The token as completions have it; half a character is `bytes:\\xe2\\x80`."""
        return self._spelled(token_id, "bytes:")

    def in_chat(self, token_id: int) -> str:
        """The token as chat completions have it; half a character is `\\xe2\\x80`."""
        return self._spelled(token_id, "")

    def _spelled(self, token_id: int, prefix: str) -> str:
        if self._as_token_ids:
            return f"token_id:{token_id}"
        raw = self.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return prefix + "".join(f"\\x{byte:02x}" for byte in raw)


def completion_logprobs(sample: Completion, spelling: Spelling) -> dict[str, Any] | None:
    """The `logprobs` of a completion's choice; None where they were not asked for.

    `text_offset` counts characters of the choice's text. An entry of `top_logprobs` has the sampled
    token too, so it may hold one more than was asked for; of two tokens that are written alike it
    keeps the likelier one.
    """
    if sample.logprobs is None:
        return None
    return {
        "text_offset": list(text_offsets(sample, spelling.bytes_of)),
        "token_logprobs": [finite(logprob) for logprob in sample.raw_logprobs],
        "tokens": [spelling.in_completion(token_id) for token_id in sample.token_ids],
        "top_logprobs": [_by_token(step, spelling) for step in sample.logprobs],
    }


def _by_token(step: dict[int, Logprob], spelling: Spelling) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in _likeliest_first(step):
        found.setdefault(spelling.in_completion(token_id), finite(logprob.logprob))
    return found


def chat_logprobs(
    sample: Completion, spelling: Spelling, *, num_top: int | None
) -> dict[str, Any] | None:
    """The `logprobs` of a chat completion's choice; None where they were not asked for.

    num_top: alternatives for each token, the likeliest first.
    """
    if sample.logprobs is None or num_top is None:
        return None
    content = []
    steps = zip(sample.token_ids, sample.raw_logprobs, sample.logprobs, strict=True)
    for token_id, logprob, step in steps:
        top = [_chat_token(i, it.logprob, spelling) for i, it in _likeliest_first(step)[:num_top]]
        content.append(_chat_token(token_id, logprob, spelling) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, spelling: Spelling) -> dict[str, Any]:
    return {
        "token": spelling.in_chat(token_id),
        "bytes": list(spelling.bytes_of(token_id)),
        "logprob": finite(logprob),
    }


def _likeliest_first(step: dict[int, Logprob]) -> list[tuple[int, Logprob]]:
    return sorted(step.items(), key=lambda item: -item[1].logprob)


def text_offsets(sample: Completion, token_bytes: TokenBytes) -> Iterator[int]:
    """Where in the text each token begins, in characters; never beyond the text's end.

    A token that the text leaves out, a special one or what came after a stop string, has the
    offset of what follows it.
    """
    place, pending, started = 0, codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token_id in sample.token_ids:
        is_first = pending.getstate()[0] == b""
        started = place if is_first else started
        yield started
        said = pending.decode(token_bytes(token_id))
        found = sample.text[place : place + len(said)]
        # Some tokenizers drop the space that a text begins with.
        if place == 0 and found != said and sample.text.startswith(said.lstrip(" ")):
            said = found = said.lstrip(" ")
        if said.startswith(found):
            place += len(found)
