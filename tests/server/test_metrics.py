"""`/metrics`: every number is what was done, and is told without waiting for the engine."""

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ask, complete, tiny_engine, tiny_service, with_client

from runner.server.engine_thread import EngineThread
from runner.server.service import Service


@pytest.fixture(scope="module")
def engine(tiny_directory: Path) -> Iterator[EngineThread]:
    options = {"speculative": {"proposers": ["ngram"], "gate": False}}
    with tiny_engine(tiny_directory, **options) as engine:
        yield engine


def numbers(service: Service) -> dict[str, float]:
    """What /metrics says, by name and labels."""
    answer = ask(service, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        sample.name
        + "".join(f",{value}" for _, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_requests_and_tokens_are_counted(engine: EngineThread) -> None:
    service = tiny_service(engine)
    complete(service)
    complete(service, n=2, stream=True)
    complete(service, prompt=[])
    ask(service, "GET", "/v1/models/none")
    ask(service, "GET", "/made/up")
    seen = numbers(service)
    route = "/v1/completions"
    assert seen[f"runner_requests_total,POST,{route},200"] == 2
    assert seen[f"runner_requests_total,POST,{route},400"] == 1
    assert seen["runner_requests_total,GET,/v1/models/{name:path},404"] == 1
    assert seen["runner_requests_total,GET,unmatched,404"] == 1
    assert seen["runner_errors_total,invalid_value"] == 1
    assert seen["runner_errors_total,model_not_found"] == 1
    assert seen["runner_prompt_tokens_total"] == 6
    assert seen["runner_completion_tokens_total"] == 4 + 2 * 4
    assert seen[f"runner_request_latency_seconds_count,{route}"] == 3


def test_times_of_a_stream_add_up(engine: EngineThread) -> None:
    service = tiny_service(engine)
    complete(service, max_tokens=30, stream=True)
    seen = numbers(service)
    assert seen["runner_time_to_first_token_seconds_count"] == 1
    first = seen["runner_time_to_first_token_seconds_sum"]
    whole = seen["runner_request_latency_seconds_sum,/v1/completions"]
    gaps = seen["runner_inter_token_latency_seconds_sum"]
    assert first > 0 and gaps > 0 and first + gaps <= whole
    # The first piece may have several tokens; no other token is left out.
    assert 30 - 9 <= seen["runner_inter_token_latency_seconds_count"] <= 29


def test_answers_at_once_have_no_first_piece(engine: EngineThread) -> None:
    service = tiny_service(engine)
    complete(service)
    assert numbers(service)["runner_time_to_first_token_seconds_count"] == 0


def test_the_batch_and_the_queue_are_seen_while_they_are_full(engine: EngineThread) -> None:
    service = tiny_service(engine)
    body = {"prompt": [5, 6, 7], "max_tokens": 200, "ignore_eos": True}

    async def look(client: httpx.AsyncClient) -> str:
        asked = [asyncio.ensure_future(client.post("/v1/completions", json=body)) for _ in "123456"]
        text = ""
        while "runner_batch_rows 4.0" not in text:
            assert not all(it.done() for it in asked), "the batch was never seen full"
            await asyncio.sleep(0.001)
            text = (await client.get("/metrics")).text
        await asyncio.gather(*asked)
        return text

    text = with_client(service, look)
    assert "runner_batch_rows_max 4.0" in text and "runner_requests_running 4.0" in text
    assert re.search(r"^runner_requests_waiting 2.0$", text, re.MULTILINE)
    after = numbers(service)
    assert after["runner_batch_rows"] == after["runner_requests_waiting"] == 0


def test_the_engine_tells_of_its_cache_drafts_and_restarts(engine: EngineThread) -> None:
    service = tiny_service(engine)
    complete(service, prompt=[9] * 64, max_tokens=40, temperature=0)
    before = numbers(service)
    complete(service, prompt=[9] * 64, max_tokens=40, temperature=0)
    after = numbers(service)
    assert (
        after["runner_prefix_cache_hit_tokens_total"]
        > before["runner_prefix_cache_hit_tokens_total"]
    )
    drafted = after["runner_speculation_drafted_tokens_total"]
    assert 0 < after["runner_speculation_accepted_tokens_total"] <= drafted
    assert after["runner_engine_ready"] == 1 and after["runner_engine_restarts_total"] == 0


def test_a_failure_of_the_engine_is_counted(tiny_directory: Path) -> None:
    with tiny_engine(tiny_directory) as engine:
        service = tiny_service(engine)

        def fail(*_: Any) -> None:
            raise RuntimeError("injected")

        engine.llm.text_engine.step = fail  # type: ignore[method-assign]
        answer = complete(service)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert complete(service).status_code == 200
        seen = numbers(service)
    assert seen["runner_engine_restarts_total"] == seen["runner_errors_total,engine_failure"] == 1
