"""Tokenizers as mlx-lm wraps them: from a model's directory, or built from a vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from mlx_lm.utils import load_config
from mlx_lm.utils import load_tokenizer as load_wrapped
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from runner.errors import ModelError
from runner.models.hub import one_line

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "*.py")
PRE_TOKENIZERS = ("default", "gpt-2", "llama-bpe", "smollm")
"""The ways to cut text into words before the merges, by the names that llama.cpp gives them."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A byte-level BPE vocabulary and the tokens with a meaning of their own."""

    tokens: Sequence[str]
    """Token of each id, bytes written as GPT-2 writes them."""
    merges: Sequence[str]
    """Pairs, a space between their halves, most frequent first."""
    pre_tokenizer: str
    special_ids: Sequence[int] = ()
    """Control tokens: matched in the text as a whole, left out when decoding skips them."""
    added_ids: Sequence[int] = ()
    """Tokens matched in the text as a whole that are ordinary text otherwise."""
    bos_id: int | None = None
    eos_ids: Sequence[int] = ()
    """Every token that ends a completion, the end-of-sequence token first."""
    unk_id: int | None = None
    pad_id: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> TokenizerWrapper:
    """Loads the tokenizer of a model directory, with every end-of-sequence token it states.

    Code that a directory brings along is run with `trust_remote_code` alone. Raises ModelError.
    """
    try:
        return load_wrapped(
            directory,
            {"trust_remote_code": trust_remote_code},
            eos_token_ids=load_config(directory).get("eos_token_id"),
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = one_line(error)
        if not any(next(directory.glob(name), None) for name in _TOKENIZER_FILES):
            reason = f"it has none of {', '.join(_TOKENIZER_FILES)}"
        elif "trust_remote_code" in str(error):
            reason = own_code()
        raise ModelError(
            f"the tokenizer of {str(directory)!r} cannot be loaded: {reason}"
        ) from error


def own_code(name: str = "") -> str:
    """What is said of files that need code of their own, which was not asked for."""
    return f"it needs code of its own{name}, which only model.trust_remote_code=true runs"


def build_tokenizer(vocabulary: Vocabulary) -> TokenizerWrapper:
    """Builds a byte-level BPE tokenizer. Raises ModelError if the vocabulary is inconsistent."""
    try:
        fast = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level_bpe(vocabulary),
            clean_up_tokenization_spaces=False,
            **_named_tokens(vocabulary),
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"the vocabulary cannot be used: {one_line(error)}") from error
    fast.chat_template = vocabulary.chat_template
    return TokenizerWrapper(fast, BPEStreamingDetokenizer, eos_token_ids=list(vocabulary.eos_ids))


def _named_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    ids = {
        "bos_token": vocabulary.bos_id,
        "eos_token": next(iter(vocabulary.eos_ids), None),
        "unk_token": vocabulary.unk_id,
        "pad_token": vocabulary.pad_id,
    }
    return {name: vocabulary.tokens[id] for name, id in ids.items() if id is not None}


def _byte_level_bpe(vocabulary: Vocabulary) -> Tokenizer:
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        raise ValueError("two ids have the same token")
    halves = [merge.partition(" ") for merge in vocabulary.merges]
    merges = [(first, second) for first, _, second in halves]
    # Llama 3 takes a word that is a token as it is, also where no merges lead to it.
    whole_words = vocabulary.pre_tokenizer == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = _pre_tokenizer(vocabulary.pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    for special, group in ((True, vocabulary.special_ids), (False, vocabulary.added_ids)):
        tokenizer.add_tokens(
            [AddedToken(vocabulary.tokens[id], special=special, normalized=False) for id in group]
        )
    tokenizer.post_processor = _post_processor(vocabulary)
    return tokenizer


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    assert kind in PRE_TOKENIZERS
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama-bpe")
    if kind == "llama-bpe":
        split = pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated")
        return pre_tokenizers.Sequence([split, words])
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return words


def _post_processor(vocabulary: Vocabulary) -> processors.PostProcessor:
    named = _named_tokens(vocabulary)
    before = [named["bos_token"]] if vocabulary.add_bos else []
    after = [named["eos_token"]] if vocabulary.add_eos else []
    ids = [(token, vocabulary.tokens.index(token)) for token in dict.fromkeys(before + after)]
    around = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
    return processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
