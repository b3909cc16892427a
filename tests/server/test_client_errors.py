"""What is refused, as the typed exceptions of the `openai` package; and time that runs out."""

import time

import httpx
import openai
import pytest
from live_server import NAME, live_server

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def live(tiny_directory):
    with live_server(tiny_directory, max_n=4, max_prompt_tokens=100) as served:
        yield served


def complete(client, **fields):
    extra = fields.pop("extra", None)
    return client.completions.create(
        **{"model": NAME, "prompt": "Hi", "max_tokens": 2} | fields, extra_body=extra
    )


def chat(client, **fields):
    extra = fields.pop("extra", None)
    given = {"model": NAME, "messages": HELLO, "max_tokens": 2} | fields
    return client.chat.completions.create(**given, extra_body=extra)


REFUSED = [
    (complete, {"extra": {"temperatur": 1}}, "unknown_parameter", "temperatur"),
    (complete, {"extra": {"nonsense": None}}, "unknown_parameter", "nonsense"),
    (complete, {"suffix": "end"}, "unsupported_parameter", "suffix"),
    (complete, {"best_of": 3}, "unsupported_parameter", "best_of"),
    (complete, {"prompt": ""}, "invalid_value", "prompt"),
    (complete, {"prompt": [[]]}, "invalid_value", "prompt"),
    (complete, {"prompt": [5, "a"]}, "invalid_value", "prompt"),
    (complete, {"prompt": [300]}, "invalid_value", "prompt"),
    (complete, {"prompt": [-1]}, "invalid_value", "prompt"),
    (complete, {"prompt": [2**70]}, "invalid_value", "prompt"),
    (complete, {"prompt": "a" * 101}, "context_length_exceeded", "prompt"),
    (complete, {"max_tokens": 0}, "invalid_value", "max_tokens"),
    (complete, {"max_tokens": -1}, "invalid_value", "max_tokens"),
    (complete, {"n": 5}, "invalid_value", "n"),
    (complete, {"temperature": -1}, "invalid_value", "temperature"),
    (complete, {"temperature": "hot"}, "invalid_type", "temperature"),
    (complete, {"logprobs": 101}, "invalid_value", "logprobs"),
    (complete, {"logit_bias": {"7": 101}}, "invalid_value", "logit_bias"),
    (complete, {"logit_bias": {"7777": 1}}, "invalid_value", "logit_bias"),
    (complete, {"logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    (complete, {"stop": [""]}, "invalid_value", "stop"),
    (complete, {"stop": ["ab"] * 5000}, "invalid_value", "stop"),
    (complete, {"extra": {"bad_words": ["a" * 5000]}}, "invalid_value", "bad_words"),
    (complete, {"extra": {"stream_options": {"usage": True}}}, "invalid_value", "stream_options"),
    (chat, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "unsupported_parameter",
     "tools"),
    (chat, {"response_format": {"type": "json_object"}}, "unsupported_parameter",
     "response_format"),
    (chat, {"messages": []}, "invalid_value", "messages"),
    (chat, {"messages": [{"role": "user"}]}, "invalid_value", "messages"),
    (chat, {"messages": [{"role": "boom", "content": "x"}]}, "invalid_value", "messages"),
    (chat, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url":
     {"url": "http://x"}}]}]}, "invalid_value", "messages"),
    (chat, {"top_logprobs": 2}, "invalid_value", "top_logprobs"),
    (chat, {"max_completion_tokens": 2}, "invalid_value", "max_tokens"),
    (chat, {"extra": {"chat_template_kwargs": {"tokenize": True}}}, "invalid_value",
     "chat_template_kwargs"),
]  # fmt: skip


def _short(value):
    return getattr(value, "__name__", str(value)[:40])


