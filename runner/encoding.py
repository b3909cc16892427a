"""Texts -> token ids, many at once: a fast tokenizer encodes a batch on all cores."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from runner.errors import PromptError

Item = TypeVar("Item")
TokenIds: TypeAlias = list[int]

_MOST_TEXTS = 128
MOST_CHARACTERS = 2**18
"""Of a batch, past its last text: the tokens of a long text take ten times its memory."""

_PARALLELISM = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True, slots=True)
class Text:
    """A text to encode."""

    text: str
    special: bool = True
    """Whether it gets the special tokens that the tokenizer puts around a text."""


def encode_texts(texts: Sequence[Text], tokenizer: Any) -> list[TokenIds | PromptError]:
    """Returns for each text what `tokenizer.encode` gives, or why it is no text that has tokens.

    Half of a surrogate pair is such a reason; whatever else the tokenizer raises is raised.
    """
    found: dict[int, TokenIds | PromptError] = {}
    for special in (True, False):
        places = (place for place, text in enumerate(texts) if text.special == special)
        for batch in in_batches(places, lambda place: len(texts[place].text)):
            given = [texts[place].text for place in batch]
            found.update(zip(batch, _encode(given, tokenizer, special=special), strict=True))
    return [found[place] for place in range(len(texts))]


def in_batches(items: Iterable[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Cuts items into lists that are not too long to be encoded together; reads no further."""
    batch: list[Item] = []
    num_characters = 0
    for item in items:
        batch.append(item)
        num_characters += length(item)
        if len(batch) == _MOST_TEXTS or num_characters >= MOST_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Any, *, special: bool) -> list[TokenIds | PromptError]:
    batched = _batch_form(tokenizer)
    if batched is not None and len(texts) > 1:
        try:
            return list(batched(texts, special))
        # One text that cannot be encoded fails them all; by itself it says which one it is.
        except (TypeError, ValueError):
            pass
    return [_encode_one(text, tokenizer, special=special) for text in texts]


def _encode_one(text: str, tokenizer: Any, *, special: bool) -> TokenIds | PromptError:
    # A tokenizer of the model's own code may not know the option.
    options = {} if special else {"add_special_tokens": False}
    try:
        return list(tokenizer.encode(text, **options))
    except (TypeError, ValueError):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return PromptError(f"the text is not Unicode: {error}")
        raise


def _batch_form(tokenizer: Any) -> Callable[[list[str], bool], list[TokenIds]] | None:
    """What encodes many texts exactly as `tokenizer.encode` does one; None where nothing does.

    That is sure of transformers' fast tokenizers, where no subclass has an `encode` of its own.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    # mlx-lm's wrapper passes the method of the tokenizer on, and cannot be called itself.
    method = tokenizer.encode
    owner: Any = getattr(method, "__self__", None)
    is_fast = isinstance(owner, PreTrainedTokenizerFast)
    if not is_fast or method.__func__ is not PreTrainedTokenizerBase.encode:
        return None
    _use_all_cores()

    def batched(texts: list[str], special: bool) -> list[TokenIds]:
        only_ids = {"return_attention_mask": False, "return_token_type_ids": False}
        encoded = owner(texts, add_special_tokens=special, **only_ids)
        ids: list[TokenIds] = encoded["input_ids"]
        return ids

    return batched


def _use_all_cores() -> None:
    """Settles what tokenizers do at a fork, unless the user has.

    Unsettled they print a warning in the child. A child has no threads to encode with.
    """
    if _PARALLELISM not in os.environ:
        os.environ[_PARALLELISM] = "true"
        os.register_at_fork(after_in_child=_use_one_core)


def _use_one_core() -> None:
    os.environ[_PARALLELISM] = "false"
