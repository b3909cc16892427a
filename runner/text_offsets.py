"""Where tokens begin in the text that they make, in characters."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

TokenBytes: TypeAlias = Callable[[int], bytes]
"""The bytes that a token id stands for, also where they are half a character."""


def text_of(token_ids: Sequence[int], token_bytes: TokenBytes) -> str:
    """The text of token ids, special tokens included; bytes that are no character become U+FFFD."""
    return b"".join(map(token_bytes, token_ids)).decode(errors="replace")


def text_offsets(text: str, token_ids: Sequence[int], token_bytes: TokenBytes) -> Iterator[int]:
    """Where in a text each of its tokens begins, in characters; never beyond the text's end.

    Tokens that share a character all have the place where it begins. A token that the text leaves
    out, a special one or what came after a stop string, has the offset of what follows it.
    """
    place, pending = 0, codecs.getincrementaldecoder("utf-8")("replace")
    for token_id in token_ids:
        token = token_bytes(token_id)
        if token and pending.getstate()[0] and token[0] & 0xC0 != 0x80:
            # It begins a character, so the one before it stays unfinished; or else the text leaves
            # it out, and what comes behind it goes on with that one.
            begun = pending.getstate()
            broken = pending.decode(b"", final=True)
            said = broken + codecs.getincrementaldecoder("utf-8")("replace").decode(token)
            if not said.startswith(text[place : place + len(said)]):
                pending.setstate(begun)
                yield place
                continue
            place += _num_passed(text, place, broken)
        yield place
        place += _num_passed(text, place, pending.decode(token))


def _num_passed(text: str, place: int, said: str) -> int:
    """Characters of a text, from `place` on, that stand for what was said."""
    found = text[place : place + len(said)]
    # Some tokenizers drop the space that a text begins with.
    if place == 0 and found != said and text.startswith(said.lstrip(" ")):
        return len(said.lstrip(" "))
    return len(found) if said.startswith(found) else 0
