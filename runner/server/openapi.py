"""The OpenAPI document: every route, what it takes, and all that it can answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runner import __version__
from runner.openai import schemas
from runner.openai.descriptions import body_schema
from runner.openai.fields import CHAT, COMPLETIONS, DETOKENIZE, EMBEDDINGS, TOKENIZE
from runner.openai.schemas import Schema, whole
from runner.server.guarding import open_paths
from runner.server.service import Service

_PLAIN, _JSON, _EVENTS = "text/plain", "application/json", "text/event-stream"
_BODY_FAILURES = {
    400: "The body cannot be understood, or asks for what cannot be.",
    413: "The body has too many bytes.",
    415: "The body is not application/json.",
}
_KEY_FAILURES = {
    401: "No API key, or a wrong one.",
    429: "Too many requests or tokens of this client, or too many that wait; Retry-After says for "
    "how many seconds.",
}
_NOT_FOUND = {404: "There is none of this name."}
_FORBIDDEN = {403: "Adapters are not read from there."}
_BUG = {500: "The server has made a mistake."}
_ENGINE_FAILURES = {503: "The engine failed, or starts over.", 504: "It took too long."}

_LOAD_ADAPTER = whole(
    {
        "lora_name": {"type": "string", "minLength": 1},
        "lora_path": {"type": "string", "minLength": 1, "description": "Below the adapter root."},
        "load_inplace": {"type": "boolean", "description": "Replaces an adapter of this name."},
    },
    optional=("load_inplace",),
)
_UNLOAD_ADAPTER = whole(
    {"lora_name": {"type": "string", "minLength": 1}, "lora_int_id": {}}, optional=("lora_int_id",)
)


def _given(name: str) -> Schema:
    """A body in which a field is more than null."""
    return {"required": [name], "properties": {name: {"type": ["string", "array"]}}}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One method of one path."""

    method: str
    path: str
    summary: str
    answer: Mapping[str, Any]
    """What 200 brings: a schema for each type of content."""
    failures: Mapping[int, str]
    body: Schema | None = None
    example: Any = None
    """Of the body."""
    statuses: Sequence[int] = (200,)
    """Those that bring what 200 does."""


def _asks(path: str, summary: str, answer: Schema, **more: Any) -> Operation:
    failures = more.pop("failures", {})
    content = more.pop("content", {_JSON: answer})
    return Operation(
        method="get", path=path, summary=summary, answer=content, failures=failures, **more
    )


def _sends(
    path: str, summary: str, answer: Mapping[str, Any], *, body: Schema, example: Any, failures: Any
) -> Operation:
    return Operation(
        method="post",
        path=path,
        summary=summary,
        answer=answer,
        body=body,
        example=example,
        failures=_BODY_FAILURES | failures,
    )


_ANSWERING = _NOT_FOUND | _ENGINE_FAILURES
OPERATIONS = (
    _asks("/health", "Whether the server lives.", schemas.STATUS, statuses=(200, 503)),
    _asks("/ready", "Whether it takes requests now.", schemas.STATUS, statuses=(200, 503)),
    _asks("/version", "The version of this program.", schemas.VERSION),
    _asks("/metrics", "Counts and times, for Prometheus.", {}, content={_PLAIN: schemas.TEXT}),
    _sends(
        "/v1/completions",
        "Completes prompts.",
        {_JSON: schemas.COMPLETION, _EVENTS: schemas.TEXT},
        body=body_schema(COMPLETIONS.online),
        example={"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0},
        failures=_ANSWERING,
    ),
    _sends(
        "/v1/chat/completions",
        "Answers a conversation.",
        {_JSON: schemas.CHAT_COMPLETION, _EVENTS: schemas.TEXT},
        body=body_schema(CHAT.online),
        example={"messages": [{"role": "user", "content": "Name a fruit."}], "max_tokens": 8},
        failures=_ANSWERING,
    ),
    _sends(
        "/v1/embeddings",
        "Makes vectors of texts.",
        {_JSON: schemas.EMBEDDINGS},
        body=body_schema(EMBEDDINGS),
        example={"input": ["Hello", "Good day"]},
        failures=_ANSWERING,
    ),
    _asks("/v1/models", "The model, its other names, and its adapters.", schemas.MODELS),
    _asks("/v1/models/{name}", "One of them.", schemas.MODEL, failures=_NOT_FOUND),
    _sends(
        "/v1/load_lora_adapter",
        "Loads an adapter.",
        {_PLAIN: schemas.TEXT},
        body=_LOAD_ADAPTER,
        example={"lora_name": "poems", "lora_path": "poems"},
        failures=_FORBIDDEN | _ANSWERING,
    ),
    _sends(
        "/v1/unload_lora_adapter",
        "Forgets an adapter.",
        {_PLAIN: schemas.TEXT},
        body=_UNLOAD_ADAPTER,
        example={"lora_name": "poems"},
        failures=_ANSWERING,
    ),
    _sends(
        "/tokenize",
        "The token ids of a text or of a conversation.",
        {_JSON: schemas.TOKENS},
        body=body_schema(TOKENIZE) | {"oneOf": [_given("prompt"), _given("messages")]},
        example={"prompt": "Hello", "add_special_tokens": False},
        failures=_NOT_FOUND,
    ),
    _sends(
        "/detokenize",
        "The text of token ids.",
        {_JSON: schemas.DETOKENIZED},
        body=body_schema(DETOKENIZE),
        example={"tokens": [1, 2, 3]},
        failures=_NOT_FOUND,
    ),
    _asks(
        "/tokenizer_info", "What a client needs to know of the tokenizer.", schemas.TOKENIZER_INFO
    ),
)
"""All that the server does, but for this document itself."""


def document(service: Service) -> dict[str, Any]:
    """The document of a server, as its options make it."""
    needs_key = len(service.keys) > 0
    is_open = open_paths(metrics_need_key=service.settings.metrics_need_key)
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        shown = _shown(operation, is_open=operation.path in is_open, needs_key=needs_key)
        paths.setdefault(operation.path, {})[operation.method] = shown
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "runner",
            "version": __version__,
            "description": "A model behind OpenAI's endpoints.",
        },
        "paths": paths,
        "components": {"schemas": {"Error": schemas.ERROR}},
    }
    if needs_key:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _shown(operation: Operation, *, is_open: bool, needs_key: bool) -> dict[str, Any]:
    failures = dict(operation.failures) | _BUG | ({} if is_open else _KEY_FAILURES)
    content = {kind: {"schema": schema} for kind, schema in operation.answer.items()}
    answers = {
        str(status): {"description": "The answer.", "content": content}
        for status in operation.statuses
    }
    error = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    told = {str(status): {"description": why, "content": error} for status, why in failures.items()}
    shown: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path}".replace("/", "_").strip("_{}"),
        "responses": dict(sorted((told | answers).items())),
    }
    if "{name}" in operation.path:
        name = {"name": "name", "in": "path", "required": True, "schema": schemas.TEXT}
        shown["parameters"] = [name]
    if operation.body is not None:
        taken = {"schema": operation.body, "example": operation.example}
        shown["requestBody"] = {"required": True, "content": {_JSON: taken}}
    if needs_key and not is_open:
        shown["security"] = [{"key": []}]
    return shown
