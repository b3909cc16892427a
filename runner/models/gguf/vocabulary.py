"""The tokenizer that the metadata of a GGUF file describes."""

from collections.abc import Callable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.models.gguf.metadata import Metadata
from runner.models.gguf.sentencepiece import build_sentencepiece, build_unigram
from runner.models.pre_tokenizers import PRE_TOKENIZERS, WHOLE_WORDS
from runner.models.tokenizer import Vocabulary, build_tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")
_KEPT_SPACES = frozenset(("<unk>", "<s>", "<|endoftext|>"))


def read_tokenizer(metadata: Metadata) -> TokenizerWrapper:
    """Builds the tokenizer. Raises ModelError, which names what is missing or not covered."""
    model = metadata.require("tokenizer.ggml.model")
    if model not in _BUILDERS:
        raise metadata.refuse(
            f"tokenizer {model!r} is not covered, only {', '.join(_BUILDERS)} are"
        )
    return _BUILDERS[model](metadata)


def eos_ids(metadata: Metadata) -> list[int]:
    """Ids of every token that ends a sequence, a turn or a message.

    As in llama.cpp, a control token with one of the names that end a turn does so where the file
    names none.
    """
    keys = [f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom")]
    stated = [metadata.get(key) for key in keys if metadata.get(key) is not None]
    if metadata.get(keys[0]) is None and metadata.get("tokenizer.ggml.model") == "llama":
        stated.insert(0, 2)
    if metadata.get(keys[1]) is None:
        tokens, types = _tokens(metadata), _types(metadata)
        named = (tokens.index(name) for name in _ENDS_OF_TURN if name in tokens)
        stated += [id for id in named if types[id] == _CONTROL][:1]
    return list(dict.fromkeys(stated))


def _byte_level(metadata: Metadata) -> TokenizerWrapper:
    kind = metadata.get("tokenizer.ggml.pre", "default")
    if kind not in PRE_TOKENIZERS:
        raise metadata.refuse(
            f"pre-tokenizer {kind!r} is not covered, only {', '.join(PRE_TOKENIZERS)} are"
        )
    if metadata.get("tokenizer.ggml.add_space_prefix"):
        raise metadata.refuse("tokenizer.ggml.add_space_prefix of a byte-level one is not covered")
    merges = metadata.require("tokenizer.ggml.merges")
    described = _described(metadata, add_bos=kind in WHOLE_WORDS)
    return build_tokenizer(Vocabulary(**described, merges=merges, pre_tokenizer=kind))


def _sentencepiece(metadata: Metadata) -> TokenizerWrapper:
    described = _described(metadata, add_bos=True, bos_id=1, unk_id=0)
    return build_sentencepiece(
        Vocabulary(**described),
        _scores(metadata),
        add_space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", True),
    )


def _unigram(metadata: Metadata) -> TokenizerWrapper:
    if metadata.get("tokenizer.ggml.treat_whitespace_as_suffix"):
        raise metadata.refuse("tokenizer.ggml.treat_whitespace_as_suffix is not covered")
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    described = _described(metadata, add_bos=False, unk_id=2)
    return build_unigram(
        Vocabulary(**described),
        _scores(metadata),
        add_space_prefix=metadata.get("tokenizer.ggml.add_space_prefix", False),
        merge_spaces=metadata.get("tokenizer.ggml.remove_extra_whitespaces", False),
        charsmap=bytes(byte & 255 for byte in charsmap) if charsmap else None,
    )


_BUILDERS: dict[str, Callable[[Metadata], TokenizerWrapper]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _unigram,
}
"""By llama.cpp's name of the tokenizer: byte-level BPE, SentencePiece's BPE, and unigram."""


def _described(
    metadata: Metadata, *, add_bos: bool, bos_id: int | None = None, unk_id: int | None = None
) -> dict[str, Any]:
    """What every vocabulary has; the arguments are llama.cpp's where the file does not say."""
    tokens, types = _tokens(metadata), _types(metadata)
    special = [id for id, type in enumerate(types) if type in (_UNKNOWN, _CONTROL)]
    added = [id for id, type in enumerate(types) if type == _USER_DEFINED]
    stripped = [id for id in (*special, *added) if tokens[id] not in _KEPT_SPACES]
    return {
        "tokens": tokens,
        "special_ids": special,
        "added_ids": added,
        "right_stripped_ids": stripped if _strips_spaces(metadata) else [],
        "bos_id": metadata.get("tokenizer.ggml.bos_token_id", bos_id),
        "eos_ids": eos_ids(metadata),
        "unk_id": metadata.get("tokenizer.ggml.unknown_token_id", unk_id),
        "pad_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "add_bos": metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "add_eos": metadata.get(
            "tokenizer.ggml.add_eos_token", metadata.get("tokenizer.ggml.model") == "t5"
        ),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }


def _strips_spaces(metadata: Metadata) -> bool:
    """Whether the marks of Phi 3 take the spaces after them along, which files do not say."""
    name = str(metadata.get("general.name", "")).lower()
    return "phi-3" in name or "phi3" in name


def _tokens(metadata: Metadata) -> list[str]:
    tokens: list[str] = metadata.require("tokenizer.ggml.tokens")
    return tokens


def _types(metadata: Metadata) -> list[int]:
    types: list[int] = metadata.require("tokenizer.ggml.token_type")
    if len(types) < len(_tokens(metadata)):
        raise metadata.refuse("it has fewer token types than tokens")
    return types


def _scores(metadata: Metadata) -> list[float]:
    scores: list[float] = metadata.require("tokenizer.ggml.scores")
    if len(scores) < len(_tokens(metadata)):
        raise metadata.refuse("it has fewer scores than tokens")
    return scores
