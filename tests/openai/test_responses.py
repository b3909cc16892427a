"""Responses as OpenAI's own client parses them, over a tiny model that really answers."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from openai.types import Completion as CompletionBody
from openai.types.chat import ChatCompletion

from runner import LLM, SamplingParams
from runner.models.token_bytes import TokenBytes
from runner.openai.errors import ApiError
from runner.openai.logprobs import LEAST_LOGPROB, Spelling, completion_logprobs
from runner.openai.requests import parse_request
from runner.openai.responses import check_outputs, response_body
from runner.types import Completion, ErrorInfo, Logprob, RequestOutput, TextTokens

Ask = Callable[..., dict[str, Any]]
DEFAULTS = SamplingParams(max_tokens=None, seed=0)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def ask(llm: LLM) -> Ask:
    """Answers a request as the job does; what comes back went through JSON."""
    token_bytes = TokenBytes(llm.tokenizer)

    def answer(url: str, **body: Any) -> dict[str, Any]:
        request = parse_request(url, body, DEFAULTS)
        outputs = sorted(
            llm.run(request.prompt_requests("r", key="k")), key=lambda it: it.request_id
        )
        check_outputs(request, outputs, max_model_len=llm.engine.max_model_len)
        made = response_body(
            request, outputs, name="n", model="tiny", created=1700000000, token_bytes=token_bytes
        )
        back: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
        assert back == made
        return back

    return answer


def text(ask: Ask, prompt: Any = "hello", **body: Any) -> dict[str, Any]:
    return ask("/v1/completions", prompt=prompt, **body)


def chat(ask: Ask, **body: Any) -> dict[str, Any]:
    return ask("/v1/chat/completions", messages=HELLO, **({"max_tokens": 6} | body))


@pytest.mark.parametrize(
    "body",
    [{}, {"logprobs": 0}, {"logprobs": 3, "n": 2}, {"prompt": [[5, 6], [7]], "logprobs": 1},
     {"prompt": ["a", "bcd"], "n": 3, "return_token_ids": True}, {"stop": ["a", "e", "i", "o"]}],
    ids=str,
)  # fmt: skip
def test_openais_client_reads_a_completion_without_loss(ask: Ask, body: dict[str, Any]) -> None:
    answered = text(ask, **body)
    parsed = CompletionBody.model_validate(answered, strict=True)
    assert parsed.to_dict() == answered


@pytest.mark.parametrize(
    "body",
    [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 4, "n": 3},
     {"return_token_ids": True, "logprobs": True}, {"stop": "a", "max_tokens": 40}],
    ids=str,
)  # fmt: skip
def test_openais_client_reads_a_chat_completion_without_loss(
    ask: Ask, body: dict[str, Any]
) -> None:
    answered = chat(ask, **body)
    parsed = ChatCompletion.model_validate(answered, strict=True)
    assert parsed.to_dict() == answered


def test_choices_go_by_prompt_and_then_by_sample(ask: Ask, llm: LLM) -> None:
    body = text(ask, ["ab", "cd"], n=2, seed=3, max_tokens=9)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    params = SamplingParams(n=2, seed=3, max_tokens=9)
    direct = llm.generate(["ab", "cd"], params, use_tqdm=False)
    said = [sample.text for output in direct for sample in output.outputs]
    assert [choice["text"] for choice in body["choices"]] == said


def test_usage_counts_a_prompt_once_and_every_token_that_was_sampled(ask: Ask) -> None:
    body = text(ask, ["abc", "de"], n=3, max_tokens=7, ignore_eos=True)
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 42, "total_tokens": 47}
    ended = text(ask, "abc", max_tokens=50, return_token_ids=True, n=8)
    tokens = [choice["token_ids"] for choice in ended["choices"]]
    assert ended["usage"]["completion_tokens"] == sum(map(len, tokens))
    assert any(choice["finish_reason"] == "stop" for choice in ended["choices"])


def test_token_ids_are_where_vllm_has_them(ask: Ask) -> None:
    completion = text(ask, [[5, 6, 7]], return_token_ids=True)
    assert completion["choices"][0]["prompt_token_ids"] == [5, 6, 7]
    assert len(completion["choices"][0]["token_ids"]) == 16 and "token_ids" not in completion
    answered = chat(ask, return_token_ids=True)
    assert len(answered["prompt_token_ids"]) == len("<user>hello<a>")
    assert len(answered["choices"][0]["token_ids"]) == 6
    assert "prompt_token_ids" not in answered["choices"][0]
    assert "token_ids" not in text(ask)["choices"][0] | chat(ask)["choices"][0]


def test_logprobs_of_a_completion_are_the_raw_ones(ask: Ask, llm: LLM) -> None:
    cold = {"temperature": 0.5, "top_k": 5, "presence_penalty": 1.0, "seed": 1}
    logprobs = text(ask, "abc", logprobs=2, **cold)["choices"][0]["logprobs"]
    params = SamplingParams(max_tokens=16, logprobs=2, **cold)
    sample = llm.generate("abc", params, use_tqdm=False)[0].outputs[0]
    assert logprobs["token_logprobs"] == pytest.approx(sample.raw_logprobs, abs=1e-5)
    assert logprobs["token_logprobs"] != pytest.approx(sample.processed_logprobs, abs=1e-2)
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob and 2 <= len(top) <= 3
        assert list(top.values()) == sorted(top.values(), reverse=True)


def test_logprobs_of_a_chat_completion(ask: Ask) -> None:
    options = {"logprobs": True, "top_logprobs": 3, "skip_special_tokens": False}
    choice = chat(ask, max_tokens=12, **options)["choices"][0]
    content = choice["logprobs"]["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode(errors="replace") == choice["message"]["content"]
    for entry in content:
        assert list(entry) == ["token", "bytes", "logprob", "top_logprobs"]
        values = [it["logprob"] for it in entry["top_logprobs"]]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        same = [it for it in entry["top_logprobs"] if it["bytes"] == entry["bytes"]]
        assert all(it["logprob"] == entry["logprob"] for it in same)
        assert same or entry["logprob"] <= values[-1]
    bare = chat(ask, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[]] * 6


def test_the_token_that_ended_a_row_is_in_the_arrays(ask: Ask) -> None:
    body = text(ask, "abc", max_tokens=60, logprobs=0, n=8)
    ended = [it for it in body["choices"] if it["finish_reason"] == "stop"]
    assert ended
    for choice in ended:
        assert choice["logprobs"]["tokens"][-1] == "</s>"
        assert choice["logprobs"]["text_offset"][-1] == len(choice["text"])


@pytest.mark.parametrize("max_tokens", [0, 1, 9])
@pytest.mark.parametrize("prompt", ["abc d", [5, 60, 7, 40]], ids=["text", "ids"])
def test_echo_puts_the_prompt_and_its_logprobs_before_the_completion(
    ask: Ask, llm: LLM, prompt: Any, max_tokens: int
) -> None:
    options = {"max_tokens": max_tokens, "seed": 3, "temperature": 0.5}
    ids = {"return_token_ids": True}
    (choice,) = text(ask, prompt, echo=True, logprobs=1, **options, **ids)["choices"]
    assert CompletionBody.model_validate(text(ask, prompt, echo=True, **options), strict=True)
    logprobs, given = choice["logprobs"], choice["prompt_token_ids"]
    assert {len(part) for part in logprobs.values()} == {len(given) + len(choice["token_ids"])}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    score = llm.score([prompt], use_tqdm=False)[0]
    assert logprobs["token_logprobs"][1 : len(given)] == pytest.approx(score.logprobs[1:], abs=1e-4)
    parts = (logprobs[it][1:] for it in ("tokens", "token_logprobs", "top_logprobs"))
    for token, logprob, top in zip(*parts, strict=True):
        assert top[token] == logprob and 1 <= len(top) <= 2
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    first = choice["text"][: (*logprobs["text_offset"], len(choice["text"]))[len(given)]]
    assert first == (prompt if isinstance(prompt, str) else "".join(logprobs["tokens"][:4]))
    if max_tokens:
        (plain,) = text(ask, prompt, logprobs=1, **options, **ids)["choices"]
        assert choice["text"] == first + plain["text"]
        assert choice["token_ids"] == plain["token_ids"]
        assert logprobs["tokens"][len(given) :] == plain["logprobs"]["tokens"]
    else:
        assert choice["text"] == first and choice["finish_reason"] == "length"


def test_each_echo_is_of_its_own_prompt(ask: Ask) -> None:
    body = text(ask, ["ab", "cde"], echo=True, n=2, max_tokens=3, logprobs=0, ignore_eos=True)
    assert [choice["text"][:2] for choice in body["choices"]] == ["ab", "ab", "cd", "cd"]
    assert [len(choice["logprobs"]["tokens"]) for choice in body["choices"]] == [5, 5, 6, 6]


def test_tokens_as_ids(ask: Ask) -> None:
    options = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    (choice,) = text(ask, logprobs=1, **options)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    (choice,) = chat(ask, logprobs=True, **options)["choices"]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert tokens == [f"token_id:{i}" for i in choice["token_ids"]]


def sample(said: str, tokens: list[bytes], **changes: Any) -> Completion:
    made = {"raw_logprobs": [-1.0] * len(tokens), "finish_reason": "stop"} | changes
    return Completion(
        request_id="r",
        index=0,
        token_ids=list(range(len(tokens))),
        processed_logprobs=[-1.0] * len(tokens),
        text=said,
        **made,
    )


def test_offsets_of_any_answer_rise_and_stay_inside_the_text(ask: Ask) -> None:
    for choice in text(ask, n=16, logprobs=0, stop=["q", "z"], max_tokens=40)["choices"]:
        offsets = choice["logprobs"]["text_offset"]
        assert all(a <= b for a, b in pairwise(offsets)) and offsets[0] == 0
        assert offsets[-1] <= len(choice["text"])


def test_what_json_cannot_hold_is_replaced_and_tokens_written_alike_keep_the_likelier() -> None:
    names = [b"a", b"a", b"\xe2"]
    step = {1: Logprob(-2.0, 2), 0: Logprob(-1.0, 1), 2: Logprob(-math.inf, 3)}
    one = TextTokens(token_ids=[0], logprobs=[-math.inf], text_offsets=[0])
    made = completion_logprobs(one, [step], Spelling(names.__getitem__, as_token_ids=False))
    assert made["token_logprobs"] == [LEAST_LOGPROB]
    assert made["top_logprobs"] == [{"a": -1.0, "bytes:\\xe2": LEAST_LOGPROB}]


def test_a_prompt_that_does_not_fit_is_the_clients_fault(ask: Ask) -> None:
    with pytest.raises(ApiError, match="prompt 1: .*300 tokens") as refused:
        text(ask, ["a", "x" * 300])
    assert (refused.value.code, refused.value.status) == ("context_length_exceeded", 400)
    with pytest.raises(ApiError, match="vocabulary") as refused:
        text(ask, [[2**40]])
    assert (refused.value.code, refused.value.param) == ("invalid_value", "prompt")
    with pytest.raises(ApiError, match="no booms") as refused:
        ask("/v1/chat/completions", messages=[{"role": "boom", "content": "x"}])
    assert refused.value.param == "messages"


def test_a_sample_that_is_not_whole_makes_it_the_servers_fault() -> None:
    request = parse_request("/v1/completions", {"prompt": "x"}, DEFAULTS)
    for kind, code in (("ModelOutputError", "model_output_error"), ("MemoryError", "server_error")):
        broken = sample("", [b"a"], finish_reason="error", error=ErrorInfo(kind, "why"))
        output = RequestOutput(request_id="r", prompt="x", prompt_token_ids=[1], outputs=[broken])
        with pytest.raises(ApiError, match="why") as refused:
            check_outputs(request, [output], max_model_len=None)
        assert (refused.value.status, refused.value.code) == (500, code)
        assert refused.value.body["error"]["type"] == "server_error"


def test_the_template_goes_on_or_begins_as_the_body_says(ask: Ask) -> None:
    def prompt(**body: Any) -> bytes:
        ids = chat(ask, return_token_ids=True, **body)["prompt_token_ids"]
        return bytes(len(ids))

    whole = len("<user>hello<a>")
    assert len(prompt()) == whole
    assert len(prompt(add_generation_prompt=False)) == whole - len("<a>")
    assert len(prompt(chat_template_kwargs={"mood": "ok"})) == whole + 2
    assert len(prompt(continue_final_message=True)) == whole - len("<a>")
