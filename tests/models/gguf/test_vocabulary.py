"""Tokenizers rebuilt from metadata, against llama.cpp's."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_gguf import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZER_KINDS,
    SENTENCEPIECE_VARIANTS,
    STRESS,
    UNIGRAM_VARIANTS,
    sentencepiece,
    unigram,
)

from runner.errors import ModelError
from runner.models.gguf.metadata import Metadata
from runner.models.gguf.vocabulary import eos_ids, read_tokenizer
from runner.models.pre_tokenizers import PRE_TOKENIZERS
from runner.models.token_bytes import TokenBytes

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "gguf_by_llama_cpp.json").read_text())[
    "vocabularies"
]
# Of two equally likely ways to cut a run, either is right: the sums of the scores are the same.
_TIED = {("unigram", "runs"), ("unigram no prefix", "runs")}


def _metadata(values: dict[str, Any]) -> Metadata:
    return Metadata(Path("tiny.gguf"), {"general.architecture": "llama"} | values)


_TOKENIZERS = {
    name: read_tokenizer(_metadata(values))
    for name, values in (SENTENCEPIECE_VARIANTS | UNIGRAM_VARIANTS).items()
}


def test_every_pre_tokenizer_was_tried_on_llama_cpp() -> None:
    alike = {"llama3", "llama-v3", "falcon3", "pixtral", "megrez"}
    assert set(PRE_TOKENIZERS) - alike == set(PRE_TOKENIZER_KINDS)
    assert GOLDEN.keys() == {*PRE_TOKENIZER_KINDS, *_TOKENIZERS}


@pytest.mark.parametrize("text", STRESS)
@pytest.mark.parametrize("name", _TOKENIZERS)
def test_token_ids_are_those_of_llama_cpp(name: str, text: str) -> None:
    ids, expected = list(_TOKENIZERS[name].encode(STRESS[text])), GOLDEN[name][text]
    if (name, text) in _TIED:
        ids, expected = sorted(ids), sorted(expected)
    assert ids == expected


def _merged(pieces: list[str], scores: dict[str, float]) -> list[str]:
    """SentencePiece's own rule: the best pair first, of equal ones the leftmost."""
    while True:
        joined = [first + second for first, second in zip(pieces, pieces[1:], strict=False)]
        known = [(-scores[text], place) for place, text in enumerate(joined) if text in scores]
        if not known:
            return pieces
        place = min(known)[1]
        pieces = [*pieces[:place], joined[place], *pieces[place + 2 :]]


@given(st.text("ab the.lo", max_size=24))
def test_neighbours_are_merged_by_score(text: str) -> None:
    values = SENTENCEPIECE_VARIANTS["no prefix"]
    tokens = values["tokenizer.ggml.tokens"]
    scored = zip(
        tokens, values["tokenizer.ggml.scores"], values["tokenizer.ggml.token_type"], strict=True
    )
    scores = {token: score for token, score, type in scored if type == NORMAL}
    expected = _merged(list(text.replace(" ", "▁")), scores)
    ids = _TOKENIZERS["no prefix"].encode(text, add_special_tokens=False)
    assert [tokens[id] for id in ids] == expected


@pytest.mark.parametrize("name", SENTENCEPIECE_VARIANTS)
@pytest.mark.parametrize("text", ["prose", "code", "emoji", "cjk", "scripts", "runs", "control"])
def test_a_text_comes_back(name: str, text: str) -> None:
    tokenizer = _TOKENIZERS[name]
    ids = tokenizer.encode(STRESS[text], add_special_tokens=False)
    assert tokenizer.decode(ids) == STRESS[text]
    detokenizer = tokenizer.detokenizer
    for id in ids:
        detokenizer.add_token(id)
    detokenizer.finalize()
    assert detokenizer.text == STRESS[text]
    start = " " if name != "no prefix" else ""
    assert b"".join(map(TokenBytes(tokenizer), ids)).decode() == start + STRESS[text]


def test_marks_in_a_text_are_single_tokens() -> None:
    tokenizer = _TOKENIZERS["no prefix"]
    marks = ["<s>", "he", "<tool>", "</s>"]
    ids = tokenizer.encode("".join(marks), add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == marks
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he<tool>"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (
            sentencepiece(**{"tokenizer.ggml.model": "rwkv"}),
            "'rwkv' is not covered, only gpt2, lla",
        ),
        (
            sentencepiece(**{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "kimi-k2"}),
            "pre-tokenizer 'kimi-k2' is not covered, only default, gpt-2, ",
        ),
        (sentencepiece(**{"tokenizer.ggml.model": "gpt2"}), "the metadata 'tokenizer.ggml.merges'"),
        (
            sentencepiece(
                **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.add_space_prefix": True}
            ),
            "add_space_prefix of a byte-level one",
        ),
        (sentencepiece(equal_scores=True), "have the same score"),
        (sentencepiece(**{"tokenizer.ggml.scores": [0.0]}), "it has fewer scores than tokens"),
        (sentencepiece(**{"tokenizer.ggml.token_type": [1]}), "it has fewer token types than"),
        (
            sentencepiece(
                **{
                    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
                    "tokenizer.ggml.scores": [0.0] * 4,
                    "tokenizer.ggml.token_type": [2, 3, 3, 1],
                }
            ),
            "256 bytes have no token, <0x00> among them",
        ),
        (
            unigram(**{"tokenizer.ggml.treat_whitespace_as_suffix": True}),
            "treat_whitespace_as_suffix is not covered",
        ),
    ],
)
def test_what_cannot_be_rebuilt_is_named(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_tokenizer(_metadata(values))
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_every_end_that_the_file_names_ends_a_completion() -> None:
    values = sentencepiece(**{"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2})
    assert eos_ids(_metadata(values)) == [2, 7]


@pytest.mark.parametrize(("type", "ids"), [(CONTROL, [2, 3]), (NORMAL, [2])])
def test_a_control_token_may_end_a_turn_by_its_name(type: int, ids: list[int]) -> None:
    values = sentencepiece()
    tokens, types = list(values["tokenizer.ggml.tokens"]), list(values["tokenizer.ggml.token_type"])
    tokens[3], types[3] = "<end_of_turn>", type
    changed = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    assert eos_ids(_metadata(values | changed)) == ids


def test_marks_of_phi_3_take_the_spaces_after_them() -> None:
    ids = {}
    for name in ("Phi 3", "Phi-3 mini"):
        tokenizer = read_tokenizer(_metadata(sentencepiece(**{"general.name": name})))
        ids[name] = tokenizer.convert_ids_to_tokens(tokenizer.encode("</s>  a<s> a"))
    assert ids["Phi 3"] == ["<s>", "</s>", "▁▁", "▁a", "<s>", "▁", "▁a"]
    assert ids["Phi-3 mini"] == ["<s>", "</s>", "▁a", "<s>", "▁", "▁a"]


def test_the_template_and_the_marks_are_the_files() -> None:
    template = "{% for m in messages %}{{ bos_token }}{{ m['content'] }}{% endfor %}"
    values = sentencepiece(**{"tokenizer.chat_template": template})
    tokenizer = read_tokenizer(_metadata(values))
    messages = [{"role": "user", "content": "he"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>he"
    assert tokenizer.eos_token_ids == {2} and tokenizer.unk_token == "<unk>"
