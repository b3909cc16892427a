"""Outputs -> the response bodies that OpenAI's clients parse."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.openai.embeddings import EmbeddingRequest
from runner.openai.errors import ApiError
from runner.openai.logprobs import Spelling, chat_logprobs, completion_logprobs, prompt_logprobs
from runner.openai.requests import ApiRequest
from runner.text_offsets import TokenBytes, text_offsets
from runner.text_stream import TextDelta
from runner.types import Completion, ErrorInfo, RequestOutput, TextTokens

_TOO_LONG = "context_length_exceeded"


def check_outputs(
    request: ApiRequest | EmbeddingRequest,
    outputs: Sequence[RequestOutput],
    *,
    max_model_len: int | None,
) -> None:
    """Raises `ApiError` where some prompt was refused or some sample is not whole.

    A response has all of its choices or there is none.
    """
    name = request.endpoint.prompt_field
    for place, output in enumerate(outputs):
        where = f"{'input' if name == 'input' else 'prompt'} {place}: " if len(outputs) > 1 else ""
        if output.error is not None:
            length = len(output.prompt_token_ids)
            is_long = max_model_len is not None and length >= max_model_len
            code = _TOO_LONG if is_long else "invalid_value"
            what = f"{where}{output.error.message}"
            raise ApiError(what, code=code, param=name)
        scored = output.prompt_token_logprobs
        if scored is not None and any(map(math.isnan, scored.logprobs)):
            what = f"{where}a logprob of the prompt's is not a number"
            raise ApiError(what, code="model_output_error", status=500)
        for sample in output.outputs:
            if sample.error is not None:
                raise _failed(sample.error, where)


def check_piece(delta: TextDelta) -> None:
    """Raises `ApiError` where a sample that is told of on the way has failed."""
    done, scored = delta.completion, delta.output.prompt_token_logprobs
    if scored is not None and any(map(math.isnan, scored.logprobs)):
        what = "a logprob of the prompt's is not a number"
        raise ApiError(what, code="model_output_error", status=500)
    if done is not None and done.error is not None:
        raise _failed(done.error)


def _failed(error: ErrorInfo, where: str = "") -> ApiError:
    is_output = error.type == "ModelOutputError"
    code = "model_output_error" if is_output else "server_error"
    return ApiError(where + error.message, code=code, status=500)


def response_body(
    request: ApiRequest,
    outputs: Sequence[RequestOutput],
    *,
    name: str,
    model: str,
    created: int,
    token_bytes: TokenBytes,
) -> dict[str, Any]:
    """The body of a response.

    Args:
        request: what was asked.
        outputs: one for each prompt, in order, all of them whole.
        name: what is to follow `cmpl-` or `chatcmpl-` in the id.
        model: the name of the model that answered.
        created: seconds since 1970.
        token_bytes: the bytes of a token.
    """
    spelling = Spelling(token_bytes, as_token_ids=request.return_tokens_as_token_ids)
    choices = _chat_choices if request.is_chat else _completion_choices
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{name}",
        "object": "chat.completion" if request.is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": list(choices(request, outputs, spelling)),
        "usage": usage(outputs),
    }
    if request.is_chat:
        body |= prompt_fields(request, outputs[0])
    return body


def prompt_fields(request: ApiRequest, output: RequestOutput) -> dict[str, Any]:
    """What is shown of a prompt beside its completions, where it is asked for.

    It stands in each choice of a completion, and beside the choices of a chat completion.
    """
    shown: dict[str, Any] = {}
    if request.return_token_ids:
        shown["prompt_token_ids"] = output.prompt_token_ids
    if request.params.prompt_logprobs is not None:
        shown["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs or [])
    return shown


def usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """Tokens of the prompts, each counted once however many completions it has, and of the
    completions, the tokens that ended them included."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(s.token_ids) for output in outputs for s in output.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _completion_choices(
    request: ApiRequest, outputs: Sequence[RequestOutput], spelling: Spelling
) -> Iterator[Mapping[str, Any]]:
    """The choices of all prompts, those of the first prompt first."""
    index = 0
    for output in outputs:
        for sample in output.outputs:
            logprobs = _completion_logprobs(output, sample, spelling)
            shown = {"index": index, "text": sample.text, "logprobs": logprobs}
            yield shown | ending(request, sample) | prompt_fields(request, output)
            index += 1


def _completion_logprobs(
    output: RequestOutput, sample: Completion, spelling: Spelling
) -> dict[str, Any] | None:
    """Those of a sample, behind those of the prompt with echo; None where they were not asked."""
    if sample.logprobs is None:
        return None
    if sample.echoed is not None:
        steps = [*(output.prompt_logprobs or ()), *sample.logprobs]
        return completion_logprobs(sample.echoed, steps, spelling)
    tokens = TextTokens(
        token_ids=sample.token_ids,
        logprobs=list(sample.raw_logprobs),
        text_offsets=[*text_offsets(sample.text, sample.token_ids, spelling.bytes_of)],
    )
    return completion_logprobs(tokens, sample.logprobs, spelling)


def _chat_choices(
    request: ApiRequest, outputs: Sequence[RequestOutput], spelling: Spelling
) -> Iterator[Mapping[str, Any]]:
    (output,) = outputs
    for sample in output.outputs:
        message = {"role": "assistant", "content": sample.text, "refusal": None}
        logprobs = None
        if sample.logprobs is not None and (num_top := request.params.logprobs) is not None:
            given = sample.token_ids, sample.raw_logprobs, sample.logprobs
            logprobs = chat_logprobs(*given, spelling, num_top=num_top)
        shown = {"index": sample.index, "message": message, "logprobs": logprobs}
        yield shown | ending(request, sample)


def ending(request: ApiRequest, sample: Completion) -> dict[str, Any]:
    """Why a choice ended, and its token ids where they are asked for, as vLLM has them."""
    ids = {"token_ids": sample.token_ids} if request.return_token_ids else {}
    return {"finish_reason": sample.finish_reason, "stop_reason": sample.stop_reason} | ids
