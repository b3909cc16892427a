"""The OpenAPI document says what the server does: its routes, its bodies, its answers."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute, APIRouter
from jsonschema import Draft202012Validator
from serving import ask, complete, tiny_service

from runner.openai.descriptions import DESCRIPTIONS, body_schema
from runner.openai.fields import (
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    TOKENIZE,
    checked_fields,
)
from runner.server.app import create_app
from runner.server.engine_thread import EngineThread
from runner.server.openapi import document
from runner.server.service import Service

ENDPOINTS = [COMPLETIONS.online, CHAT.online, EMBEDDINGS, TOKENIZE, DETOKENIZE]
MESSAGES = [{"role": "user", "content": "hi"}]
NEEDED = {"prompt": "hi", "input": "hi", "messages": MESSAGES, "tokens": [5], "": None}


def test_every_route_is_described(service: Service) -> None:
    app = create_app(service)
    shown = {(path, it) for path, methods in document(service)["paths"].items() for it in methods}
    found = {
        (route.path.replace(":path", ""), method.lower())
        for route in routes_of(app.router)
        for method in route.methods
    }
    assert shown == found - {("/openapi.json", "get"), ("/docs", "get")}
    assert len({it for _, it in shown}) == 2 and len(shown) >= 13


def routes_of(router: Any) -> Iterator[APIRoute]:
    """Those of a router and of the routers in it."""
    for route in router.routes:
        if isinstance(route, APIRoute):
            yield route
        else:
            inner = getattr(route, "original_router", None)
            assert isinstance(inner, APIRouter), route
            yield from routes_of(inner)


def test_the_document_is_one_of_openapi(service: Service) -> None:
    answer = ask(service, "GET", "/openapi.json")
    assert answer.json() == document(service) == create_app(service).openapi()
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(answer.json())
    schema.validate()
    assert "openapi.json" in ask(service, "GET", "/docs").text


def test_keys_are_said_to_be_needed_where_they_are(engine: EngineThread) -> None:
    shown = document(tiny_service(engine, keys=["k"], metrics_need_key=True))["paths"]
    secured = {
        path for path, methods in shown.items() if any("security" in it for it in methods.values())
    }
    assert secured == set(shown) - {"/health", "/ready", "/version"}
    assert "401" in shown["/v1/models"]["get"]["responses"]
    assert "401" not in shown["/health"]["get"]["responses"]


def test_examples_are_of_their_schemas_and_are_answered(service: Service) -> None:
    for path, methods in document(service)["paths"].items():
        for operation in methods.values():
            if "requestBody" not in operation or "lora" in path:
                continue
            taken = operation["requestBody"]["content"]["application/json"]
            Draft202012Validator(taken["schema"]).validate(taken["example"])
            assert ask(service, "POST", path, json=taken["example"]).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda it: it.prompt_field or "tokenize")
def test_every_field_has_a_schema_that_says_what_it_is(endpoint: Any) -> None:
    schema = body_schema(endpoint)
    Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]) == {*endpoint.fields, *endpoint.neutral}
    for name in endpoint.fields:
        assert schema["properties"][name].keys() & {"type", "anyOf"}, name
        assert schema["properties"][name]["description"] == DESCRIPTIONS[name]


def test_no_description_is_of_a_field_that_is_not_there() -> None:
    assert set(DESCRIPTIONS) == {name for it in ENDPOINTS for name in it.fields}
    assert list(DESCRIPTIONS) == sorted(DESCRIPTIONS)


VALUES: list[Any] = [None, True, 0, 1, 3, -1, 0.5, "a", "", [], ["a"], [1], [True], {}, {"1": 2}]
VALUES += [{"type": "text"}, {"include_usage": True}, [[1]], [{}], "none", {"a": "b"}, ["text"]]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda it: it.prompt_field or "tokenize")
def test_what_a_schema_takes_is_what_the_server_takes(endpoint: Any) -> None:
    """Of the kinds of values; what a schema refuses beyond them, the engine refuses."""
    validator = Draft202012Validator(body_schema(endpoint))
    base = {endpoint.prompt_field: NEEDED[endpoint.prompt_field]} if endpoint.prompt_field else {}
    for name in [*endpoint.fields, *endpoint.neutral, "unknown"]:
        for value in VALUES:
            body = base | {name: value}
            try:
                checked_fields(body, endpoint)
                takes = True
            except Exception:
                takes = False
            if validator.is_valid(body):
                assert takes, (name, value)
            elif takes:
                assert refuses_beyond_kind(name, value), (name, value)


@pytest.mark.parametrize(
    ("path", "body", "takes"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": None}]}, False),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": []}]}, False),
        ("/v1/chat/completions", {"messages": [{"role": "a", "tool_calls": [{}]}]}, True),
        ("/v1/chat/completions", {"messages": []}, False),
        ("/v1/completions", {"prompt": "a", "top_p": 0}, False),
        ("/v1/completions", {"prompt": ["a", ""]}, False),
        ("/v1/completions", {"prompt": "a", "stream_options": {"usage": True}}, False),
        ("/tokenize", {"prompt": "a", "messages": None}, True),
        ("/tokenize", {"prompt": "", "messages": MESSAGES}, False),
        ("/tokenize", {"model": "tiny"}, False),
        ("/detokenize", {"tokens": [-1]}, False),
    ],
)
def test_what_hangs_together_is_described(
    service: Service, path: str, body: Any, takes: bool
) -> None:
    content = document(service)["paths"][path]["post"]["requestBody"]["content"]
    schema = content["application/json"]["schema"]
    assert Draft202012Validator(schema).is_valid(body) == takes
    short = {"max_tokens": 1} if "completions" in path else {}
    assert (ask(service, "POST", path, json=body | short).status_code == 200) == takes


def refuses_beyond_kind(name: str, value: Any) -> bool:
    """Whether a field is refused for its value, not for what kind of value it is."""
    return name in ("prompt", "input", "messages", "stream_options") or isinstance(
        value, int | float | list
    )


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"logprobs": 2, "echo": True, "n": 2, "return_token_ids": True}),
        ("/v1/completions", {"prompt": ["a", "b"], "prompt_logprobs": 1}),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 2, "return_token_ids": True}),
        ("/v1/chat/completions", {"prompt_logprobs": 0, "stop": ["e"], "stop_token_ids": [5]}),
        ("/v1/embeddings", {"input": ["a", "b"]}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
        ("/v1/embeddings", {"input": ""}),
        ("/tokenize", {"return_token_strs": True}),
        ("/tokenize", {"messages": MESSAGES}),
        ("/detokenize", {}),
        ("/v1/completions", {"n": -1}),
        ("/v1/completions", {"model": "none"}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}),
        ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ("/health", None),
        ("/ready", None),
        ("/version", None),
        ("/metrics", None),
        ("/v1/models", None),
        ("/v1/models/tiny", None),
        ("/v1/models/none", None),
        ("/tokenizer_info", None),
    ],
)
def test_answers_are_what_the_document_says(service: Service, path: str, body: Any) -> None:
    described = document(service)
    method, template = ("get" if body is None else "post"), path
    if path.startswith("/v1/models/"):
        template = "/v1/models/{name}"
    operation = described["paths"][template][method]
    if body is not None and not path.endswith("adapter"):
        needs = {"/detokenize": "tokens", "/v1/chat/completions": "messages"}
        needed = (needs | {"/v1/embeddings": "input"}).get(path, "prompt")
        short = {"max_tokens": 4} if "completions" in path else {}
        body = short | ({} if "messages" in body else {needed: NEEDED[needed]}) | body
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        is_whole = body.get("n") != -1 and body.get("input") != ""
        assert Draft202012Validator(schema).is_valid(body) == is_whole
    answer = ask(service, method.upper(), path, **({} if body is None else {"json": body}))
    told = operation["responses"][str(answer.status_code)]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    content = answer.json() if kind == "application/json" else answer.text
    schema = told[kind]["schema"] | {"components": described["components"]}
    Draft202012Validator(schema).validate(content)
    is_failure = "none" in path or "adapter" in path or (body or {}).keys() & {"model"}
    is_failure = is_failure or (body or {}).get("n") == -1 or (body or {}).get("input") == ""
    assert (answer.status_code >= 400) == bool(is_failure)


def test_every_failure_has_the_shape_that_is_described(service: Service) -> None:
    validator = Draft202012Validator(document(service)["components"]["schemas"]["Error"])
    answers = [
        complete(service, prompt=None),
        ask(service, "POST", "/v1/completions", content=b"{", headers={"content-type": "text/x"}),
        ask(service, "POST", "/v1/completions", content=b"x" * (2**23 + 1)),
        ask(service, "GET", "/nowhere"),
        ask(service, "DELETE", "/v1/models"),
    ]
    assert [it.status_code for it in answers] == [400, 415, 413, 404, 405]
    for answer in answers:
        validator.validate(answer.json())
