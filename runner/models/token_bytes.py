"""The bytes that a token stands for, which decoding it alone does not always tell."""

import json
import re
from functools import lru_cache
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"


class TokenBytes:
    """Token id -> its bytes, read off the vocabulary.

    Decoding a single token loses a space at its start, or gives a replacement character for half
    of one. Covered are byte-level vocabularies (GPT-2's alphabet) and those of sentencepiece
    (`▁` and `<0xE2>`); with any other tokenizer it is the text that decoding the token gives.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        steps = _decoder_steps(tokenizer)
        self._is_byte_level = "ByteLevel" in steps
        self._is_sentencepiece = not self._is_byte_level and bool(
            steps & {"ByteFallback", "Metaspace", "Replace"}
        )
        self._of = lru_cache(maxsize=65536)(self._look_up)

    def __call__(self, token_id: int) -> bytes:
        """The bytes; none for an id that the vocabulary does not have."""
        return self._of(token_id)

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            return b"".join(_BYTE_OF.get(char) or char.encode() for char in token)
        if self._is_sentencepiece:
            found = _BYTE_TOKEN.fullmatch(token)
            word = token.replace(_WORD_START, " ")
            return bytes.fromhex(found[1]) if found else word.encode()
        return str(self._tokenizer.decode([token_id])).encode()


def _decoder_steps(tokenizer: Any) -> set[str]:
    """The names of what the tokenizer's decoder does; none for one that does not say."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {state["type"], *(step["type"] for step in state.get("decoders", ()))}


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's way to write any byte as a printable character: those that are not printable follow
    after the first 256 code points."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    moved = {chr(256 + place): bytes([byte]) for place, byte in enumerate(others)}
    return {chr(byte): bytes([byte]) for byte in sorted(printable)} | moved


_BYTE_OF = _byte_alphabet()
