"""Bodies of OpenAI's requests -> requests to one model, and what it says -> bodies of responses."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from runner.errors import ModelError, ParameterError
from runner.llm import LLM
from runner.models.token_bytes import TokenBytes
from runner.openai.chunks import Chunks
from runner.openai.embeddings import (
    EmbeddingRequest,
    dimensions_error,
    embedding_body,
    parse_embedding_request,
)
from runner.openai.errors import ApiError
from runner.openai.requests import ApiRequest, parameter_error, parse_request
from runner.openai.responses import check_outputs, response_body
from runner.types import Pooling, RequestOutput, SamplingParams

AnyRequest: TypeAlias = ApiRequest | EmbeddingRequest
"""A body that is understood."""


class Answerer:
    """One model under the names that clients know it by."""

    def __init__(
        self,
        llm: LLM,
        defaults: SamplingParams,
        names: Sequence[str],
        *,
        check_model: bool = True,
        adapter: str | None = None,
        pooling: Pooling = "mean",
    ) -> None:
        """`names` are those of the model; answers say the first, or the adapter that was asked.

        `adapter` is that of requests which name none; without `check_model` one may name anything.
        `pooling` is that of embeddings.
        """
        self.llm = llm
        self.names = list(names)
        self._defaults = defaults
        self._check_model = check_model
        self._adapter = adapter
        self._pooling = pooling
        self.token_bytes = TokenBytes(llm.tokenizer)

    def understand(
        self, url: str, body: Mapping[str, Any], *, is_online: bool = False
    ) -> ApiRequest:
        """What a body asks; raises `ApiError` where this model cannot be asked that."""
        request = parse_request(url, body, self._defaults, is_online=is_online)
        self.check_name(request.model)
        try:
            self.llm.check(request.params)
        except ParameterError as error:
            raise parameter_error(error, {}) from error
        return request

    def understand_embedding(self, body: Mapping[str, Any]) -> EmbeddingRequest:
        """What the body of a request for embeddings asks; raises `ApiError` as `understand`."""
        request = parse_embedding_request(body, pooling=self._pooling)
        self.check_name(request.model)
        try:
            request.params.check(self.llm.engine.admission.embedding_size)
        except ParameterError as error:
            raise dimensions_error(error) from error
        except ModelError as error:
            raise ApiError(str(error), code="unsupported_endpoint") from error
        return request

    def check_name(self, model: str | None) -> None:
        """Raises `ApiError` where a client asks for a model or an adapter that is not there."""
        is_other = model is not None and model not in {*self.names, *self.llm.adapters}
        if self._check_model and is_other:
            what = f"The model {model!r} does not exist; this one is {self.names[0]!r}."
            raise ApiError(what, code="model_not_found", param="model", status=404)

    def adapter_of(self, request: AnyRequest) -> str | None:
        """The adapter that a request names as its model, or that of all."""
        return request.model if request.model in self.llm.adapters else self._adapter

    def body(
        self, request: ApiRequest, outputs: Sequence[RequestOutput], *, name: str
    ) -> dict[str, Any]:
        """The response to a request whose outputs are there; raises `ApiError` if one failed."""
        check_outputs(request, outputs, max_model_len=self.llm.engine.max_model_len)
        return response_body(
            request,
            outputs,
            name=name,
            model=self.model_of(request),
            created=int(time.time()),
            token_bytes=self.token_bytes,
        )

    def embedding_body(
        self, request: EmbeddingRequest, outputs: Sequence[RequestOutput]
    ) -> dict[str, Any]:
        """Like `body`, of a request for embeddings."""
        check_outputs(request, outputs, max_model_len=self.llm.engine.max_model_len)
        return embedding_body(request, outputs, model=self.model_of(request))

    def chunks(self, request: ApiRequest, *, name: str) -> Chunks:
        """Makes the chunks of a response that comes in pieces."""
        return Chunks(
            request,
            name=name,
            model=self.model_of(request),
            created=int(time.time()),
            token_bytes=self.token_bytes,
        )

    def model_of(self, request: AnyRequest) -> str:
        """The name of what answers a request: an adapter, or the model."""
        return self.adapter_of(request) or self.names[0]
