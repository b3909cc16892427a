"""Pieces of a growing answer -> the chunks that OpenAI's clients put together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner.openai.logprobs import Spelling, chat_logprobs, completion_logprobs
from runner.openai.requests import ApiRequest
from runner.openai.responses import prompt_fields, usage
from runner.text_offsets import TextOffsets, TokenBytes, text_of, text_offsets
from runner.text_stream import TextDelta
from runner.types import Completion, RequestOutput, TextTokens


@dataclass(slots=True)
class _Choice:
    """What has been sent of one choice."""

    offsets: TextOffsets
    """Of its own tokens in its own text."""
    echoed: str = ""
    text: str = ""
    """Its own, without what is echoed."""
    is_begun: bool = False


class Chunks:
    """Makes the chunks of one request."""

    def __init__(
        self,
        request: ApiRequest,
        *,
        name: str,
        model: str,
        created: int,
        token_bytes: TokenBytes,
    ) -> None:
        """Args as in `response_body`."""
        self._request, self._token_bytes = request, token_bytes
        self._spelling = Spelling(token_bytes, as_token_ids=request.return_tokens_as_token_ids)
        self._choices: dict[int, _Choice] = {}
        is_chat = request.is_chat
        self._head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": created,
            "model": model,
        }
        self._tail: dict[str, Any] = {"usage": None} if request.include_usage else {}

    def of(self, place: int, delta: TextDelta) -> Iterator[dict[str, Any]]:
        """The chunks for what a sample of the prompt in a `place` has got."""
        index = place * self._request.params.n + delta.index
        if index not in self._choices:
            self._choices[index] = _Choice(TextOffsets(self._token_bytes))
        choice = self._choices[index]
        if not choice.is_begun:
            choice.is_begun = True
            yield from self._beginning(index, choice, delta.output)
        yield self._chunk(index, self._piece(choice, delta))

    def last(self, outputs: Sequence[RequestOutput]) -> Iterator[dict[str, Any]]:
        """What comes behind all pieces."""
        if self._request.include_usage:
            yield self._head | {"choices": [], "usage": usage(outputs)}

    def _chunk(self, index: int, shown: Mapping[str, Any], **beside: Any) -> dict[str, Any]:
        return self._head | {"choices": [{"index": index} | dict(shown)]} | beside | self._tail

    def _beginning(
        self, index: int, choice: _Choice, prompt: RequestOutput
    ) -> Iterator[dict[str, Any]]:
        """What comes before the first piece of a choice: the role, or the prompt that is echoed."""
        beside = prompt_fields(self._request, prompt)
        nothing = {"logprobs": None, "finish_reason": None}
        if self._request.is_chat:
            role = {"delta": {"role": "assistant", "content": ""}}
            yield self._chunk(index, role | nothing, **beside)
        elif self._request.params.echo:
            yield self._chunk(index, self._echo(choice, prompt) | beside)
        elif beside:
            yield self._chunk(index, {"text": ""} | nothing | beside)

    def _echo(self, choice: _Choice, prompt: RequestOutput) -> dict[str, Any]:
        token_ids = prompt.prompt_token_ids
        text = prompt.prompt
        choice.echoed = text_of(token_ids, self._token_bytes) if text is None else text
        logprobs = None
        if self._request.params.logprobs is not None:
            scored = prompt.prompt_token_logprobs
            assert scored is not None, "echo asks for them"
            shown = TextTokens(
                token_ids=list(token_ids),
                logprobs=scored.with_nulls(),
                text_offsets=[*text_offsets(choice.echoed, token_ids, self._token_bytes)],
            )
            steps = prompt.prompt_logprobs or []
            logprobs = completion_logprobs(shown, steps, self._spelling)
        return {"text": choice.echoed, "logprobs": logprobs, "finish_reason": None}

    def _piece(self, choice: _Choice, delta: TextDelta) -> dict[str, Any]:
        choice.text += delta.text
        end = _ending(self._request, delta)
        if self._request.is_chat:
            content = {"content": delta.text} if delta.text else {}
            return {"delta": content, "logprobs": self._chat_logprobs(delta)} | end
        logprobs = None
        if self._request.params.logprobs is not None:
            offsets = choice.offsets.of(choice.text, delta.token_ids)
            shown = TextTokens(
                token_ids=delta.token_ids,
                logprobs=list(delta.raw_logprobs),
                text_offsets=[len(choice.echoed) + offset for offset in offsets],
            )
            logprobs = completion_logprobs(shown, delta.logprobs, self._spelling)
        return {"text": delta.text, "logprobs": logprobs} | end

    def _chat_logprobs(self, delta: TextDelta) -> dict[str, Any] | None:
        num_top = self._request.params.logprobs
        if num_top is None:
            return None
        return chat_logprobs(
            delta.token_ids, delta.raw_logprobs, delta.logprobs, self._spelling, num_top=num_top
        )


def _ending(request: ApiRequest, delta: TextDelta) -> dict[str, Any]:
    ids = {"token_ids": delta.token_ids} if request.return_token_ids else {}
    done: Completion | None = delta.completion
    if done is None:
        return {"finish_reason": None} | ids
    return {"finish_reason": done.finish_reason, "stop_reason": done.stop_reason} | ids
