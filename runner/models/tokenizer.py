"""Tokenizers as mlx-lm wraps them: from a model's directory, or built from a vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    StreamingDetokenizer,
    TokenizerWrapper,
)
from mlx_lm.utils import load_config
from mlx_lm.utils import load_tokenizer as load_wrapped
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from transformers import PreTrainedTokenizerFast

from runner.errors import ModelError
from runner.models.hub import one_line
from runner.models.pre_tokenizers import WHOLE_WORDS, pre_tokenizer

_TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "*.py")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A vocabulary and the tokens with a meaning of their own."""

    tokens: Sequence[str]
    """Token of each id; in a byte-level one, bytes are written as GPT-2 writes them."""
    merges: Sequence[str] = ()
    """Pairs, a space between their halves, most frequent first; of a byte-level one."""
    pre_tokenizer: str = "gpt-2"
    """How a byte-level one cuts text into words: one of `PRE_TOKENIZERS`."""
    special_ids: Sequence[int] = ()
    """Control tokens: matched in the text as a whole, left out when decoding skips them."""
    added_ids: Sequence[int] = ()
    """Tokens matched in the text as a whole that are ordinary text otherwise."""
    right_stripped_ids: Sequence[int] = ()
    """Tokens, among those above, that take the spaces after them along."""
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
    return wrap_tokenizer(_byte_level_bpe, vocabulary, BPEStreamingDetokenizer)


def wrap_tokenizer(
    build: Callable[[Vocabulary], Tokenizer],
    vocabulary: Vocabulary,
    detokenizer: Callable[..., StreamingDetokenizer],
) -> TokenizerWrapper:
    """Builds a tokenizer and gives it names and template. Raises ModelError where that fails."""
    try:
        tokenizer = build(vocabulary)
        _add_tokens(tokenizer, vocabulary)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            **_named_tokens(vocabulary),
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"the vocabulary cannot be used: {one_line(error)}") from error
    fast.chat_template = vocabulary.chat_template
    return TokenizerWrapper(fast, detokenizer, eos_token_ids=list(vocabulary.eos_ids))


def token_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """The id of every token. Raises ValueError where two have the same."""
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    if len(ids) != len(vocabulary.tokens):
        raise ValueError("two ids have the same token")
    return ids


def _named_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    ids = {
        "bos_token": vocabulary.bos_id,
        "eos_token": next(iter(vocabulary.eos_ids), None),
        "unk_token": vocabulary.unk_id,
        "pad_token": vocabulary.pad_id,
    }
    return {name: vocabulary.tokens[id] for name, id in ids.items() if id is not None}


def _byte_level_bpe(vocabulary: Vocabulary) -> Tokenizer:
    halves = [merge.partition(" ") for merge in vocabulary.merges]
    merges = [(first, second) for first, _, second in halves]
    whole_words = vocabulary.pre_tokenizer in WHOLE_WORDS
    model = models.BPE(vocab=token_ids(vocabulary), merges=merges, ignore_merges=whole_words)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer(vocabulary.pre_tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    around = sequence_marks(vocabulary)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), around]
    )
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    stripped = frozenset(vocabulary.right_stripped_ids)
    for special, group in ((True, vocabulary.special_ids), (False, vocabulary.added_ids)):
        tokenizer.add_tokens(
            [
                AddedToken(
                    vocabulary.tokens[id], special=special, normalized=False, rstrip=id in stripped
                )
                for id in group
            ]
        )


def sequence_marks(vocabulary: Vocabulary) -> processors.PostProcessor:
    """Puts the tokens before and after a text that the vocabulary asks for."""
    named = _named_tokens(vocabulary)
    before = [named["bos_token"]] if vocabulary.add_bos else []
    after = [named["eos_token"]] if vocabulary.add_eos else []
    ids = [(token, vocabulary.tokens.index(token)) for token in dict.fromkeys(before + after)]
    return processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=ids)
