"""Logprobs as OpenAI's responses hold them: one shape for completions, another for chat.

The numbers are raw: of the model's own distribution, before penalties, biases, temperature and
truncation, which is what OpenAI's clients and vLLM's default take them for. They are finite.
"""

import math
from collections.abc import Sequence
from typing import Any

from runner.text_offsets import TokenBytes, text_offsets
from runner.types import Completion, Logprob, TextTokens

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


def completion_logprobs(
    sample: Completion,
    spelling: Spelling,
    *,
    prompt_logprobs: Sequence[dict[int, Logprob] | None] = (),
) -> dict[str, Any] | None:
    """The `logprobs` of a completion's choice; None where they were not asked for.

    `text_offset` counts characters of the choice's text. An entry of `top_logprobs` has the sampled
    token too, so it may hold one more than was asked for; of two tokens that are written alike it
    keeps the likelier one. With echo the prompt's own, which `prompt_logprobs` are, come first, and
    the first of them, which nothing precedes, is null.
    """
    if sample.logprobs is None:
        return None
    shown = sample.echoed or TextTokens(
        token_ids=sample.token_ids,
        logprobs=list(sample.raw_logprobs),
        text_offsets=[*text_offsets(sample.text, sample.token_ids, spelling.bytes_of)],
    )
    steps = [*prompt_logprobs, *sample.logprobs]
    return {
        "text_offset": shown.text_offsets,
        "token_logprobs": [None if it is None else finite(it) for it in shown.logprobs],
        "tokens": [spelling.in_completion(token_id) for token_id in shown.token_ids],
        "top_logprobs": [_by_token(step, spelling) if step else None for step in steps],
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
