"""Keys: who has none is told so in OpenAI's shape, and no key is ever shown."""

import logging
from pathlib import Path

import pytest
from serving import ask, complete, log_lines, tiny_service

from runner.errors import ParameterError
from runner.server.engine_thread import EngineThread
from runner.server.keys import ApiKeys

KEYS = ("sk-first", "sk-second")


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_taken(engine: EngineThread, key: str) -> None:
    assert complete(tiny_service(engine, keys=KEYS), key=key).status_code == 200


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer sk-firs", "Bearer sk-first2", "Basic sk-first"]
    + ["sk-first", "Bearer sk-first,sk-second", "Bearer sk-f\xefrst"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/nowhere", "/tokenizer_info", "/v1/health"])
def test_another_is_refused(engine: EngineThread, header: str | None, path: str) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = ask(tiny_service(engine, keys=KEYS), "GET", path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert error["param"] is None and "first" not in error["message"]


def test_a_scheme_has_no_case() -> None:
    assert ApiKeys(KEYS).find(b"bearer  sk-second ") == ApiKeys(KEYS[1:]).find(b"Bearer sk-second")


@pytest.mark.parametrize("path", ["/health", "/ready", "/version", "/metrics", "/docs"])
def test_what_is_open_needs_none(engine: EngineThread, path: str) -> None:
    assert ask(tiny_service(engine, keys=KEYS), "GET", path).status_code == 200


def test_metrics_can_need_one(engine: EngineThread) -> None:
    service = tiny_service(engine, keys=KEYS, metrics_need_key=True)
    assert ask(service, "GET", "/metrics").status_code == 401
    assert ask(service, "GET", "/metrics", key=KEYS[0]).status_code == 200


def test_without_keys_everybody_may_ask(engine: EngineThread) -> None:
    assert complete(tiny_service(engine)).status_code == 200
    assert complete(tiny_service(engine), key="anything").status_code == 200


def test_keys_come_from_the_environment_and_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("c\n\n  d  \n")
    keys = ApiKeys.of({"RUNNER_API_KEYS": "a, b"}, str(tmp_path / "keys"))
    found = [keys.find(f"Bearer {key}".encode()) for key in "abcd"]
    assert len(keys) == 4 and len({*found} - {None}) == 4
    assert not len(ApiKeys.of({}, None))


@pytest.mark.parametrize(
    ("given", "content", "told"),
    [
        ("", None, "RUNNER_API_KEYS has no key in it"),
        (" , ", None, "RUNNER_API_KEYS has no key in it"),
        (None, "\n\n", "server.api_key_file=.* has no key in it"),
        (None, "good\nbad secret\n", "API key 2 of 2 is not allowed"),
        ("b\xe4d-secret", None, "API key 1 of 1 is not allowed"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(
    tmp_path: Path, given: str | None, content: str | None, told: str
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    environment = {} if given is None else {"RUNNER_API_KEYS": given}
    with pytest.raises(ParameterError, match=told) as refusal:
        ApiKeys.of(environment, None if content is None else str(path))
    assert "secret" not in str(refusal.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"server.api_key_file=.*keys cannot be read: No such"):
        ApiKeys.of({}, str(tmp_path / "keys"))


def test_no_key_is_shown(
    engine: EngineThread, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    service = tiny_service(engine, keys=KEYS, log_prompts=True)
    shown = [repr(vars(service.keys))]

    def talk() -> None:
        for key in (*KEYS, "sk-wrong"):
            answer = complete(service, key=key)
            shown.extend([answer.text, str(answer.headers)])
        shown.append(ask(service, "GET", "/metrics").text)
        shown.append(ask(service, "GET", "/openapi.json").text)

    lines = log_lines(service, tmp_path, talk)
    assert [line["status"] for line in lines] == [200, 200, 401, 200, 200]
    assert lines[0]["key"] and lines[1]["key"] not in (None, lines[0]["key"])
    assert lines[2]["key"] is None and lines[2]["error"] == "invalid_api_key"
    told = "\n".join([*shown, repr(lines), caplog.text])
    assert "sk-" not in told
