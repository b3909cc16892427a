"""Where tokens begin in their text, also where it is not made of whole characters."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.text_offsets import text_of, text_offsets


@pytest.mark.parametrize(
    ("said", "tokens", "offsets"),
    [
        ("a bc d", [b"a", b" bc", b" d"], [0, 1, 4]),
        ("é!", ["é".encode()[:1], "é".encode()[1:], b"!"], [0, 0, 1]),
        ("\U0001f600x", [b"\xf0", b"\x9f\x98", b"\x80", b"x"], [0, 0, 0, 1]),
        ("ab", [b"a", b"<x>", b"b", b"</s>"], [0, 1, 1, 2]),
        ("ab", [b"ab", b"cd", b"ef"], [0, 2, 2]),
        ("ab", [b"a", b"bcd"], [0, 1]),
        ("a b", [b" a", b" b"], [0, 1]),
        ("", [b"</s>"], [0]),
        ("\ufffda", [b"\xe4\xb8", b"a"], [0, 1]),
        ("a\ufffd", [b"a", b"\xe4\xb8"], [0, 1]),
        ("\u4e16\u754c", ["\u4e16".encode() + b"\xe7", b"\x95\x8c"], [0, 1]),
        ("", [], []),
    ],
    ids=["words", "halves", "parts", "special", "cut", "cut inside", "lost space", "nothing",
         "broken", "unfinished", "one and a half", "none"],
)  # fmt: skip
def test_offsets_are_places_in_the_text(said: str, tokens: list[bytes], offsets: list[int]) -> None:
    assert list(text_offsets(said, range(len(tokens)), tokens.__getitem__)) == offsets


@given(st.text(max_size=12), st.randoms(use_true_random=False))
def test_any_cut_of_any_text_into_tokens(said, random):
    """Each token begins with the character that its first byte belongs to, which is rarely cut."""
    whole = said.encode()
    cuts = sorted({0, *(random.randrange(len(whole)) for _ in range(6) if whole)})
    parts = [whole[a:b] for a, b in pairwise([*cuts, len(whole)]) if a < b]
    owners = [place for place, char in enumerate(said) for _ in char.encode()]
    starts = [cut for cut in cuts if cut < len(whole)]
    found = list(text_offsets(said, range(len(parts)), parts.__getitem__))
    assert found == [owners[start] for start in starts]
    assert text_of(range(len(parts)), parts.__getitem__) == said


@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_bytes_with_tokens_between_them_that_the_text_leaves_out(token_ids):
    """Also where one stands inside a character, or inside what will never be one."""
    said = bytes(i for i in token_ids if i < 256).decode(errors="replace")
    token_bytes = [*(bytes([i]) for i in range(256)), b"</s>"]
    found = list(text_offsets(said, [*token_ids, 256], token_bytes.__getitem__))
    assert found[-1] == len(said)
    assert all(a <= b for a, b in pairwise(found))
