import pytest

from runner.engine.stop import StopStringMatcher, TextStream

TEXT = "naïve 🙂 stop"
BYTES = list(TEXT.encode())


def decode(token_ids: list[int], *, skip_special_tokens: bool) -> str:
    """A token is a byte; 300 is a special token, shown as <s>."""
    kept = [i for i in token_ids if i != 300 or not skip_special_tokens]
    parts, run = [], bytearray()
    for token_id in kept:
        if token_id == 300:
            parts += [run.decode(errors="replace"), "<s>"]
            run = bytearray()
        else:
            run.append(token_id)
    return "".join([*parts, run.decode(errors="replace")])


def first_stop(stop: list[str], token_ids: list[int], **options: int) -> tuple[int, str] | None:
    matcher = StopStringMatcher(stop, decode, **options)
    for place, token_id in enumerate(token_ids):
        found = matcher.push(token_id)
        if found is not None:
            return place, found
    return None


def test_text_comes_in_whole_characters():
    stream = TextStream(decode, skip_special_tokens=True)
    pieces = [stream.push(token_id) for token_id in BYTES]
    assert "".join(pieces) == TEXT
    assert pieces[2:4] == ["", "ï"]
    assert [len(piece) for piece in pieces[BYTES.index(0xF0) :][:4]] == [0, 0, 0, 1]


@pytest.mark.parametrize("stop", ["st", "stop", "🙂", "e 🙂 s", "n", "p"])
def test_found_at_the_token_that_completes_it(stop):
    end = len(TEXT[: TEXT.index(stop) + len(stop)].encode())
    assert first_stop([stop], BYTES) == (end - 1, stop)


def test_the_earliest_of_several_wins():
    assert first_stop(["stop", "e", "naï"], BYTES) == (3, "naï")
    assert first_stop(["op", "stop"], BYTES) == (len(BYTES) - 2 + 1, "stop")


def test_not_found():
    assert first_stop(["stops", "STOP"], BYTES) is None


def test_a_match_may_not_reach_over_what_was_never_there():
    assert first_stop(["ab"], list(b"a-b")) is None
    assert first_stop(["aab"], list(b"aaab")) == (3, "aab")


@pytest.mark.parametrize(("skip", "found"), [(True, None), (False, (1, "<s>"))])
def test_special_tokens_count_only_where_they_are_shown(skip, found):
    assert first_stop(["<s>"], [97, 300, 98], skip_special_tokens=skip) == found


@pytest.mark.parametrize(
    ("min_tokens", "found"), [(0, (1, "ab")), (1, (1, "ab")), (2, (3, "ab")), (3, (3, "ab"))]
)
def test_what_the_first_tokens_complete_is_passed_over(min_tokens, found):
    assert first_stop(["ab"], list(b"abab"), min_tokens=min_tokens) == found


def test_what_was_passed_over_is_not_found_later_beside_a_longer_one():
    assert first_stop(["a", "xyz"], list(b"a--xyz"), min_tokens=1) == (5, "xyz")
