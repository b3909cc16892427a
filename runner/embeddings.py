"""Texts -> requests for embeddings -> embeddings."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from runner.errors import ParameterError, PromptError
from runner.pooling import PoolingParams
from runner.prompt_requests import adapter_names, encoded_requests
from runner.scores import Tokens
from runner.types import (
    Embedding,
    Encoded,
    Prompt,
    PromptRequest,
    RequestOutput,
    SamplingParams,
)

Run = Callable[[Iterable[PromptRequest | RequestOutput]], Iterator[RequestOutput]]


def embedding_request(
    request_id: str,
    prompt: Prompt,
    params: PoolingParams,
    *,
    adapter: str | None = None,
    encoded: Encoded | PromptError | None = None,
) -> PromptRequest:
    """What an `LLM` runs to embed a prompt; it samples nothing."""
    return PromptRequest(
        request_id=request_id,
        prompt=prompt,
        params=SamplingParams(max_tokens=1),
        key=request_id,
        adapter=adapter,
        pooling=params.pooling,
        encoded=encoded,
    )


def as_embedding(index: int, output: RequestOutput, params: PoolingParams) -> Embedding:
    """The embedding that came out of the request of one text, or its error."""
    num_tokens, error = len(output.prompt_token_ids), output.error
    error = error or next((it.error for it in output.outputs if it.error is not None), None)
    if error is not None:
        return Embedding(index=index, num_tokens=num_tokens, error=error)
    (sample,) = output.outputs
    assert sample.embedding is not None, "an embedding was asked for"
    vector = params.vector(sample.embedding)
    return Embedding(index=index, num_tokens=num_tokens, vector=vector)


def embeddings(
    run: Run,
    tokenizer: Any,
    inputs: Sequence[Tokens],
    params: PoolingParams,
    adapter: str | None | Sequence[str | None],
) -> Iterator[Embedding]:
    """Embeds texts, or token ids; yields each embedding as it is there.

    Raises ParameterError at once for what is neither, or one adapter too many or too few.
    """
    listed = [inputs] if isinstance(inputs, str) else list(inputs)
    names = adapter_names(adapter, len(listed))
    requests = [
        embedding_request(str(index), _prompt(index, given), params, adapter=name)
        for index, (given, name) in enumerate(zip(listed, names, strict=True))
    ]
    outputs = run(encoded_requests(requests, tokenizer))
    return (as_embedding(int(it.request_id), it, params) for it in outputs)


def _prompt(index: int, given: Any) -> Prompt:
    if isinstance(given, str):
        return Prompt(text=given)
    is_list = isinstance(given, Sequence) and not isinstance(given, bytes | bytearray)
    if is_list and all(type(item) is int for item in given):
        return Prompt(token_ids=list(given))
    what = f"{given!r:.60} is neither a text nor a list of token ids"
    raise ParameterError(f"input {index} cannot be embedded: {what}")
