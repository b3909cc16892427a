"""Bodies -> prompts and sampling parameters: OpenAI's meaning and defaults, or a refusal."""

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.openai.errors import ApiError
from runner.openai.fields import CHAT, COMPLETIONS, SAMPLING
from runner.openai.requests import ApiRequest, parse_request
from runner.types import SamplingParams

DEFAULTS = SamplingParams(max_tokens=None, seed=11)
TEXT, CHATTING = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


def text(defaults: SamplingParams = DEFAULTS, **body: Any) -> ApiRequest:
    return parse_request(TEXT, {"model": "m", "prompt": "hi"} | body, defaults)


def chat(defaults: SamplingParams = DEFAULTS, **body: Any) -> ApiRequest:
    return parse_request(CHATTING, {"model": "m", "messages": HELLO} | body, defaults)


def refusal(url: str, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        parse_request(url, body, DEFAULTS)
    error = refused.value
    assert error.body == {
        "error": {
            "message": str(error),
            "type": "invalid_request_error",
            "param": error.param,
            "code": error.code,
        }
    }
    return error


def test_the_defaults_are_openais() -> None:
    assert text().params == SamplingParams(max_tokens=16, seed=11)
    assert chat().params == SamplingParams(max_tokens=None, seed=11)
    assert (text().params.temperature, text().params.top_p, text().params.n) == (1.0, 1.0, 1)
    assert text().params.logprobs is None and chat().params.logprobs is None


def test_what_a_body_leaves_out_is_as_the_defaults_say_and_null_is_left_out() -> None:
    mine = SamplingParams(temperature=0.5, max_tokens=7, stop="x", top_k=3)
    for parsed in (text(mine, temperature=None), chat(mine, stop=None)):
        assert parsed.params == mine
    assert text(mine, temperature=2, stop=["y", "z"]).params.stop == ("y", "z")
    assert text(mine, temperature=2).params.temperature == 2.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0), ("top_p", 0.5), ("top_k", -1), ("min_p", 0.1), ("n", 3), ("seed", -4),
        ("stop", "a"), ("stop", ["a", "b"]), ("stop_token_ids", [1, 2]), ("ignore_eos", True),
        ("include_stop_str_in_output", True), ("skip_special_tokens", False),
        ("repetition_penalty", 1.5), ("presence_penalty", -2), ("frequency_penalty", 2),
        ("logit_bias", {"5": -100, "6": 1.5}), ("min_tokens", 2), ("bad_words", ["no"]),
        ("allowed_token_ids", [4]), ("max_tokens", 5),
    ],
)  # fmt: skip
def test_a_sampling_field_means_what_it_means_in_sampling_params(field: str, value: Any) -> None:
    for parsed, most in ((text(**{field: value}), 16), (chat(**{field: value}), None)):
        expected = {"max_tokens": most, "seed": 11} | {field: value}
        assert parsed.params == SamplingParams(**expected)


def test_every_sampling_parameter_is_a_field() -> None:
    assert SAMPLING.keys() == {it.name for it in fields(SamplingParams)} - {
        "logprobs",
        "prompt_logprobs",
        "echo",
    }


def test_echo_asks_for_the_logprobs_of_the_prompt_where_any_are_shown() -> None:
    for body, shown in [
        ({"echo": True}, (16, None, None)),
        ({"echo": True, "logprobs": 2}, (16, 2, 2)),
        ({"echo": True, "logprobs": 0, "max_tokens": 0}, (0, 0, 0)),
        ({"echo": True, "max_tokens": 0}, (0, None, 0)),
        ({"echo": False, "logprobs": 2}, (16, 2, None)),
    ]:
        parsed = text(**body)
        params = parsed.params
        assert (params.max_tokens, params.logprobs, params.num_prompt_logprobs) == shown
        assert params.echo is body["echo"]
    error = refusal(TEXT, prompt="x", max_tokens=0)
    assert error.param == "max_tokens" and "only with 'echo'" in error.message
    assert refusal(CHATTING, messages=HELLO, echo=True).code == "unsupported_parameter"


def test_the_names_that_chat_has_of_its_own() -> None:
    assert chat(max_completion_tokens=9).params.max_tokens == 9
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).params.logprobs == 5
    assert chat(logprobs=False).params.logprobs is None
    assert text(logprobs=0).params.logprobs == 0
    assert text(logprobs=5).params.logprobs == 5


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_a_prompt_is_text_or_token_ids_one_or_several(prompt: Any, found: list[Any]) -> None:
    assert [it.text or it.token_ids for it in text(prompt=prompt).prompts] == found


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [1, "a"], ["a", ""], [[1], "a"], [True], [1.5], {"text": "a"}, 7]
)
def test_another_prompt_is_refused(prompt: Any) -> None:
    error = refusal(TEXT, prompt=prompt)
    assert (error.code, error.param) == ("invalid_value", "prompt")


def test_messages_lose_their_nulls_and_parts_become_text() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}], "refusal": None}
    (prompt,) = chat(messages=[{"role": "user", "content": parts}, call]).prompts
    assert prompt.messages == [
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "tool_calls": [{"id": "x"}]},
    ]


