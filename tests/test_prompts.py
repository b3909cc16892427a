"""From a row to tokens: every source, every refusal, and the digest that names a prompt."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runner.errors import ParameterError, PromptError
from runner.prompts import PromptBuilder, encode_bad_words, encode_prompt, prompt_digest
from runner.types import Prompt

USER = {"role": "user", "content": "hello world"}
WORDS = ["<s>", "<unk>", "hello", "world", "user", "system", "assistant", ":", "brief"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}{% if loud %} world{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", eos_token="<unk>"
    )
    fast.chat_template = chat_template
    return TokenizerWrapper(fast)


def words(token_ids: list[int]) -> list[str]:
    return [WORDS[token_id] for token_id in token_ids]


def test_a_prompt_column_is_text() -> None:
    assert PromptBuilder(prompt_column="q")({"q": " a\n"}) == Prompt(text=" a\n")


def test_chat_sends_text_as_a_user_message() -> None:
    build = PromptBuilder(prompt_column="q", chat=True, system_prompt="brief")
    assert build({"q": "a"}).messages == [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "a"},
    ]


def test_messages_and_their_options_pass_through() -> None:
    build = PromptBuilder(messages_column="m", chat_template_kwargs={"enable_thinking": False})
    prompt = build({"m": [USER]})
    assert prompt.messages == [USER]
    assert prompt.chat_template_kwargs == {"enable_thinking": False}


def test_a_prompt_column_may_hold_messages() -> None:
    assert PromptBuilder(prompt_column="prompt")({"prompt": [USER]}).messages == [USER]


def test_null_keys_of_messages_are_dropped_at_any_depth() -> None:
    call = {"function": {"name": "f", "arguments": {"x": 1, "y": None}}, "id": None}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    assert PromptBuilder(messages_column="m")({"m": [message]}).messages == [
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
        }
    ]


def test_token_ids_pass_through() -> None:
    assert PromptBuilder(token_ids_column="t")({"t": [3, 0, 2]}) == Prompt(token_ids=[3, 0, 2])


def test_a_template_sees_every_column_and_keeps_its_last_newline() -> None:
    build = PromptBuilder(template="Q: {{ q }}{% if n > 1 %}!{% endif %}\nA:\n")
    assert build({"q": "a", "n": 2}).text == "Q: a!\nA:\n"
    assert PromptBuilder(template="{{ q }}", chat=True)({"q": "a"}).messages == [
        {"role": "user", "content": "a"}
    ]


@pytest.mark.parametrize(
    ("options", "row", "message"),
    [
        ({"prompt_column": "q"}, {"q": None}, "q: the prompt is null"),
        ({"prompt_column": "q"}, {"q": ""}, "q: the prompt is empty"),
        ({"prompt_column": "q"}, {"q": 5}, "q: the prompt is int, not text"),
        ({"prompt_column": "q"}, {"a": "x", "b": "y"}, "no column 'q', only a, b"),
        ({"prompt_column": "q"}, {"q": []}, "not a list of messages"),
        ({"template": "{{ nope }}"}, {"q": "a"}, r"'nope' is undefined \(columns: q\)"),
        ({"template": "{{ q.nope.more }}"}, {"q": {}}, "has no attribute 'nope'"),
        ({"template": "{{ 1 // q }}"}, {"q": 0}, "prompt_template: integer division"),
        ({"template": "{{ q }}"}, {"q": ""}, "prompt_template: the prompt is empty"),
        ({"template": "{{ ''.__class__.__mro__ }}"}, {"q": ""}, "unsafe"),
        ({"messages_column": "m"}, {"m": None}, "m: the prompt is null"),
        ({"messages_column": "m"}, {"m": []}, r"m: \[\] is not a list of messages"),
        ({"messages_column": "m"}, {"m": "text"}, "m: 'text' is not a list of messages"),
        ({"messages_column": "m"}, {"m": ["text"]}, "m: message 0 is not a {role, content}"),
        ({"messages_column": "m"}, {"m": [USER, {"content": "a"}]}, "m: message 1 is not a"),
        ({"messages_column": "m"}, {"m": [{"role": "user"}]}, "m: message 0 has no content"),
        ({"token_ids_column": "t"}, {"t": []}, r"t: \[\] is not a list of token ids"),
        ({"token_ids_column": "t"}, {"t": "12"}, "t: '12' is not a list of token ids"),
        ({"token_ids_column": "t"}, {"t": [1, None]}, "t: None is not a token id"),
        ({"token_ids_column": "t"}, {"t": [1, -1]}, "t: -1 is not a token id"),
        ({"token_ids_column": "t"}, {"t": [True]}, "t: True is not a token id"),
    ],
)
def test_rows_without_a_usable_prompt(
    options: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(PromptError, match=message) as raised:
        PromptBuilder(**options)(row)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs one of prompt_column, .*; given: none"),
        ({"prompt_column": "q", "template": "x"}, "given: prompt_column, prompt_template"),
        ({"prompt_column": "q", "system_prompt": "x"}, "system_prompt='x' needs chat=True"),
        ({"template": "q", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs=.* needs chat"),
        ({"token_ids_column": "t", "chat": True}, "cannot be used with token_ids_column"),
        ({"template": "\n{% if %}"}, "prompt_template, line 2: "),
        (
            {"messages_column": "m", "chat_template_kwargs": {"tokenize": True}},
            "cannot set tokenize",
        ),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        PromptBuilder(**options)


def test_text_gets_the_special_tokens_of_the_tokenizer() -> None:
    text, token_ids = encode_prompt(Prompt(text="hello world"), make_tokenizer())
    assert text == "hello world"
    assert words(token_ids) == ["<s>", "hello", "world"]


def test_messages_get_those_of_the_chat_template_and_no_others() -> None:
    text, token_ids = encode_prompt(Prompt(messages=[USER]), make_tokenizer())
    assert text == "user : hello world assistant :"
    assert words(token_ids) == ["user", ":", "hello", "world", "assistant", ":"]


def test_token_ids_are_taken_as_they_are() -> None:
    assert encode_prompt(Prompt(token_ids=(5, 3)), make_tokenizer()) == (None, [5, 3])


def test_chat_template_kwargs_reach_the_template() -> None:
    options = {"loud": True, "add_generation_prompt": False}
    prompt = Prompt(messages=[USER], chat_template_kwargs=options)
    assert encode_prompt(prompt, make_tokenizer())[0] == "user : hello world  world"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "chat template: no system role"),
        ("{{ messages[0].content + 1 }}", "chat template: .*str"),
        ("{% if %}", "chat template: Expected an expression"),
        (None, "chat template: .*chat_template is not set"),
    ],
)
def test_a_chat_template_that_fails(template: str | None, message: str) -> None:
    with pytest.raises(PromptError, match=message) as raised:
        encode_prompt(Prompt(messages=[USER]), make_tokenizer(template))
    assert "\n" not in str(raised.value)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(PromptError, match="the prompt has no tokens"):
        encode_prompt(Prompt(messages=[USER]), make_tokenizer("{{ '' }}"))


class Pieces:
    """A tokenizer of a table: text -> tokens, where a space may be part of a token."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        table = {"cat": [1], " cat": [2], "dogs": [3, 4], " dogs": [5, 6, 7], "é": [8], " é": [8]}
        return table[text]


