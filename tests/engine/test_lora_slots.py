"""Slots of stacked adapters: which adapter has which, and what a slot holds after another."""

import gc
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from runner.adapter_weights import AdapterWeights
from runner.engine.lora import Adapter, LowRank
from runner.engine.lora_products import GROUP, ManyAdapters, OneAdapter, RowSlots, Stack
from runner.engine.lora_slots import AdapterSlots

RANDOM = np.random.default_rng(5)


def drawn(*shape: int) -> mx.array:
    return mx.array(RANDOM.standard_normal(shape).astype(np.float32))


def low_rank(rank: int = 4, *, dora: bool = False) -> LowRank:
    gains = (drawn(5), drawn(5)) if dora else (None, None)
    return LowRank(drawn(6, rank), drawn(rank, 5), *gains)


def adapter(name: str, **targets: LowRank) -> Adapter:
    weights = AdapterWeights(targets={}, digest=name, source=name)
    return Adapter(name, 1, weights, targets or {"q": low_rank()})


def held(slots: AdapterSlots, path: str, slot: int, low: LowRank) -> bool:
    """Whether a slot has the factors of one adapter, and zeros beyond its rank."""
    stack, rank = slots.stacks[path], low.a.shape[-1]
    a, b = stack.a[slot], stack.b[slot]
    same = mx.array_equal(a[:, :rank], low.a) and mx.array_equal(b[:rank], low.b)
    return bool(same) and not mx.any(a[:, rank:]) and not mx.any(b[rank:])


def test_a_row_without_adapter_has_slot_0_and_that_is_zeros():
    slots, one = AdapterSlots(max_adapters=2), adapter("one")
    assert slots.take([None, one, None, one]) == [0, 1, 0, 1]
    assert not mx.any(slots.stacks["q"].a[0]) and not mx.any(slots.stacks["q"].b[0])
    assert held(slots, "q", 1, one.targets["q"])


def test_an_adapter_keeps_its_slot_and_is_written_once(monkeypatch):
    slots, written = AdapterSlots(max_adapters=4), []
    write = AdapterSlots._write
    monkeypatch.setattr(
        AdapterSlots, "_write", lambda *given: (written.append(given[2].name), write(*given))
    )
    some = [adapter(str(i)) for i in range(4)]
    first = slots.take(some)
    assert sorted(first) == [1, 2, 3, 4]
    assert slots.take(some[::-1]) == first[::-1]
    assert written == ["0", "1", "2", "3"]


def test_the_one_that_was_used_least_recently_gives_up_its_slot():
    slots = AdapterSlots(max_adapters=3)
    a, b, c, d = (adapter(name) for name in "abcd")
    (of_a,), (of_b,), (of_c,) = (slots.take([it]) for it in (a, b, c))
    slots.take([b, a])
    assert slots.take([d]) == [of_c]
    for it, slot in ((a, of_a), (b, of_b), (d, of_c)):
        assert held(slots, "q", slot, it.targets["q"])
    assert slots.take([c])[0] in (of_a, of_b), "d is the latest"


def test_one_that_is_needed_now_is_not_given_up_for_another():
    slots = AdapterSlots(max_adapters=2)
    some = [adapter(str(i)) for i in range(3)]
    slots.take(some[:2])
    places = slots.take([some[2], some[0]])
    assert len(set(places)) == 2
    for it, place in zip([some[2], some[0]], places, strict=True):
        assert held(slots, "q", place, it.targets["q"])


def test_a_forward_that_needs_more_than_the_limit_has_them():
    slots = AdapterSlots(max_adapters=2)
    some = [adapter(str(i)) for i in range(6)]
    places = slots.take(some)
    assert sorted(places) == [1, 2, 3, 4, 5, 6]
    assert all(held(slots, "q", p, it.targets["q"]) for p, it in zip(places, some, strict=True))


def test_slots_are_made_as_they_are_needed():
    """Four to begin with, then twice as many, and never more than the limit and the empty one."""
    slots, seen = AdapterSlots(max_adapters=9), []
    some = [adapter(str(i)) for i in range(20)]
    for it in some:
        slots.take([it])
        seen.append(slots.stacks["q"].a.shape[0])
    assert seen == [4] * 3 + [8] * 4 + [10] * 13
    assert slots.nbytes == 10 * 8 * (6 + 5) * 4


