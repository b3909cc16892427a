"""N-gram lookup against a search that reads everything."""

from hypothesis import given
from hypothesis import strategies as st

from runner.engine.ngrams import NgramIndex, RecentTexts

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


def test_a_text_that_repeats_itself_goes_round():
    text = [9, 1, 2, 3, 1, 2]
    index = NgramIndex(2, 2)
    index.add(text)
    found = index.find(text)
    assert found is not None and found.repeated(8) == [3, 1, 2, 3, 1, 2, 3, 1]


def test_of_many_texts_the_latest_are_kept():
    recent = RecentTexts(2, 2, num_tokens=10)
    for number in range(0, 100, 5):
        recent.add(list(range(number, number + 5)))
    found = recent.find([95, 96])
    assert found is not None and found.continuation(9) == [97, 98, 99]
    assert recent.find([86, 87]) is not None, "ten tokens are kept"
    assert recent.find([5, 6]) is None, "not for ever"


def test_of_a_text_that_grows_only_what_is_new_counts_towards_what_is_kept():
    recent, text = RecentTexts(1, 1, num_tokens=10), list(range(100, 108))
    recent.add([1, 2])
    for end in range(1, 9):
        recent.add(text[:end], end - 1)
    recent.add([3, 4])
    assert recent.find([1]) is not None, "twelve tokens, of which ten are kept at least"
    recent.add([5] * 10)
    recent.add([6] * 10)
    assert recent.find([1]) is None and recent.find([100]) is None


def test_of_two_texts_with_the_same_run_the_latest_says_what_follows():
    recent = RecentTexts(2, 3, num_tokens=4)
    recent.add([1, 2, 3, 10, 11])
    recent.add([1, 2, 3, 20])
    found = recent.find([9, 1, 2, 3])
    assert found is not None and (found.size, found.continuation(2)) == (3, [20])
    # Of runs that differ in length the longer one counts, however old.
    recent.add([2, 3, 30, 31])
    longer, shorter = recent.find([1, 2, 3]), recent.find([8, 2, 3])
    assert longer is not None and longer.size == 3
    assert shorter is not None and shorter.continuation(1) == [30]


def test_a_run_at_the_very_end_of_a_text_is_followed_by_nothing():
    index = NgramIndex(2, 4)
    index.add([1, 2, 3])
    assert index.find([2, 3]) is None and index.find([3]) is None and index.find([]) is None
    found = index.find([1, 2])
    assert found is not None and found.continuation(9) == [3]
