"""`/v1/embeddings`: a request body -> what to embed, and outputs -> the body of the response."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runner.embeddings import as_embedding, embedding_request
from runner.errors import ParameterError
from runner.openai.errors import ApiError
from runner.openai.fields import EMBEDDINGS, Endpoint, checked_fields
from runner.openai.requests import as_prompts
from runner.pooling import PoolingParams
from runner.types import Pooling, Prompt, PromptRequest, RequestOutput

MOST_INPUTS = 2048
"""Texts in one request at most, as OpenAI has it."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """A request body, understood."""

    model: str | None
    """The name that the client gave; None where it gave none."""
    prompts: tuple[Prompt, ...]
    params: PoolingParams
    is_base64: bool = False
    """Whether vectors are written as base64 of little-endian float32."""
    endpoint: Endpoint = EMBEDDINGS
    stream: bool = False
    """A vector has no pieces."""

    def prompt_requests(
        self, request_id: str, *, key: str = "", adapter: str | None = None
    ) -> list[PromptRequest]:
        """One request per text, named `request_id/0`, …, all with one adapter.

        `key` decides draws elsewhere; here nothing is drawn.
        """
        return [
            embedding_request(f"{request_id}/{place}", prompt, self.params, adapter=adapter)
            for place, prompt in enumerate(self.prompts)
        ]


def parse_embedding_request(
    body: Mapping[str, Any], *, pooling: Pooling = "mean"
) -> EmbeddingRequest:
    """Understands the body of a request for embeddings; raises `ApiError`.

    `pooling` is the server's own: OpenAI's API has no field for it. Vectors have the length 1.
    """
    fields = checked_fields(body, EMBEDDINGS)
    prompts = as_prompts("input", fields["input"])
    if len(prompts) > MOST_INPUTS:
        what = f"'input' has {len(prompts)} texts: {MOST_INPUTS} are allowed in a request."
        raise ApiError(what, code="invalid_value", param="input")
    try:
        params = PoolingParams(pooling=pooling, dimensions=fields.get("dimensions"))
    except ParameterError as error:
        raise dimensions_error(error) from error
    return EmbeddingRequest(
        model=fields.get("model"),
        prompts=prompts,
        params=params,
        is_base64=fields.get("encoding_format") == "base64",
    )


def dimensions_error(error: ParameterError) -> ApiError:
    """What a client is told that asks for dimensions which there are not."""
    return ApiError(str(error), code="invalid_value", param="dimensions")


def embedding_body(
    request: EmbeddingRequest, outputs: Sequence[RequestOutput], *, model: str
) -> dict[str, Any]:
    """The body of a response; `outputs` are one for each text, in order, all of them whole."""
    found = [as_embedding(i, output, request.params) for i, output in enumerate(outputs)]
    num_tokens = sum(embedding.num_tokens for embedding in found)
    data = [
        {
            "object": "embedding",
            "index": it.index,
            "embedding": _base64(it.vector) if request.is_base64 else it.vector,
        }
        for it in found
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _base64(vector: Sequence[float]) -> str:
    return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