def test_a_bad_word_is_tokenised_at_the_start_and_after_a_space_where_that_is_another_one() -> None:
    assert encode_bad_words(["cat", " cat", "dogs", "é"], Pieces()) == (
        (1,), (2,), (1,), (2,), (3, 4), (8,),
    )  # fmt: skip


def test_digests_are_stable() -> None:
    # python -c "import hashlib; print(hashlib.blake2b(b'{\"text\":\"hello\"}', digest_size=8)
    # .hexdigest())"
    assert prompt_digest(Prompt(text="hello")) == "d9e75fb97542f602"


def test_a_digest_ignores_the_order_of_keys_and_the_kind_of_sequence() -> None:
    turned = dict(reversed(USER.items()))
    assert prompt_digest(Prompt(messages=[USER])) == prompt_digest(Prompt(messages=(turned,)))
    assert prompt_digest(Prompt(token_ids=[1])) == prompt_digest(Prompt(token_ids=(1,)))


PROMPTS = st.one_of(
    st.text(max_size=3).map(lambda text: Prompt(text=text)),
    st.lists(st.integers(0, 3), max_size=3).map(lambda ids: Prompt(token_ids=ids)),
    st.builds(
        lambda content, kwargs: Prompt(
            messages=[{"role": "user", "content": content}], chat_template_kwargs=kwargs
        ),
        st.text(max_size=3),
        st.dictionaries(st.sampled_from("ab"), st.booleans(), max_size=1),
    ),
)


@given(one=PROMPTS, other=PROMPTS)
def test_different_prompts_have_different_digests(one: Prompt, other: Prompt) -> None:
    digests = prompt_digest(one), prompt_digest(other)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)
    assert (digests[0] == digests[1]) == (one == other)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_the_tools_of_a_row_reach_the_template(tools: Any) -> None:
    build = PromptBuilder(messages_column="m", tools_column="t", chat_template_kwargs={"a": 1})
    prompt = build({"m": [USER], "t": tools})
    assert prompt.chat_template_kwargs == {"a": 1, "tools": [TOOL]}
    for none in (None, []):
        assert build({"m": [USER], "t": none}).chat_template_kwargs == {"a": 1}
    tokenizer = make_tokenizer()
    with pytest.raises(PromptError, match="the model's chat template takes no tools"):
        encode_prompt(prompt, tokenizer)
    tokenizer.chat_template = "{% for tool in tools %}{{ tool.function.name }}{% endfor %} hello"
    assert encode_prompt(prompt, tokenizer)[0] == "add hello"


@pytest.mark.parametrize("tools", ["{", '{"a": 1}', [1], 5, '"text"'])
def test_what_is_no_list_of_tools_is_an_error_of_the_row(tools: Any) -> None:
    build = PromptBuilder(messages_column="m", tools_column="t")
    with pytest.raises(PromptError, match="t: .*(tools are not JSON|is not a list of tools)"):
        build({"m": [USER], "t": tools})


def test_tools_are_of_a_chat() -> None:
    with pytest.raises(ParameterError, match="tools_column='t' needs chat=True"):
        PromptBuilder(prompt_column="p", tools_column="t")