@pytest.mark.parametrize(("ask", "fields", "code", "param"), REFUSED, ids=_short)
def test_what_cannot_be_followed_is_a_bad_request(client, ask, fields, code, param):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, stream=stream, **fields)
        assert (refused.value.code, refused.value.param) == (code, param)
        assert refused.value.type == "invalid_request_error"
        assert refused.value.body["message"]


def test_what_is_not_there_is_not_found(client, live):
    for ask in (complete, chat):
        with pytest.raises(openai.NotFoundError) as missing:
            ask(client, model="gpt-4")
        assert missing.value.code == "model_not_found" and "gpt-4" in missing.value.message
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as missing:
        client.images.generate(prompt="x")
    assert "/v1/images/generations" in missing.value.message
    wrong = live.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["code"] == "method_not_allowed"


EXTREMES = {
    "temperature": [10**300, 10**400, 1e-300, 1e300],
    "top_p": [1e-300],
    "top_k": [10**30],
    "min_p": [1e-300],
    "seed": [10**60, -(2**70)],
    "max_tokens": [10**40],
    "min_tokens": [10**30],
    "priority": [10**50],
    "repetition_penalty": [1e300, 1e-300, 10**400],
    "presence_penalty": [10**400],
    "logit_bias": [{"5": 10**400}, {str(10**40): 1}],
    "n": [10**40],
    "logprobs": [10**40],
    "prompt_logprobs": [-(10**40)],
    "stop_token_ids": [[2**70], [5] * 5000],
    "allowed_token_ids": [[2**70]],
    "bad_words": [["a" * 4000]],
    "stop": [["a"] * 4000],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_no_number_is_too_large_or_too_small_for_an_answer(live, name):
    """Refused or followed, never an engine that fails."""
    for value in EXTREMES[name]:
        for beside in ({}, {"top_p": 0.5, "min_tokens": 2, "max_tokens": None, "top_k": -1}):
            body = {"prompt": "Hi", "temperature": 0.7, "max_tokens": 3} | beside | {name: value}
            answer = live.post("/v1/completions", body)
            assert answer.status_code in (200, 400), (str(beside), answer.text)
    assert live.service.engine.num_restarts == 0 and live.becomes_idle()


def test_an_answer_that_takes_too_long_is_a_timeout(tiny_directory):
    with live_server(tiny_directory, request_timeout=0.2) as slow, slow.client() as client:
        step = slow.llm.text_engine.engine.step
        slow.llm.text_engine.engine.step = lambda: (time.sleep(0.05), step())[1]
        given = {"max_tokens": 200, "extra": {"ignore_eos": True}, "seed": 1}
        with pytest.raises(openai.InternalServerError) as late:
            complete(client, **given)
        assert late.value.status_code == 504 and late.value.code == "timeout"
        with pytest.raises(openai.APIError, match=r"more than 0\.2 seconds"):
            list(complete(client, stream=True, **given))
        assert slow.becomes_idle()


def test_a_client_that_waits_too_short_leaves_nothing_behind(live):
    with live.client(timeout=httpx.Timeout(0.02)) as client:
        with pytest.raises(openai.APITimeoutError):
            complete(client, max_tokens=240, n=4, seed=1, extra={"ignore_eos": True})
        assert live.becomes_idle()


def test_a_busy_server_is_tried_again(tiny_directory):
    options = {"max_batch_size": 1}
    with live_server(tiny_directory, engine=options, max_waiting=0) as busy:
        step, held = busy.llm.text_engine.engine.step, []
        busy.llm.text_engine.engine.step = lambda: (time.sleep(0.01), step())[1]
        with busy.client() as first, busy.client() as once, busy.client(max_retries=9) as patient:
            extra = {"ignore_eos": True}
            held = complete(first, max_tokens=60, seed=1, stream=True, extra=extra)
            next(held)
            with pytest.raises(openai.RateLimitError) as refused:
                complete(once)
            assert refused.value.code == "server_busy"
            assert complete(patient).choices[0].finish_reason in ("stop", "length")
            held.close()
        assert busy.becomes_idle()
