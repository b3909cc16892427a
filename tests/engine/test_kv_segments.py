import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.engine.kv_segments import Quantization, Segment

segments = st.one_of(
    st.builds(Segment, first=st.just(0), last=st.integers(1, 9)),
    st.builds(
        Segment,
        first=st.integers(0, 5),
        kept=st.integers(0, 4),
        window=st.none() | st.integers(1, 7),
    ),
)


def written(segment: Segment, num_positions: int) -> dict[int, int]:
    """Column -> the position last written there, one position at a time."""
    found = {}
    for position in range(num_positions):
        if position >= segment.first:
            found[int(segment.columns(mx.array(position)))] = position
    return found


@given(segment=segments, num_positions=st.integers(1, 40))
def test_a_column_holds_the_last_position_written_to_it(segment, num_positions):
    size = segment.num_columns(num_positions)
    found = {c: p for c, p in written(segment, num_positions).items() if c < size}
    held = segment.held(mx.array([num_positions - 1]), size).tolist()
    assert dict(enumerate(held)) == found


@given(segment=segments, mine=st.integers(1, 40), longest=st.integers(1, 40))
def test_a_column_that_a_row_has_not_reached_counts_as_to_come(segment, mine, longest):
    found, size = written(segment, mine), segment.num_columns(max(mine, longest))
    for column, position in enumerate(segment.held(mx.array([mine - 1]), size).tolist()):
        assert position == found.get(column, position)
        assert (position >= mine) == (column not in found)


@given(segment=segments, num_positions=st.integers(0, 40))
def test_a_prompts_columns_are_arranged_as_if_written_one_by_one(segment, num_positions):
    end = num_positions if segment.last is None else min(num_positions, segment.last)
    positions = mx.arange(segment.first, max(end, segment.first)).reshape(1, -1, 1)
    arranged = segment.arranged(positions)
    found = written(segment, end)
    assert arranged.reshape(-1).tolist() == [found[column] for column in range(len(found))]


@given(window=st.integers(1, 7), kept=st.integers(0, 4), num_positions=st.integers(1, 40))
def test_a_ring_holds_the_kept_and_the_latest(window, kept, num_positions):
    segment = Segment(kept=kept, window=window)
    size = segment.num_columns(num_positions)
    held = set(segment.held(mx.array([num_positions - 1]), size).tolist())
    latest = range(max(num_positions - window, 0), num_positions)
    assert held == {*range(min(kept, num_positions)), *latest} and size <= kept + window


def test_rows_that_have_left_a_segment_write_to_its_spare_column():
    segment = Segment(0, 3)
    assert segment.columns(mx.array([0, 2, 3, 99])).tolist() == [0, 2, 3, 3]
    (stored,) = segment.zeros((2, 8), mx.float32, num_rows=1, num_positions=50)
    assert stored.shape == (1, 2, 4, 8) and segment.num_columns(50) == 3


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_size_stores_what_mlx_quantises(bits, group_size):
    segment = Segment(quantization=Quantization(bits, group_size))
    array = mx.array(np.random.default_rng(0).normal(size=(2, 3, 5, 128)).astype(np.float32))
    stored = segment.encode(array)
    empty = segment.zeros((3, 128), mx.float32, num_rows=2, num_positions=5)
    assert [a.shape for a in stored] == [a.shape for a in empty]
    assert [a.dtype for a in stored] == [a.dtype for a in empty]
    decoded = segment.decode(stored)
    steps = (
        array.reshape(-1, group_size).max(axis=1) - array.reshape(-1, group_size).min(axis=1)
    ) / (2**bits - 1)
    error = mx.abs(decoded - array).reshape(-1, group_size).max(axis=1)
    assert mx.all(error <= 1.01 * steps).item() and mx.any(error > 0).item()
    bits_an_entry = bits + 2 * 32 / group_size
    assert sum(a.nbytes for a in stored) * 8 == array.size * bits_an_entry


def test_a_group_of_one_value_and_a_zero_come_back():
    segment = Segment(quantization=Quantization(4, 32))
    for value in (0.0, 1.75):
        decoded = segment.decode(segment.encode(mx.full((1, 1, 1, 32), value)))
        assert decoded.flatten().tolist() == [value] * 32
