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
    return TextOffsets(token_bytes).of(text, token_ids)


class TextOffsets:
    """The same for a text that grows, a piece of it and of its tokens at a time."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes, self._place = token_bytes, 0
        self._pending = codecs.getincrementaldecoder("utf-8")("replace")

    def of(self, text: str, token_ids: Sequence[int]) -> Iterator[int]:
        """Those of the tokens that are new in the text so far; read them before the next."""
        for token_id in token_ids:
            token = self._token_bytes(token_id)
            if token and token[0] & 0xC0 != 0x80 and not self._ends_a_character(text, token):
                yield self._place
                continue
            yield self._place
            self._pass_over(text, self._pending.decode(token))

    def _ends_a_character(self, text: str, token: bytes) -> bool:
        """Passes over a character that is unfinished where a token begins another one.

        False where the text leaves that token out, and what comes behind it may go on with the
        character.
        """
        begun = self._pending.getstate()
        if not begun[0]:
            return True
        broken = self._pending.decode(b"", final=True)
        said = broken + codecs.getincrementaldecoder("utf-8")("replace").decode(token)
        if not said.startswith(text[self._place : self._place + len(said)]):
            self._pending.setstate(begun)
            return False
        self._pass_over(text, broken)
        return True

    def _pass_over(self, text: str, said: str) -> None:
        self._place += _num_passed(text, self._place, said)


def _num_passed(text: str, place: int, said: str) -> int:
    """Characters of a text, from `place` on, that stand for what was said."""
    found = text[place : place + len(said)]
    # Some tokenizers drop the space that a text begins with.
    if place == 0 and found != said and text.startswith(said.lstrip(" ")):
        return len(said.lstrip(" "))
    return len(found) if said.startswith(found) else 0
