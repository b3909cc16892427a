"""Completions by the `openai` package, unmodified, and by what other clients send and read."""

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from live_server import NAME

from runner import LLM, SamplingParams

EOS = 1
FREE = {"ignore_eos": True}


def complete(client, prompt="Hello", *, extra=None, **fields):
    """A completion that nothing ends early, unless `fields` say otherwise."""
    given = {"model": NAME, "max_tokens": 8, "seed": 7} | fields
    return client.completions.create(prompt=prompt, extra_body=FREE | (extra or {}), **given)


def ids_of(llm, prompt, **params):
    """What `LLM.generate` samples."""
    params = {"max_tokens": 8, "seed": 7, "ignore_eos": True} | params
    (output,) = llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
    return [sample.token_ids for sample in output.outputs]


def test_a_prompt_is_text_or_token_ids_or_a_list_of_either(client, llm):
    hello = llm.get_tokenizer().encode("Hello")
    want = {
        "Hello": [ids_of(llm, "Hello")[0]],
        "ids": [ids_of(llm, {"prompt_token_ids": hello})[0]],
    }
    for given, expected in (
        ("Hello", want["Hello"]),
        (["Hello", "Good bye"], [ids_of(llm, text)[0] for text in ("Hello", "Good bye")]),
        (hello, want["ids"]),
        ([hello, [5, 6]], [*want["ids"], ids_of(llm, {"prompt_token_ids": [5, 6]})[0]]),
    ):
        answer = complete(client, given, extra={"return_token_ids": True})
        assert [choice.token_ids for choice in answer.choices] == expected
        assert [choice.index for choice in answer.choices] == list(range(len(expected)))
        assert answer.object == "text_completion" and answer.model == NAME
        assert answer.usage.completion_tokens == 8 * len(expected)
        assert all(choice.finish_reason == "length" for choice in answer.choices)


def test_equal_prompts_and_samples_are_told_apart_as_in_one_call_of_generate(client, llm):
    answer = complete(client, ["Hello", "Hello"], n=2, extra={"return_token_ids": True})
    params = SamplingParams(n=2, max_tokens=8, seed=7, ignore_eos=True)
    outputs = llm.generate(["Hello", "Hello"], params, use_tqdm=False)
    want = [sample.token_ids for output in outputs for sample in output.outputs]
    assert [choice.token_ids for choice in answer.choices] == want
    assert len({tuple(ids) for ids in want}) == 4


def test_a_seed_is_honoured_among_sixteen_clients(live, llm):
    def ask(seed):
        with live.client() as client:
            fields = {"seed": seed, "max_tokens": 5 + seed, "temperature": 0.5 + seed / 16}
            answer = complete(client, f"Client {seed}", extra={"return_token_ids": True}, **fields)
            return answer.choices[0].token_ids

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    for seed, token_ids in enumerate(answers):
        params = {"seed": seed, "max_tokens": 5 + seed, "temperature": 0.5 + seed / 16}
        assert token_ids == ids_of(llm, f"Client {seed}", **params)[0]
    assert live.becomes_idle()


def test_every_request_without_a_seed_draws_anew(client):
    texts = {complete(client, seed=None).choices[0].text for _ in range(4)}
    assert len(texts) == 4


