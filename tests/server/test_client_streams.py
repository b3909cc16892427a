"""Streams by the `openai` package: the pieces put together are the answer that is not streamed."""

from collections import defaultdict

import pytest
from live_server import NAME, live_server
from tiny_files import save_tiny_model

HELLO = [{"role": "user", "content": "Hello"}]
SHOWN = ("text_offset", "token_logprobs", "tokens", "top_logprobs")


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    model = save_tiny_model(tmp_path_factory.mktemp("merging") / "tiny", merges=["a b", "t h"])
    with live_server(model) as served:
        yield served


def joined(chunks):
    """The choices of a streamed completion, put together as its clients do."""
    found = defaultdict(lambda: {"text": "", "token_ids": [], "logprobs": None})
    for chunk in chunks:
        for choice in chunk.choices:
            it, told = found[choice.index], choice.model_dump()
            assert "finish_reason" not in it, "nothing comes behind the end"
            it["text"] += choice.text
            it["token_ids"] += told.get("token_ids") or []
            if choice.logprobs is not None:
                shown = it["logprobs"] = it["logprobs"] or {name: [] for name in SHOWN}
                for name in SHOWN:
                    shown[name] += told["logprobs"][name]
            it |= {name: told[name] for name in ("prompt_token_ids", "prompt_logprobs")
                   if told.get(name) is not None}  # fmt: skip
            if choice.finish_reason is not None:
                it["finish_reason"], it["stop_reason"] = choice.finish_reason, told["stop_reason"]
    return [found[index] for index in range(len(found))]


def whole(choice):
    """The same of a choice that was not streamed."""
    told = choice.model_dump()
    names = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs")
    kept = {name: told.get(name) for name in names}
    kept["token_ids"] = kept["token_ids"] or []
    if kept["logprobs"]:
        kept["logprobs"] = {name: kept["logprobs"][name] for name in SHOWN}
    beside = ("prompt_token_ids", "prompt_logprobs")
    return kept | {name: told[name] for name in beside if told.get(name) is not None}


COMPLETIONS = [
    {"prompt": "Hello"},
    {"prompt": "Hello", "logprobs": 2, "n": 3},
    {"prompt": ["Hello", "Good bye", "third"], "n": 2, "logprobs": 0},
    {"prompt": [[5, 6, 7], [9, 30, 200, 201]], "logprobs": 1, "echo": True},
    {"prompt": "Grüße, 世界", "logprobs": 1, "echo": True, "max_tokens": 0},
    {"prompt": "abba", "echo": True, "n": 2},
    {"prompt": "Hello", "prompt_logprobs": 1, "temperature": 0},
    {"prompt": "Hello", "max_tokens": 1, "logprobs": 0},
]


@pytest.mark.parametrize("fields", COMPLETIONS, ids=str)
def test_the_pieces_of_a_completion_are_the_completion(client, fields):
    extra = {"return_token_ids": True, "ignore_eos": True}
    if "prompt_logprobs" in fields:
        extra["prompt_logprobs"] = fields["prompt_logprobs"]
    given = {"model": NAME, "max_tokens": 24, "seed": 3} | fields
    given.pop("prompt_logprobs", None)
    answer = client.completions.create(**given, extra_body=extra)
    chunks = list(client.completions.create(**given, stream=True, extra_body=extra))
    assert joined(chunks) == [whole(choice) for choice in answer.choices]
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].usage is None


@pytest.mark.parametrize("keeps", [False, True])
def test_what_may_begin_a_stop_string_comes_with_its_tokens(client, keeps):
    extra = {"return_token_ids": True, "ignore_eos": True, "include_stop_str_in_output": keeps}
    given = {"model": NAME, "prompt": "abba", "max_tokens": 24, "seed": 1, "logprobs": 0}
    text = client.completions.create(**given, extra_body=extra).choices[0].text
    for at in range(2, 12, 3):
        # The first is nearly said, again and again; the second is.
        given["stop"] = [text[at : at + 3] + "\N{SNOWMAN}", text[at + 2 : at + 5]]
        answer = client.completions.create(**given, extra_body=extra)
        chunks = list(client.completions.create(**given, stream=True, extra_body=extra))
        assert joined(chunks) == [whole(choice) for choice in answer.choices]
        assert answer.choices[0].finish_reason == "stop"


def test_a_chat_begins_with_its_role_and_its_pieces_are_the_answer(client):
    given = {"model": NAME, "messages": HELLO, "max_tokens": 20, "seed": 3, "n": 2}
    given |= {"logprobs": True, "top_logprobs": 2}
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = client.chat.completions.create(**given, extra_body=extra)
    begun, found = set(), defaultdict(lambda: ["", [], [], None])
    for chunk in client.chat.completions.create(**given, stream=True, extra_body=extra):
        assert chunk.object == "chat.completion.chunk"
        (choice,) = chunk.choices
        if choice.index not in begun:
            assert (choice.delta.role, choice.delta.content) == ("assistant", "")
            assert chunk.model_dump()["prompt_token_ids"] == answer.prompt_token_ids
            begun.add(choice.index)
            continue
        it = found[choice.index]
        assert choice.delta.role is None and it[3] is None
        it[0] += choice.delta.content or ""
        it[1] += choice.token_ids
        it[2] += choice.logprobs.content
        it[3] = choice.finish_reason
    assert [found[choice.index] for choice in answer.choices] == [
        [choice.message.content, choice.token_ids, choice.logprobs.content, choice.finish_reason]
        for choice in answer.choices
    ]
    assert begun == {0, 1}


def test_a_last_chunk_counts_the_tokens_for_those_who_ask(client):
    given = {"model": NAME, "max_tokens": 6, "n": 2, "stream": True, "seed": 1}
    given |= {"stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
    for chunks in (
        list(client.completions.create(prompt=["Hello", "you"], **given)),
        list(client.chat.completions.create(messages=HELLO, **given)),
    ):
        *pieces, last = chunks
        assert all(piece.usage is None and piece.choices for piece in pieces)
        assert last.choices == []
        num_prompts = len({c.index for p in pieces for c in p.choices}) // 2
        assert last.usage.completion_tokens == 12 * num_prompts
        counts = last.usage
        assert counts.total_tokens == counts.prompt_tokens + counts.completion_tokens


def test_a_stream_is_told_step_by_step_and_ends_with_done(live):
    """As bytes on the wire."""
    body = {"prompt": "Hello", "max_tokens": 30, "stream": True, "seed": 5, "ignore_eos": True}
    answer = live.post("/v1/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert len(events) > 12 and all(event.startswith("data: {") for event in events[:-2])
