"""Chat completions by the `openai` package, and by what other clients send and read."""

import pytest
from live_server import NAME

from runner import SamplingParams

FREE = {"ignore_eos": True}
HELLO = [{"role": "user", "content": "Hello"}]


def chat(client, messages=None, *, extra=None, **fields):
    """A chat completion that nothing ends early, unless `fields` say otherwise."""
    given = {"model": NAME, "max_tokens": 8, "seed": 7} | fields
    return client.chat.completions.create(
        messages=messages or HELLO, extra_body=FREE | (extra or {}), **given
    )


def prompt_of(live, messages, **extra):
    """What the chat template makes of messages, as the server tells it."""
    with live.client() as client:
        answer = chat(client, messages, extra={"return_token_ids": True} | extra, max_tokens=1)
    return live.post("/detokenize", {"tokens": answer.prompt_token_ids}).json()["prompt"]


def test_an_answer_is_that_of_llm_chat_for_the_same_seed(client, llm):
    answer = chat(client, n=3, extra={"return_token_ids": True})
    params = SamplingParams(n=3, max_tokens=8, seed=7, ignore_eos=True)
    (output,) = llm.chat(HELLO, params, use_tqdm=False)
    assert [choice.token_ids for choice in answer.choices] == [s.token_ids for s in output.outputs]
    assert [choice.message.content for choice in answer.choices] == [s.text for s in output.outputs]
    assert {choice.message.role for choice in answer.choices} == {"assistant"}
    assert answer.object == "chat.completion" and answer.usage.completion_tokens == 24
    assert answer.usage.prompt_tokens == len(output.prompt_token_ids)


def test_roles_and_parts_go_through_the_template(live):
    messages = [
        {"role": "system", "content": "Be"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
        {"role": "assistant", "content": "c"},
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    assert prompt_of(live, messages) == "<system>Be<user>a\nb<assistant>c<tool>d<a>"


def test_a_developer_is_the_system_to_a_template_that_does_not_know_one(client, live, llm):
    told = [{"role": "developer", "content": "Be"}, *HELLO]
    assert prompt_of(live, told) == "<system>Be<user>Hello<a>"
    params = SamplingParams(max_tokens=8, seed=7, ignore_eos=True)
    (output,) = llm.chat(told, params, use_tqdm=False)
    answer = chat(client, told, extra={"return_token_ids": True})
    assert answer.choices[0].token_ids == output.outputs[0].token_ids


def test_the_template_gets_what_it_is_given(live):
    extra = {"chat_template_kwargs": {"mood": "!"}}
    assert prompt_of(live, HELLO, **extra) == "<user>Hello<a>!"
    assert prompt_of(live, HELLO, add_generation_prompt=False) == "<user>Hello"
    begun = [*HELLO, {"role": "assistant", "content": "Good"}]
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(live, begun, **goes_on) == "<user>Hello<assistant>Good"


def test_logprobs_are_the_models_own_and_top_logprobs_the_likeliest(client, llm):
    fields = {"logprobs": True, "top_logprobs": 3, "temperature": 0.5}
    answer = chat(client, extra={"return_token_ids": True}, **fields)
    (choice,) = answer.choices
    content = choice.logprobs.content
    assert len(content) == len(choice.token_ids) == 8
    (score,) = llm.score([(answer.prompt_token_ids, choice.token_ids)], use_tqdm=False)
    assert [it.logprob for it in content] == pytest.approx(score.logprobs, abs=1e-4)
    for it, token_id in zip(content, choice.token_ids, strict=True):
        top = [other.logprob for other in it.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and it.logprob <= top[0]
        assert bytes(it.bytes).decode(errors="replace") == llm.get_tokenizer().decode([token_id])
    (bare,) = chat(client, logprobs=True).choices
    assert [it.top_logprobs for it in bare.logprobs.content] == [[]] * 8
    assert chat(client).choices[0].logprobs is None


def test_an_answer_ends_at_a_stop_string_or_at_its_limit(client):
    text = chat(client, max_tokens=16).choices[0].message.content
    (choice,) = chat(client, max_tokens=16, stop=text[5:7]).choices
    assert choice.message.content == text[: text.index(text[5:7])]
    assert choice.finish_reason == "stop"
    extra = {"return_token_ids": True}
    (choice,) = chat(client, max_tokens=None, max_completion_tokens=3, extra=extra).choices
    assert (len(choice.token_ids), choice.finish_reason) == (3, "length")
    (choice,) = chat(client, max_tokens=None, extra=extra).choices
    assert len(choice.token_ids) == 256 - len("<user>Hello<a>"), "what the context holds"


def test_verifiers_finds_its_ids_and_logprobs(client):
    """It refuses a sample unless all three are there, at exactly these places."""
    told = client.chat.completions.create(
        model=NAME, messages=HELLO, logprobs=True, max_completion_tokens=5,
        extra_body={"return_token_ids": True, "chat_template_kwargs": {}},
    ).model_dump()  # fmt: skip
    (choice,) = told["choices"]
    assert told["prompt_token_ids"] and "prompt_token_ids" not in choice
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert len(logprobs) == len(choice["token_ids"]) > 0


def test_prompt_logprobs_are_beside_the_choices(client):
    told = chat(client, extra={"prompt_logprobs": 0, "return_token_ids": True}).model_dump()
    assert told["prompt_logprobs"][0] is None
    assert [next(iter(it)) for it in told["prompt_logprobs"][1:]] == [
        str(token_id) for token_id in told["prompt_token_ids"][1:]
    ]


def test_lm_evals_chats_are_answered(client):
    """`local-chat-completions`: max_tokens, stop cut to 4, seed, temperature 0."""
    answer = client.chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": "2+2="}], max_tokens=6, temperature=0,
        stop=["\n\n", "Q:", "</s>", "<|im_end|>"], seed=1234,
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.content, str)
