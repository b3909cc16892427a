"""Logprobs as OpenAI's responses hold them: one shape for completions, another for chat.

The numbers are raw: of the model's own distribution, before penalties, biases, temperature and
truncation, which is what OpenAI's clients and vLLM's default take them for. They are finite.
"""

import math
from collections.abc import Sequence
from typing import Any

from runner.text_offsets import TokenBytes
from runner.types import Logprob, TextTokens

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
    tokens: TextTokens, steps: Sequence[dict[int, Logprob] | None], spelling: Spelling
) -> dict[str, Any]:
    """The `logprobs` of a completion's choice, or of a piece of one.

    `steps` has the alternatives of each token. `text_offset` counts characters of the choice's
    text. An entry of `top_logprobs` has the token itself too, so it may hold one more than was
    asked for; of two tokens that are written alike it keeps the likelier one. A token that nothing
    precedes has null.
    """
    return {
        "text_offset": tokens.text_offsets,
        "token_logprobs": [None if it is None else finite(it) for it in tokens.logprobs],
        "tokens": [spelling.in_completion(token_id) for token_id in tokens.token_ids],
        "top_logprobs": [_by_token(step, spelling) if step else None for step in steps],
    }


def prompt_logprobs(
    steps: Sequence[dict[int, Logprob] | None],
) -> list[dict[str, Any] | None]:
    """The `prompt_logprobs` of vLLM: per token of the prompt itself, first, and the alternatives.

    The first, which nothing precedes, is null.
    """
    return [
        None
        if step is None
        else {
            str(token_id): {
                "logprob": finite(it.logprob),
                "rank": it.rank,
                "decoded_token": it.decoded_token,
            }
            for token_id, it in step.items()
        }
        for step in steps
    ]


def _by_token(step: dict[int, Logprob], spelling: Spelling) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in _likeliest_first(step):
        found.setdefault(spelling.in_completion(token_id), finite(logprob.logprob))
    return found


def chat_logprobs(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    steps: Sequence[dict[int, Logprob]],
    spelling: Spelling,
    *,
    num_top: int,
) -> dict[str, Any]:
    """The `logprobs` of a chat completion's choice, or of a piece of one.

    `logprobs` and `steps` have an entry for each token; of the alternatives in a step the likeliest
    `num_top` are shown.
    """
    content = []
    for token_id, logprob, step in zip(token_ids, logprobs, steps, strict=True):
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
