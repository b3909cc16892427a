"""Limits: a bucket that fills evenly, told in headers, waited for by OpenAI's own client."""

import asyncio
import math
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import ask, client_of, complete, tiny_service, with_client

from runner.openai.errors import ApiError
from runner.server.app import create_app
from runner.server.engine_thread import EngineThread
from runner.server.limits import Bucket, Limits
from runner.server.service import Service

KEYS = ("a", "b")


class Clock:
    """Time that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def limited(engine: EngineThread, clock: Clock, **settings: Any) -> Service:
    """A service whose limits go by a clock."""
    service = tiny_service(engine, keys=KEYS, **settings)
    limits = service.settings
    service.limits = Limits(limits.requests_per_minute, limits.tokens_per_minute, clock)
    return service


@given(st.integers(1, 100), st.lists(st.tuples(st.floats(0, 90), st.integers(0, 50)), max_size=30))
def test_no_more_is_given_than_a_minute_holds_and_time_brings(
    per_minute: int, steps: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    taken, begun = 0, clock.now
    for waited, wanted in steps:
        clock.now += waited
        if wanted <= per_minute and bucket.seconds_until(wanted) == 0:
            bucket.take(wanted)
            taken += wanted
        elif wanted <= per_minute:
            # As long as it says is long enough, and no longer than a minute.
            seconds = bucket.seconds_until(wanted)
            assert 0 < seconds <= 60 + 1e-6
            clock.now += seconds + 1e-6
            assert bucket.level >= wanted
    assert taken <= per_minute * (1 + (clock.now - begun) / 60) + 1e-6


def test_requests_are_counted_by_key(engine: EngineThread) -> None:
    clock = Clock()
    service = limited(engine, clock, requests_per_minute=2)
    answers = [complete(service, key="a") for _ in range(3)]
    assert [it.status_code for it in answers] == [200, 200, 429]
    last = answers[2]
    assert last.json()["error"]["code"] == "rate_limit_exceeded"
    assert last.headers["retry-after"] == "30"
    assert last.headers["x-ratelimit-limit-requests"] == "2"
    assert [it.headers["x-ratelimit-remaining-requests"] for it in answers] == ["1", "0", "0"]
    assert last.headers["x-ratelimit-reset-requests"] == "60.000s"
    assert "x-ratelimit-limit-tokens" not in last.headers
    assert complete(service, key="b").status_code == 200
    assert ask(service, "GET", "/health").status_code == 200
    clock.now += 29.9
    assert complete(service, key="a").status_code == 429
    clock.now += 0.1
    assert complete(service, key="a").status_code == 200


def test_tokens_of_prompts_and_completions_are_counted(engine: EngineThread) -> None:
    clock = Clock()
    service = limited(engine, clock, tokens_per_minute=20)
    # The prompt on admission, the completion at the end: the next request knows of both.
    first = complete(service, key="a", n=2)
    assert first.headers["x-ratelimit-remaining-tokens"] == "17"
    assert first.json()["usage"]["total_tokens"] == 11
    assert complete(service, key="a", max_tokens=7).headers["x-ratelimit-remaining-tokens"] == "6"
    # 9 - 3 - 7 is below nothing: the debt is waited for as well.
    refused = complete(service, key="a")
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == str(math.ceil((3 + 1) * 60 / 20))
    assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 12.001
    assert complete(service, key="a").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_stream_counts_like_an_answer_at_once(engine: EngineThread, stream: bool) -> None:
    service = limited(engine, Clock(), tokens_per_minute=20)
    assert complete(service, key="a", n=3, stream=stream).status_code == 200
    key = service.keys.find(b"Bearer a")
    assert key is not None and (tokens := service.limits.of(key).tokens) is not None
    assert tokens.level == 20 - 3 - 12


def test_a_prompt_that_never_fits_is_not_told_to_wait(engine: EngineThread) -> None:
    answer = complete(limited(engine, Clock(), tokens_per_minute=5), key="a", prompt=[7] * 6)
    assert answer.status_code == 400 and "retry-after" not in answer.headers
    assert answer.json()["error"]["code"] == "request_too_large"


def test_without_keys_it_goes_by_address(engine: EngineThread) -> None:
    service = tiny_service(engine, requests_per_minute=1)

    async def models(client: httpx.AsyncClient) -> httpx.Response:
        # Whoever sends it is still the same.
        return await client.get("/v1/models", headers={"X-Forwarded-For": "1.2.3.4"})

    seen = [with_client(service, models, address=it).status_code for it in ("1.1", "1.1", "2.2")]
    assert seen == [200, 429, 200]


def test_clients_that_are_gone_are_forgotten() -> None:
    clock = Clock()
    limits = Limits(60, None, clock)
    busy = limits.of("busy")
    for number in range(5000):
        limits.of(str(number)).take_request()
        clock.now += 1
        busy.take_request()
    assert len(limits) < 1100 and limits.of("busy") is busy


def test_a_full_queue_says_when_to_come_again_and_costs_no_tokens(engine: EngineThread) -> None:
    service = limited(engine, Clock(), max_waiting=0, tokens_per_minute=100_000)

    async def crowd() -> list[httpx.Response]:
        async with client_of(service, "a") as client:
            body = {"prompt": [5, 6, 7], "max_tokens": 60, "ignore_eos": True}
            asked = [client.post("/v1/completions", json=body) for _ in range(12)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(crowd())
    busy = [it for it in answers if it.status_code == 429]
    assert busy and len(busy) < 12
    assert {it.headers["retry-after"] for it in busy} == {"1"}
    assert {it.json()["error"]["code"] for it in busy} == {"server_busy"}
    key = service.keys.find(b"Bearer a")
    assert key is not None and (tokens := service.limits.of(key).tokens) is not None
    assert tokens.level == 100_000 - 63 * (12 - len(busy))


def test_the_openai_client_waits_and_comes_again(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, slept = Clock(), []
    service = limited(engine, clock, requests_per_minute=20)

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.now += seconds

    async def talk() -> str:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)))
        async with openai.AsyncOpenAI(api_key="a", base_url="http://it/v1", http_client=http) as it:
            await asyncio.gather(*(it.models.list() for _ in range(20)))
            assert slept == []
            # What the client waits with before it tries again.
            monkeypatch.setattr("openai._base_client.anyio.sleep", sleep)
            answer = await it.completions.create(model="tiny", prompt="a", max_tokens=1)
            with pytest.raises(openai.RateLimitError) as refusal:
                await it.with_options(max_retries=0).models.list()
            assert refusal.value.code == "rate_limit_exceeded"
            return answer.object

    assert asyncio.run(talk()) == "text_completion" and slept == [3.0]


def test_an_allowance_without_limits_says_nothing() -> None:
    allowance = Limits(None, None).of("a")
    allowance.take_request()
    allowance.take_prompt(10**9)
    assert allowance.headers == {} and allowance.is_whole
    with pytest.raises(ApiError):
        Limits(None, 1).of("a").take_prompt(2)
