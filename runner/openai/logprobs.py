"""Logprobs as OpenAI's responses hold them: one shape for completions, another for chat.

The numbers are raw: of the model's own distribution, before penalties, biases, temperature and
truncation, which is what OpenAI's clients and vLLM's default take them for. They are finite.
"""

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

from runner.types import Completion, Logprob, RequestOutput

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
        "text_offset": list(text_offsets(sample.text, sample.token_ids, spelling.bytes_of)),
        "token_logprobs": [finite(logprob) for logprob in sample.raw_logprobs],
        "tokens": [spelling.in_completion(token_id) for token_id in sample.token_ids],
        "top_logprobs": [_by_token(step, spelling) for step in sample.logprobs],
    }


def echoed_prompt(output: RequestOutput, token_bytes: TokenBytes) -> str:
    """The prompt as a choice with `echo` begins with it; that of token ids with special tokens."""
    if output.prompt is not None:
        return output.prompt
    return b"".join(map(token_bytes, output.prompt_token_ids)).decode(errors="replace")


def echoed_logprobs(
    output: RequestOutput, sample: Completion, spelling: Spelling
) -> dict[str, Any] | None:
    """Like `completion_logprobs`, the prompt's own before them; nothing precedes its first token,
    which has null."""
    completed, steps = completion_logprobs(sample, spelling), output.prompt_logprobs
    if completed is None or steps is None:
        return None
    token_ids, prompt = output.prompt_token_ids, echoed_prompt(output, spelling.bytes_of)
    offsets = [len(prompt) + offset for offset in completed["text_offset"]]
    pairs = zip(token_ids, steps, strict=True)
    echoed = {
        "text_offset": [*text_offsets(prompt, token_ids, spelling.bytes_of)],
        "token_logprobs": [finite(step[it].logprob) if step else None for it, step in pairs],
        "tokens": [spelling.in_completion(token_id) for token_id in token_ids],
        "top_logprobs": [_by_token(step, spelling) if step else None for step in steps],
    }
    return {
        name: echoed[name] + part for name, part in (completed | {"text_offset": offsets}).items()
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


def text_offsets(text: str, token_ids: Sequence[int], token_bytes: TokenBytes) -> Iterator[int]:
    """Where in a text each of its tokens begins, in characters; never beyond the text's end.

    A token that the text leaves out, a special one or what came after a stop string, has the
    offset of what follows it.
    """
    place, pending, started = 0, codecs.getincrementaldecoder("utf-8")("replace"), 0
    for token_id in token_ids:
        is_first = pending.getstate()[0] == b""
        started = place if is_first else started
        yield started
        said = pending.decode(token_bytes(token_id))
        found = text[place : place + len(said)]
        # Some tokenizers drop the space that a text begins with.
        if place == 0 and found != said and text.startswith(said.lstrip(" ")):
            said = found = said.lstrip(" ")
        if said.startswith(found):
            place += len(found)
