"""N-gram lookup against a search that reads everything."""

from hypothesis import given
from hypothesis import strategies as st

from runner.engine.ngrams import Match, NgramIndex, RecentTexts, add_to, find_in

texts = st.lists(st.integers(0, 3), max_size=30)


def searched(text: list[int], tail: list[int], least: int, most: int) -> tuple[int, int] | None:
    """The size and place that a search from the end finds."""
    for size in range(min(most, len(tail)), least - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):
            if text[end - size : end] == tail[len(tail) - size :]:
                return size, end
    return None


@given(text=texts, tail=texts, least=st.integers(1, 3), more=st.integers(0, 3))
def test_the_longest_run_is_found_where_it_came_last(text, tail, least, more):
    index = NgramIndex(least, least + more)
    index.add(text)
    found = index.find(tail)
    expected = searched(text, tail, least, least + more)
    assert (None if found is None else (found.size, found.end)) == expected
    if found is not None:
        assert found.continuation(5) == text[found.end : found.end + 5]


@given(text=texts, cuts=st.lists(st.integers(0, 30), max_size=4), tail=texts)
def test_a_text_that_grows_is_known_as_if_it_came_whole(text, cuts, tail):
    whole, grown = NgramIndex(1, 3), NgramIndex(1, 3)
    whole.add(text)
    part: list[int] = []
    for cut in [*sorted(cuts), len(text)]:
        start = len(part)
        part += text[start:cut]
        grown.add(part, start)
    one, other = whole.find(tail), grown.find(tail)
    assert (one and (one.size, one.end)) == (other and (other.size, other.end))


@given(one=texts, other=texts, shared=texts, tail=texts)
def test_of_several_indices_the_longest_run_counts_and_then_the_first(one, other, shared, tail):
    indices = [NgramIndex(1, 3), NgramIndex(1, 3)]
    for index, text in zip(indices, (one, other), strict=True):
        index.add(text)
    add_to(indices, shared)
    found = find_in(indices, tail)
    each = [match for index in indices if (match := index.find(tail)) is not None]
    expected = max(each, key=lambda match: match.size, default=None)  # The first of equals.
    assert found == expected


def test_a_text_that_repeats_itself_goes_round():
    text = [9, 1, 2, 3, 1, 2]
    index = NgramIndex(2, 2)
    index.add(text)
    found = index.find(text)
    assert found is not None and found.repeated(8) == [3, 1, 2, 3, 1, 2, 3, 1]


def _add(recent: RecentTexts, text: list[int], start: int = 0) -> None:
    recent.taking(len(text) - start).add(text, start)


def _find(recent: RecentTexts, tail: list[int]) -> Match | None:
    return find_in(recent.indices, tail)


def test_of_many_texts_the_latest_are_kept():
    recent = RecentTexts(2, 2, num_tokens=10)
    for number in range(0, 100, 5):
        _add(recent, list(range(number, number + 5)))
    found = _find(recent, [95, 96])
    assert found is not None and found.continuation(9) == [97, 98, 99]
    assert _find(recent, [86, 87]) is not None, "ten tokens are kept"
    assert _find(recent, [5, 6]) is None, "not for ever"


def test_of_a_text_that_grows_only_what_is_new_counts_towards_what_is_kept():
    recent, text = RecentTexts(1, 1, num_tokens=10), list(range(100, 108))
    _add(recent, [1, 2])
    for end in range(1, 9):
        _add(recent, text[:end], end - 1)
    _add(recent, [3, 4])
    assert _find(recent, [1]) is not None, "twelve tokens, of which ten are kept at least"
    _add(recent, [5] * 10)
    _add(recent, [6] * 10)
    assert _find(recent, [1]) is None and _find(recent, [100]) is None


def test_of_two_texts_with_the_same_run_the_latest_says_what_follows():
    recent = RecentTexts(2, 3, num_tokens=4)
    _add(recent, [1, 2, 3, 10, 11])
    _add(recent, [1, 2, 3, 20])
    found = _find(recent, [9, 1, 2, 3])
    assert found is not None and (found.size, found.continuation(2)) == (3, [20])
    # Of runs that differ in length the longer one counts, however old.
    _add(recent, [2, 3, 30, 31])
    longer, shorter = _find(recent, [1, 2, 3]), _find(recent, [8, 2, 3])
    assert longer is not None and longer.size == 3
    assert shorter is not None and shorter.continuation(1) == [30]


def test_a_run_at_the_very_end_of_a_text_is_followed_by_nothing():
    index = NgramIndex(2, 4)
    index.add([1, 2, 3])
    assert index.find([2, 3]) is None and index.find([3]) is None and index.find([]) is None
    found = index.find([1, 2])
    assert found is not None and found.continuation(9) == [3]
