"""The bytes of tokens: put together they are the bytes of the text, whatever the vocabulary."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from runner.models.token_bytes import TokenBytes
from runner.models.tokenizer import Vocabulary, build_tokenizer

BYTE_LEVEL = Vocabulary(
    tokens=["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"],
    merges=["Ġ t", "h e", "Ġt he"],
    pre_tokenizer="gpt-2",
    special_ids=[0, 1],
    eos_ids=[1],
)


def sentencepiece() -> PreTrainedTokenizerFast:
    """A vocabulary as Llama 2 has it: `▁` for a space, byte tokens for what is not in it."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    fast = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fast.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>")


@given(text=st.text())
def test_byte_level_tokens_join_to_the_text(text: str) -> None:
    tokenizer = build_tokenizer(BYTE_LEVEL)
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(token_bytes, ids)) == text.encode()


@given(text=st.text(st.sampled_from("ab é\U0001f600"), min_size=1))
def test_sentencepiece_tokens_join_to_the_text_after_the_space_it_adds(text: str) -> None:
    tokenizer = TokenizerWrapper(sentencepiece())
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(token_bytes, ids)) == b" " + text.encode()


def test_a_space_and_half_a_character_are_kept_where_decoding_loses_them() -> None:
    tokenizer = TokenizerWrapper(sentencepiece())
    token_bytes = TokenBytes(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["▁a", "<0xE2>"])
    assert [token_bytes(i) for i in ids] == [b" a", b"\xe2"]
    assert tokenizer.decode(ids[:1]) == "a"


@pytest.mark.parametrize("token_id", [0, 1])
def test_a_special_token_is_its_name(token_id: int) -> None:
    assert TokenBytes(build_tokenizer(BYTE_LEVEL))(token_id) == [b"<s>", b"</s>"][token_id]


def test_an_id_that_the_vocabulary_does_not_have_is_no_bytes() -> None:
    assert TokenBytes(build_tokenizer(BYTE_LEVEL))(9999) == b""


def test_a_tokenizer_that_says_nothing_about_itself_is_asked_to_decode() -> None:
    class Words:
        added_tokens_decoder: dict[int, str] = {}

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return f"w{token_id}"

        def decode(self, token_ids: list[int]) -> str:
            return "é" * token_ids[0]

    assert TokenBytes(Words())(2) == "éé".encode()


def test_the_tiny_model_of_the_tests_has_a_token_per_byte(tiny_directory: Path) -> None:
    from runner.models.tokenizer import load_tokenizer

    token_bytes = TokenBytes(load_tokenizer(tiny_directory))
    assert sorted(token_bytes(i) for i in range(2, 258)) == [bytes([byte]) for byte in range(256)]