def test_a_slot_holds_nothing_of_the_adapter_that_had_it():
    """Of another rank, on another module, and with the gains that DoRA has."""
    slots = AdapterSlots(max_adapters=1)
    slots.take([adapter("wide", q=low_rank(11, dora=True), v=low_rank(3))])
    narrow = adapter("narrow", q=low_rank(2))
    (slot,) = slots.take([narrow])
    assert held(slots, "q", slot, narrow.targets["q"])
    assert mx.array_equal(slots.stacks["q"].gain[slot], mx.ones(5))
    assert not mx.any(slots.stacks["q"].offset[slot])
    assert not mx.any(slots.stacks["v"].a[slot]) and not mx.any(slots.stacks["v"].b[slot])


def test_ranks_are_padded_to_whole_tiles():
    for rank, padded in ((1, 8), (8, 8), (9, 16), (64, 64)):
        slots = AdapterSlots(max_adapters=1)
        slots.take([adapter("a", q=low_rank(rank))])
        assert slots.stacks["q"].a.shape[1:] == (6, padded)
        assert slots.stacks["q"].b.shape[1:] == (padded, 5)


def test_what_was_forgotten_is_written_again():
    slots, one, other = AdapterSlots(max_adapters=2), adapter("one"), adapter("other")
    slots.take([one, other])
    one.targets = {"q": low_rank()}
    slots.forget([one, adapter("never met")])
    places = slots.take([one, other])
    for it, place in zip([one, other], places, strict=True):
        assert held(slots, "q", place, it.targets["q"])


def test_the_slot_of_an_adapter_that_no_row_holds_is_free():
    slots = AdapterSlots(max_adapters=3)
    kept = adapter("kept")
    slots.take([adapter("gone"), kept])
    gc.collect()
    before = slots.stacks["q"].a.shape[0]
    places = slots.take([adapter("new"), kept])
    assert len(set(places)) == 2 and slots.stacks["q"].a.shape[0] == before


def alone(low: LowRank | None, x: mx.array, y: mx.array) -> mx.array:
    return y if low is None else OneAdapter(low).linear(x, y)


def mixed(lows: Sequence[LowRank | None], slots: Sequence[int]) -> ManyAdapters:
    """The rows of these slots, of a stack that holds these factors."""
    given = [low or LowRank(mx.zeros((6, 4)), mx.zeros((4, 5))) for low in lows]
    ones, zeros = mx.ones(5), mx.zeros(5)
    stack = Stack(
        mx.stack([it.a for it in given]),
        mx.stack([it.b for it in given]),
        mx.stack([ones if it.gain is None else it.gain for it in given]),
        mx.stack([zeros if it.offset is None else it.offset for it in given]),
    )
    return ManyAdapters(stack, RowSlots(slots))


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("num_rows", [1, GROUP, GROUP + 1, 3 * GROUP])
def test_each_row_gets_its_own_product(num_rows, num_tokens):
    """Groups that are full, part full, and of one row; in decode and in prefill."""
    lows = [None, low_rank(), low_rank(dora=True)]
    for slots in ([2] * num_rows, [(5 * i + i // 3) % 3 for i in range(num_rows)]):
        x, y = drawn(num_rows, num_tokens, 6), drawn(num_rows, num_tokens, 5)
        found = mixed(lows, slots).linear(x, y)
        for row, slot in enumerate(slots):
            expected = alone(lows[slot], x[row], y[row])
            np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_the_rows_of_a_group_are_of_one_slot_and_none_is_lost():
    slots = [2, 0, 2, 1, 2, 0, 2, 2, 1]
    rows = RowSlots(slots)
    entries, places = np.array(rows.entries), np.array(rows.places)
    assert entries.shape == (4, GROUP)
    assert entries.reshape(-1)[places].tolist() == list(range(len(slots)))
    for group, slot in zip(entries.tolist(), rows.group_slots.tolist(), strict=True):
        assert {slots[row] for row in group} == {slot}


def test_a_product_is_in_the_type_of_the_output():
    x, y = drawn(2, 1, 6).astype(mx.bfloat16), drawn(2, 1, 5).astype(mx.bfloat16)
    low = low_rank(dora=True)
    assert OneAdapter(low).linear(x, y).dtype == mx.bfloat16
    assert mixed([None, low], [1, 0]).linear(x, y).dtype == mx.bfloat16
