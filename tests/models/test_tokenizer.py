"""Tokenizers built from a vocabulary, and read from a directory."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from runner.errors import ModelError
from runner.models.pre_tokenizers import PRE_TOKENIZERS
from runner.models.tokenizer import Vocabulary, build_tokenizer, load_tokenizer

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
_MERGED = ["he", "ll", "hell", "hello", "Ġhello", "12", "123", "1234", "Ġw"]
_MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "123 4", "Ġ w"]
_MARKS = ["<s>", "</s>", "<|turn|>", "<pad>", "<tool>"]
_TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}</s>{% endfor %}"


def _vocabulary(pre_tokenizer: str = "gpt-2") -> Vocabulary:
    tokens = [*_MARKS, *_ALPHABET, *_MERGED]
    return Vocabulary(
        tokens=tokens,
        merges=_MERGES,
        pre_tokenizer=pre_tokenizer,
        special_ids=[0, 1, 2, 3],
        added_ids=[4],
        bos_id=0,
        eos_ids=[1, 2],
        unk_id=0,
        pad_id=3,
        chat_template=_TEMPLATE,
    )


_BUILT = {kind: build_tokenizer(_vocabulary(kind)) for kind in PRE_TOKENIZERS}


def _cut(kind: str, text: str) -> list[str]:
    tokens: list[str] = _BUILT[kind].convert_ids_to_tokens(_BUILT[kind].encode(text))
    return tokens


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
@given(text=st.text())
def test_text_comes_back_whole(kind: str, text: str) -> None:
    ids = _BUILT[kind].encode(text)
    assert _BUILT[kind].decode(ids) == text


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
@given(text=st.text(alphabet="hello wo,.é🎉12\n"))
def test_streaming_gives_the_same_text(kind: str, text: str) -> None:
    # mlx-lm's detokenizer takes a space at the very start for the tokenizer's own.
    detokenizer, text = _BUILT[kind].detokenizer, f"x{text}"
    for token in _BUILT[kind].encode(text):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("gpt-2", ["hello", "Ġhello", "1234"]),
        ("default", ["hello", "Ġhello", "123", "4"]),
        ("smollm", ["hello", "Ġhello", "1", "2", "3", "4"]),
        ("llama-bpe", ["hello", "Ġhello", "123", "4"]),
    ],
)
def test_each_kind_cuts_digits_its_own_way(kind: str, tokens: list[str]) -> None:
    assert _cut(kind, "hello hello1234") == tokens


def test_llama_takes_a_whole_word_without_merges() -> None:
    vocabulary = replace(_vocabulary("llama-bpe"), merges=_MERGES[:2])
    tokenizer = build_tokenizer(vocabulary)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello")) == ["hello"]
    tokenizer = build_tokenizer(replace(vocabulary, pre_tokenizer="gpt-2"))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hello")) == ["he", "ll", "o"]


def test_special_tokens_are_one_id_and_can_be_left_out() -> None:
    tokenizer = _BUILT["gpt-2"]
    ids = tokenizer.encode("<|turn|>he<tool></s>")
    assert ids == [2, tokenizer.convert_tokens_to_ids("he"), 4, 1]
    assert tokenizer.decode(ids) == "<|turn|>he<tool></s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<tool>"


def test_the_named_tokens_are_known() -> None:
    tokenizer = _BUILT["gpt-2"]
    assert tokenizer.eos_token_ids == {1, 2}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 3)
    assert len(tokenizer) == len(_vocabulary().tokens)


@pytest.mark.parametrize(("add_bos", "before"), [(False, []), (True, [0])])
@pytest.mark.parametrize(("add_eos", "after"), [(False, []), (True, [1])])
def test_marks_are_added_where_the_model_wants_them(
    add_bos: bool, before: list[int], add_eos: bool, after: list[int]
) -> None:
    tokenizer = build_tokenizer(replace(_vocabulary(), add_bos=add_bos, add_eos=add_eos))
    (inside,) = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [*before, inside, *after]


def test_the_chat_template_renders() -> None:
    messages = [{"role": "user", "content": "hello"}]
    tokenizer = _BUILT["smollm"]
    assert tokenizer.has_chat_template
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|turn|>hello</s>"
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode("<|turn|>hello</s>")
    plain = build_tokenizer(replace(_vocabulary(), chat_template=None))
    assert not plain.has_chat_template


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokens": ["a", "a"]}, "two ids have the same token"),
        ({"merges": ["hello world"]}, "out of vocabulary"),
        ({"special_ids": [9999]}, "index out of range"),
        ({"pad_id": 9999}, "index out of range"),
        ({"add_bos": True, "bos_id": None}, "'bos_token' is missing"),
    ],
)
def test_an_inconsistent_vocabulary_is_refused(change: dict[str, object], problem: str) -> None:
    with pytest.raises(ModelError, match=f"the vocabulary cannot be used: .*{problem}"):
        build_tokenizer(replace(_vocabulary(), **change))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model directory as far as its tokenizer goes."""
    _BUILT["gpt-2"].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    return tmp_path


def test_a_directory_gives_the_same_tokenizer(directory: Path) -> None:
    loaded, built = load_tokenizer(directory), _BUILT["gpt-2"]
    text = "hello <|turn|> 1234 é"
    assert loaded.encode(text) == built.encode(text)
    assert loaded.eos_token_ids == {1, 2}
    assert loaded.chat_template == _TEMPLATE


def test_the_generation_config_names_more_ends(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert load_tokenizer(directory).eos_token_ids == {1, 3}


@pytest.mark.parametrize("broken", ["tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_corrupt_file_is_one_line(directory: Path, broken: str) -> None:
    (directory / broken).write_text("{ not json")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(directory)
    assert str(caught.value).startswith(f"the tokenizer of {str(directory)!r} cannot be loaded: ")
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_code_in_a_directory_is_not_run(directory: Path) -> None:
    (directory / "tokenization_own.py").write_text("raise SystemExit('ran')")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_own.Own", None]}
    config["tokenizer_class"] = "Own"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    try:
        load_tokenizer(directory)
    except ModelError as error:
        assert "\n" not in str(error)