def test_a_stop_string_ends_a_completion_and_is_left_out(client):
    text = complete(client, max_tokens=20).choices[0].text
    stop = text[6:8]
    (choice,) = complete(client, max_tokens=20, stop=[stop, "\N{SNOWMAN}"]).choices
    assert choice.text == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_what_lm_eval_asks_has_an_entry_for_every_token_and_the_one_more(client, llm):
    prompts = [[5, 9, 30, 200], [17, 80, 81, 82, 83, 90, 31]]
    answer = client.completions.create(
        model=NAME, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        check_arrays(choice, len(prompt) + 1)
        (score,) = llm.score([prompt], use_tqdm=False)
        found = choice.logprobs.token_logprobs[1:-1]
        assert found == pytest.approx(score.logprobs[-len(found) :], abs=1e-5)
        top = choice.logprobs.top_logprobs
        greedy = [lp == max(top[at].values()) for at, lp in enumerate(found, 1)]
        assert all(greedy) == score.is_greedy
        # The token that was sampled is the argmax, at temperature 0.
        assert choice.logprobs.token_logprobs[-1] == max(top[-1].values())


def check_arrays(choice, length):
    """What lm-eval relies on in an echoed choice with logprobs of one more."""
    shown = choice.logprobs
    arrays = shown.tokens, shown.token_logprobs, shown.top_logprobs, shown.text_offset
    assert [len(array) for array in arrays] == [length] * 4
    assert shown.token_logprobs[0] is None and shown.top_logprobs[0] is None
    assert shown.text_offset[0] == 0 and shown.text_offset == sorted(shown.text_offset)
    assert shown.text_offset[-1] <= len(choice.text)
    for token, logprob, top in zip(*(array[1:] for array in arrays[:3]), strict=True):
        assert token in top and logprob <= top[token], "the same double, or a twin's that is larger"
        assert max(top.values()) == list(top.values())[0]
        assert logprob in top.values() or top[token] > logprob


def test_the_end_of_the_text_has_its_place_in_the_arrays(client):
    for field in ({"max_tokens": 1}, {"max_tokens": 4}):
        answer = client.completions.create(
            model=NAME, prompt=[5, 9, 30], temperature=0, logprobs=1, echo=True,
            logit_bias={str(EOS): 100}, extra_body={"return_token_ids": True}, **field,
        )  # fmt: skip
        (choice,) = answer.choices
        check_arrays(choice, 4)
        assert choice.token_ids == [EOS] and choice.finish_reason == "stop"
        assert choice.logprobs.tokens[-1] == "</s>"


def test_a_prompt_is_scored_without_a_token_more(client, llm):
    (choice,) = complete(client, "Grüße, 世界", max_tokens=0, logprobs=0, echo=True).choices
    assert choice.text == "Grüße, 世界"
    shown = choice.logprobs
    (score,) = llm.score(["Grüße, 世界"], use_tqdm=False)
    assert shown.token_logprobs[1:] == pytest.approx(score.logprobs[1:], abs=1e-5)
    assert "bytes:\\xc3" in shown.tokens
    assert choice.finish_reason == "length"


def test_tokens_that_are_written_alike_can_be_told_apart_by_their_ids(client):
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    (choice,) = complete(client, logprobs=3, extra=extra).choices
    assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.token_ids]
    assert all(len(top) in (3, 4) for top in choice.logprobs.top_logprobs)


def test_logprobs_of_zero_give_the_sampled_tokens_as_async_grpo_reads_them(client, llm):
    """TRL: `choices[0].token_ids` and `choices[0].logprobs.token_logprobs`, none of them null."""
    body = {"return_token_ids": True}
    answer = client.completions.create(
        model=NAME, prompt=[5, 6, 7], max_tokens=6, temperature=0.8, n=1, logprobs=0,
        extra_body=body,
    )  # fmt: skip
    told = answer.model_dump()["choices"][0]
    assert len(told["token_ids"]) == len(told["logprobs"]["token_logprobs"]) > 0
    assert all(isinstance(it, float) and it <= 0 for it in told["logprobs"]["token_logprobs"])
    (score,) = llm.score([([5, 6, 7], told["token_ids"])], use_tqdm=False)
    assert told["logprobs"]["token_logprobs"] == pytest.approx(score.logprobs, abs=1e-4)


def test_prompt_ids_and_prompt_logprobs_stand_on_the_choice(client, llm):
    extra = {"return_token_ids": True, "prompt_logprobs": 2}
    answer = complete(client, ["Hi", "Hello"], extra=extra).model_dump()
    assert "prompt_token_ids" not in answer
    for text, choice in zip(("Hi", "Hello"), answer["choices"], strict=True):
        ids = llm.get_tokenizer().encode(text)
        assert choice["prompt_token_ids"] == ids
        first, *rest = choice["prompt_logprobs"]
        assert first is None and len(rest) == len(ids) - 1
        for token_id, entry in zip(ids[1:], rest, strict=True):
            assert next(iter(entry)) == str(token_id) and len(entry) in (2, 3)
            assert set(next(iter(entry.values()))) == {"logprob", "rank", "decoded_token"}


def test_models_are_listed_and_told_of_one_by_one(client):
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == (NAME, "runner", 256)
    assert model.parent is None and model.root.endswith("tiny")
    assert client.models.retrieve(NAME) == model


def test_the_llm_of_the_test_is_not_the_one_that_is_served(live, llm):
    assert isinstance(llm, LLM) and llm is not live.llm


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_vectors_by_the_package(client, llm, encoding):
    texts = ["one", "a second text"]
    fields = {} if encoding is None else {"encoding_format": encoding}
    answer = client.embeddings.create(model=NAME, input=texts, dimensions=8, **fields)
    want = llm.embed(texts, dimensions=8, use_tqdm=False)
    for given, expected in zip(answer.data, want, strict=True):
        vector = given.embedding
        if encoding == "base64":
            vector = np.frombuffer(base64.b64decode(vector), "<f4")
        np.testing.assert_allclose(vector, expected.vector, atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 0