def test_what_goes_into_the_chat_template() -> None:
    def kwargs(**body: Any) -> Any:
        return chat(**body).prompts[0].chat_template_kwargs

    assert kwargs() == {}
    assert kwargs(chat_template_kwargs={"mood": "ok"}, documents=[{"text": "d"}]) == {
        "mood": "ok", "documents": [{"text": "d"}],
    }  # fmt: skip
    assert kwargs(add_generation_prompt=False) == {"add_generation_prompt": False}
    going_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert kwargs(continue_final_message=True) == going_on


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"tempratur": 1}, "unknown_parameter", "tempratur"),
        ({"messages": HELLO}, "unknown_parameter", "messages"),
        ({"echo": 1}, "invalid_type", "echo"),
        ({"stream": True}, "unsupported_parameter", "stream"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"best_of": 3}, "unsupported_parameter", "best_of"),
        ({"prompt_logprobs": -1}, "invalid_value", "prompt_logprobs"),
        ({"guided_regex": "a+"}, "unsupported_parameter", "guided_regex"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"temperature": "1"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"n": 1.0}, "invalid_type", "n"),
        ({"model": 5}, "invalid_type", "model"),
        ({"stop": [1]}, "invalid_type", "stop"),
        ({"logprobs": True}, "invalid_type", "logprobs"),
        ({"logit_bias": {"5": "x"}}, "invalid_type", "logit_bias"),
        ({"logit_bias": {"five": 1}}, "invalid_value", "logit_bias"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"temperature": float("inf")}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"logprobs": -1}, "invalid_value", "logprobs"),
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 10**9}, "invalid_value", "n"),
        ({"prompt": ["a"] * 3, "n": 6000}, "invalid_value", "n"),
        ({"min_tokens": 9, "max_tokens": 3}, "invalid_value", "min_tokens"),
    ],
)
def test_a_completion_that_cannot_be_followed_is_refused_by_name(
    body: dict[str, Any], code: str, param: str
) -> None:
    error = refusal(TEXT, **({"prompt": "hi"} | body))
    assert (error.code, error.param, error.status) == (code, param, 400)
    assert param in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"prompt": "hi"}, "unknown_parameter", "prompt"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"add_special_tokens": True}, "unsupported_parameter", "add_special_tokens"),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 101}, "invalid_value", "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "invalid_value", "max_tokens"),
        ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
        ({"chat_template_kwargs": {"tokenize": True}}, "invalid_value", "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "invalid_value",
         "continue_final_message"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hi"}, "invalid_value", "messages"),
        ({"messages": ["hi"]}, "invalid_value", "messages"),
        ({"messages": [{"content": "hi"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "invalid_value",
         "messages"),
    ],
)  # fmt: skip
def test_a_chat_completion_that_cannot_be_followed_is_refused_by_name(
    body: dict[str, Any], code: str, param: str
) -> None:
    error = refusal(CHATTING, **({"messages": HELLO} | body))
    assert (error.code, error.param) == (code, param)
    assert param in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("url", [TEXT, CHATTING])
def test_without_a_prompt_the_missing_field_is_named(url: str) -> None:
    error = refusal(url, model="m")
    expected = "prompt" if url == TEXT else "messages"
    assert (error.code, error.param) == ("missing_required_parameter", expected)


def test_fields_that_ask_for_nothing_are_taken() -> None:
    labels = {"user": "u", "metadata": {"a": "b"}, "cache_salt": "s", "request_id": "r"}
    nothing = {"stream": False, "echo": False, "priority": 0, "best_of": 1, "suffix": ""}
    assert text(**labels, **nothing, response_format={"type": "text"}) == text()
    assert chat(**labels, tools=[], tool_choice="auto", store=False, service_tier="auto") == chat()
    every = dict.fromkeys([*COMPLETIONS.fields, *COMPLETIONS.neutral])
    assert text(**(every | {"prompt": "hi", "model": "m"})) == text()
    every = dict.fromkeys([*CHAT.fields, *CHAT.neutral])
    assert chat(**(every | {"messages": HELLO, "model": "m"})) == chat()


def test_a_near_miss_is_told() -> None:
    assert "Did you mean 'temperature'?" in str(refusal(TEXT, prompt="x", temperatur=1))


def test_draws_follow_the_seed_and_the_prompt_or_else_the_given_key() -> None:
    seeded = [it.key for it in text(seed=1, prompt=["a", "b", "a"]).prompt_requests("1", key="k")]
    assert len(set(seeded)) == 3
    again = [it.key for it in text(seed=1, prompt=["b", "a"]).prompt_requests("2", key="other")]
    assert again == [seeded[1], seeded[0]]
    free = text(prompt=["a", "b"]).prompt_requests("1", key="k")
    assert [it.key for it in free] == ["k/0", "k/1"]
    assert [it.request_id for it in free] == ["1/0", "1/1"]
    assert {it.params.seed for it in free} == {11}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(
    url=st.sampled_from([TEXT, CHATTING]),
    body=st.dictionaries(
        st.sampled_from([*COMPLETIONS.fields, *CHAT.fields, *CHAT.neutral, "x"]), JSON
    ),
    is_whole=st.booleans(),
)
def test_whatever_a_body_holds_it_is_understood_or_refused(
    url: str, body: dict[str, Any], is_whole: bool
) -> None:
    if is_whole:
        body = body | ({"prompt": "hi"} if url == TEXT else {"messages": HELLO})
    try:
        parsed = parse_request(url, body, DEFAULTS)
    except ApiError as error:
        assert error.code and error.message and "\n" not in error.message.strip("\n")
        json.dumps(error.body)
    else:
        assert parsed.prompts and parsed.prompt_requests("r", key="k")
