"""The log of requests: one line of JSON each, without what was asked, and never in the way."""

import asyncio
import json
import os
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ask, client_of, complete, log_lines, tiny_service

from runner.errors import ParameterError
from runner.server.engine_thread import EngineThread
from runner.server.observing import Observing
from runner.server.records import RequestRecord
from runner.server.request_log import RequestLog
from runner.server.settings import ServerSettings

SECRET = "the secret question"


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_says_what_was_done(engine: EngineThread, tmp_path: Path, stream: bool) -> None:
    service = tiny_service(engine, keys=["k"])
    asked = {"prompt": [5, 6, 7], "n": 2, "stream": stream, "key": "k"}
    begun = time.time()
    (line,) = log_lines(service, tmp_path, lambda: complete(service, **asked))
    assert abs(datetime.fromisoformat(line.pop("time")).timestamp() - begun) < 30
    first, seconds = line.pop("first_token_seconds"), line.pop("seconds")
    assert (0 < first < seconds < 30) if stream else (first is None and 0 < seconds < 30)
    assert len(line.pop("request_id")) == 32 and len(line.pop("key")) == 12
    assert line == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "error": None,
        "model": "tiny",
        "stream": stream,
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "finish_reasons": {"length": 2},
    }


def test_what_is_not_sampled_has_no_tokens(engine: EngineThread, tmp_path: Path) -> None:
    service = tiny_service(engine)
    (line,) = log_lines(service, tmp_path, lambda: ask(service, "GET", "/nowhere?key=secret"))
    assert (line["status"], line["path"], line["error"]) == (404, "/nowhere", "not_found")
    names = ("model", "stream", "prompt_tokens", "completion_tokens", "finish_reasons", "key")
    assert [line[name] for name in names] == [None] * 6


@pytest.mark.parametrize("shows", [False, True])
def test_prompts_are_shown_only_where_that_is_asked(
    engine: EngineThread, tmp_path: Path, shows: bool
) -> None:
    service = tiny_service(engine, log_prompts=shows)
    messages = [{"role": "user", "content": SECRET}]

    def talk() -> None:
        complete(service, prompt=[SECRET, SECRET])
        complete(service, prompt=SECRET, temperature=-1)
        complete(service, prompt=SECRET, top_q=SECRET)
        body: dict[str, Any] = {"messages": messages, "max_tokens": 2}
        ask(service, "POST", "/v1/chat/completions", json=body)
        ask(service, "POST", "/tokenize", json={"prompt": SECRET})
        ask(service, "POST", "/v1/completions", content=SECRET)

    lines = log_lines(service, tmp_path, talk)
    assert [line["status"] for line in lines] == [200, 400, 400, 200, 200, 400]
    assert (SECRET in json.dumps(lines)) == shows
    if shows:
        assert lines[0]["prompts"] == [SECRET, SECRET] and lines[3]["prompts"] == [messages]


def test_a_client_that_goes_is_told_apart(engine: EngineThread, tmp_path: Path) -> None:
    service = tiny_service(engine)
    scope = {
        "type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "state": {},
        "query_string": b"", "client": ("a", 1), "server": ("b", 1), "scheme": "http",
        "http_version": "1.1", "root_path": "", "asgi": {"spec_version": "2.3"},
    }  # fmt: skip
    body = {"prompt": [5], "max_tokens": 200, "ignore_eos": True, "stream": True}

    async def leave() -> None:
        from runner.server.app import create_app

        gone = asyncio.Event()
        asked = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> dict[str, Any]:
            if asked:
                return asked.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                gone.set()

        await create_app(service)(scope, receive, send)

    (line,) = log_lines(service, tmp_path, lambda: asyncio.run(leave()))
    assert (line["status"], line["error"]) == (200, "client_gone")
    assert 1 <= line["completion_tokens"] < 200 and line["finish_reasons"] == {}


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nowhere", "/v1/completions"])
def test_every_answer_has_the_name_of_its_request(engine: EngineThread, path: str) -> None:
    service = tiny_service(engine, keys=["k"])
    for key in (None, "k"):
        answer = ask(service, "GET", path, key=key, headers={"X-Request-Id": "mine:1-a"})
        assert answer.headers["x-request-id"] == "mine:1-a"
        names = {ask(service, "GET", path, key=key).headers["x-request-id"] for _ in range(2)}
        assert len(names) == 2 and all(len(name) == 32 for name in names)


@pytest.mark.parametrize("name", ["", "a b", "x" * 129, 'a"b', "é", "{}"])
def test_a_name_that_is_odd_is_not_taken(engine: EngineThread, name: str) -> None:
    headers = {"X-Request-Id": name.encode()}
    answer = ask(tiny_service(engine), "GET", "/health", headers=headers)
    assert answer.headers["x-request-id"] != name


def test_a_mistake_of_the_programs_has_its_line_and_its_name(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = tiny_service(engine)
    monkeypatch.setattr(service.answerer, "understand", lambda *a, **k: 1 / 0)
    answers: list[httpx.Response] = []
    (line,) = log_lines(service, tmp_path, lambda: answers.append(complete(service)))
    assert (line["status"], line["error"]) == (500, "bug")
    assert answers[0].status_code == 500 and answers[0].json()["error"]["code"] == "bug"
    assert answers[0].headers["x-request-id"] == line["request_id"]


def test_lines_go_to_a_file_that_keeps_what_it_has(engine: EngineThread, tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text("{}\n")
    service = tiny_service(engine, log_file=str(path))

    async def crowd() -> None:
        async with client_of(service) as client:
            await asyncio.gather(*(client.get("/v1/models") for _ in range(50)))

    asyncio.run(crowd())
    service.log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 51 and len({line.get("request_id") for line in lines}) == 51


def test_a_pipe_that_nobody_reads_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.server.request_log._MOST_WAITING", 100)
    reading, writing = os.pipe()
    record = RequestRecord(request_id="r", method="GET", path="/" + "p" * 199)
    with os.fdopen(writing, "w") as pipe, os.fdopen(reading) as reader:
        monkeypatch.setattr("sys.stderr", pipe)
        log = RequestLog(None, shows_prompts=False)
        begun = time.monotonic()
        for _ in range(2000):
            log.write(record)
        assert time.monotonic() - begun < 10
        lines: list[Any] = []
        read = threading.Thread(target=lambda: lines.extend(map(json.loads, reader)))
        read.start()
        while log._lines.qsize():
            time.sleep(0.01)
        log.write(record)
        log.close()
        pipe.close()
        read.join()
    assert 100 <= len(lines) < 2000
    # What was lost is said in the first line that is not.
    assert sum(line.get("dropped_lines", 0) for line in lines) == 2001 - len(lines)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"log_file": "none/such"}, "server.log_file=none/such is not allowed"),
        ({"requests_per_minute": 0}, "server.requests_per_minute=0 is not allowed: at least 1"),
        ({"tokens_per_minute": -1}, "server.tokens_per_minute=-1 is not allowed: at least 1"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ParameterError, match=told):
        ServerSettings(**options)


def test_what_is_no_request_passes_through() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    asyncio.run(Observing(app, metrics=None, log=None)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]
