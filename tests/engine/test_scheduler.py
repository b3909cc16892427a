from dataclasses import replace

import pytest
from tiny import make_engine, request, run, tiny_model

from runner.engine.scheduler import Scheduler
from runner.errors import ParameterError

HEADER = list(range(3, 43))


def scheduler(*shapes: tuple[int, int], max_batch_size: int = 8) -> Scheduler:
    """Requests r0, r1, … of (prompt length, n)."""
    made = Scheduler(max_batch_size=max_batch_size, max_prefill_tokens=2048, order="fcfs")
    for index, (length, n) in enumerate(shapes):
        made.add(request([5] * length, f"r{index}", n=n))
    return made


def rows(count: int):
    """So many free rows, however long they become."""
    return lambda num_columns: count


def names(requests):
    return [r.request_id for r in requests]


def test_takes_what_the_free_rows_hold_in_order():
    made = scheduler((4, 2), (4, 2), (4, 2))
    assert names(made.next_prompts(rows(5))) == ["r0", "r1"]
    assert names(made.next_prompts(rows(5))) == ["r2"]
    assert made.next_prompts(rows(5)) == []


def test_no_free_row_takes_nothing():
    made = scheduler((4, 1))
    assert made.next_prompts(rows(0)) == []
    assert len(made) == 1


def test_a_group_larger_than_the_free_rows_starts_alone():
    made = scheduler((4, 20), (4, 1))
    assert names(made.next_prompts(rows(1))) == ["r0"]


def test_prompts_of_very_different_length_are_prefilled_apart():
    made = scheduler((100, 1), (90, 1), (20, 1), (10, 1))
    assert names(made.next_prompts(rows(8))) == ["r0", "r1"]
    assert names(made.next_prompts(rows(8))) == ["r2", "r3"], "ten pads are few"


def test_wants_requests_until_four_batches_wait():
    made = scheduler(*[(4, 1)] * 8, max_batch_size=2)
    assert not made.wants_requests
    made.next_prompts(rows(1))
    assert made.wants_requests


def test_lower_priorities_go_first_and_in_order_of_arrival_among_themselves():
    made = Scheduler(max_batch_size=8, max_prefill_tokens=2048, order="fcfs")
    for index, priority in enumerate([0, 1, 0, -1, 1, -1]):
        made.add(replace(request([5] * 4, f"r{index}"), priority=priority))
    assert names(made.next_prompts(rows(3))) == ["r3", "r5", "r0"]
    made.put_back([replace(request([5] * 4, "r1"), priority=1)])
    assert names(made.next_prompts(rows(8))) == ["r2", "r1", "r4"]


def test_remove_takes_out_one_that_waits():
    made = scheduler((4, 1), (4, 1))
    taken = made.remove("r0")
    assert taken is not None and taken.request_id == "r0"
    assert made.remove("r0") is None
    assert names(made.next_prompts(rows(8))) == ["r1"]


def offline(*requests, max_batch_size: int = 8, max_prefill_tokens: int = 2048, **options):
    made = Scheduler(
        max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens, **options
    )
    for each in requests:
        made.add(each)
    return made


def admitted(made: Scheduler, free_rows: int = 1) -> list[list[str]]:
    """All batches of prompts, as they are prefilled."""
    batches = []
    while len(made):
        batches.append(names(made.next_prompts(rows(free_rows))))
    return batches


def test_an_unknown_order_is_refused():
    with pytest.raises(ParameterError, match="order='fifo'.*offline, fcfs"):
        offline(order="fifo")


def test_the_most_work_goes_first_and_equals_in_their_order():
    shapes = {"a": (4, 10), "b": (30, 4), "c": (5, 9), "d": (2, 40)}
    made = offline(*[request([5] * p, k, max_tokens=m) for k, (p, m) in shapes.items()])
    assert admitted(made) == [["d"], ["b"], ["a"], ["c"]]


def test_without_max_tokens_the_context_is_the_work():
    free, bound = request([5], "free", max_tokens=None), request([5] * 9, "bound", max_tokens=30)
    assert admitted(offline(bound, free, max_model_len=50)) == [["free"], ["bound"]]
    assert admitted(offline(bound, free, max_model_len=20)) == [["bound"], ["free"]]


def test_a_prompt_that_is_too_long_for_the_batch_leaves_its_place_to_the_next():
    shapes = [("long", 100, 90), ("short", 3, 80), ("like", 90, 1)]
    made = offline(*[request([5] * p, k, max_tokens=m) for k, p, m in shapes])
    assert admitted(made, free_rows=8) == [["long", "like"], ["short"]]


def test_prompts_prefilled_together_hold_one_prefill_step():
    made = offline(*[request([i] * 10, f"{i}") for i in range(3, 10)], max_prefill_tokens=30)
    assert [len(batch) for batch in admitted(made, free_rows=8)] == [3, 3, 1]
    assert admitted(offline(request([5] * 99, "long"), max_prefill_tokens=30)) == [["long"]]


def test_a_shared_header_goes_ahead_once_and_the_others_together():
    alike = [request([*HEADER, 50 + i, 60 + i], f"alike{i}", max_tokens=9 - i) for i in range(3)]
    other = [request([70 + i] * 41, f"other{i}", max_tokens=5) for i in range(3)]
    mixed = [request for pair in zip(other, alike, strict=True) for request in pair]
    assert admitted(offline(*mixed), free_rows=4) == [
        ["alike0"],
        ["alike1", "alike2"],
        ["other0", "other1", "other2"],
    ]
    assert admitted(offline(*mixed, shares_prefixes=False), free_rows=4) == [
        ["alike0", "alike1", "alike2", "other0"],
        ["other1", "other2"],
    ]


def test_the_prefix_of_the_last_goes_on_before_longer_ones():
    first = request([*HEADER, 50], "first", max_tokens=30)
    second = request([*HEADER, 51], "second", max_tokens=1)
    assert admitted(offline(first, request([9] * 41, "other", max_tokens=20), second)) == [
        ["first"],
        ["second"],
        ["other"],
    ]


def test_what_waits_longest_goes_next_in_the_end():
    made = offline(request([5], "short", max_tokens=1), max_batch_size=1)
    for index in range(16):
        made.add(request([5], f"long{index}", max_tokens=50))
        assert names(made.next_prompts(rows(1))) == [f"long{index}"]
    made.add(request([5], "late", max_tokens=50))
    assert names(made.next_prompts(rows(1))) == ["short"]


def test_first_come_first_served_looks_at_neither_length_nor_header():
    shapes = [("a", [5] * 4, 3), ("b", [*HEADER, 50], 9), ("c", [*HEADER, 51], 30)]
    made = offline(*[request(p, k, max_tokens=m) for k, p, m in shapes], order="fcfs")
    assert admitted(made) == [["a"], ["b"], ["c"]]


def test_rows_that_come_to_more_columns_leave_fewer_free():
    made = offline(*[request([5] * 4, f"{m}", max_tokens=m) for m in (40, 30, 3, 2)])
    free_rows = {44: 1, 34: 2, 7: 3, 6: 3}.__getitem__
    assert names(made.next_prompts(free_rows)) == ["40"]
    assert names(made.next_prompts(free_rows)) == ["30", "3"]
    assert made.next_prompts(lambda columns: 0) == []


def test_what_was_put_back_goes_before_its_equals():
    made = offline(*[request([5] * 4, name) for name in "abc"])
    taken = made.next_prompts(rows(2))
    made.put_back(taken)
    assert admitted(made) == [["a"], ["b"], ["c"]]


def long_tailed(count: int) -> list:
    """A row in eight runs long, and the last of all is the longest."""
    most = [8 if i % 8 else 60 for i in range(count - 1)]
    return [
        request([3 + i, 9, 10], f"r{i}", max_tokens=m, ignore_eos=True)
        for i, m in enumerate([*most, 90])
    ]


def test_longest_first_needs_fewer_steps_on_a_long_tail():
    stats = {}
    for order in ("offline", "fcfs"):
        engine = make_engine(tiny_model(), max_batch_size=8, order=order)
        run(engine, long_tailed(33))
        stats[order] = engine.stats
    assert stats["offline"].num_completion_tokens == stats["fcfs"].num_completion_tokens
    assert stats["offline"].num_steps < 0.75 * stats["fcfs"].num_steps
    assert stats["offline"].num_row_steps <= stats["fcfs"].num_row_steps


def test_a_header_is_forwarded_once_whatever_order_it_comes_in():
    headers = [[*range(first, first + 40)] for first in (3, 50)]
    requests = [request([*headers[i % 2], 5 + i, 40 - i], f"r{i}", max_tokens=3) for i in range(16)]
    stats = {}
    for order in ("offline", "fcfs"):
        engine = make_engine(tiny_model(), max_batch_size=8, order=order)
        run(engine, requests)
        stats[order] = engine.stats
    assert stats["fcfs"].num_prefill_tokens > 300
    assert stats["offline"].num_prefill_tokens == 2 * 41 + 14 * 1


def scored(name: str, context: list[int], num_scored: int, **options):
    prompt = [*context, *[9] * num_scored]
    asked = {"max_tokens": 0, "prompt_logprobs": 0, "logprobs_start": max(1, len(context))}
    return request(prompt, name, **(asked | options))


def taken(*requests, free_rows: int = 8) -> list[list[str]]:
    """Which of the requests are prefilled together, one prefill after the other."""
    made = offline(*requests, max_prefill_tokens=100, max_scored_positions=30)
    prefills = []
    while prefill := made.next_prompts(rows(free_rows)):
        prefills.append(names(prefill))
    return prefills


def test_prompts_that_are_only_scored_need_no_row():
    sampled = scored("c", [], 5, max_tokens=1)
    assert taken(scored("a", [], 5), scored("b", [], 5), free_rows=0) == [["a", "b"]]
    assert taken(scored("a", [], 5), sampled, free_rows=0) == [["a"]]
    assert taken(scored("a", [], 5), sampled, free_rows=1) == [["c"], ["a"]]
    assert taken(scored("a", [], 5), sampled, free_rows=2) == [["c", "a"]]
    made = offline(scored("a", [], 5))
    assert not made.wants_rows()
    made.add(sampled)
    assert made.wants_rows()


def test_scored_prompts_are_prefilled_without_those_that_are_not():
    plain = [request([5] * 5, name) for name in ("x", "y")]
    mixed = [scored("a", [], 5), plain[0], plain[1], scored("b", [], 5)]
    assert taken(*mixed) == [["x", "y"], ["a", "b"]]


def test_so_many_are_scored_together_as_a_forward_or_two_hold():
    four = [scored(name, [], 12) for name in "abcd"]
    assert taken(*four) == [["a", "b"], ["c", "d"]], "three would be 33 positions"
    assert taken(*(scored(name, [5] * 40, 3) for name in "abc")) == [["a", "b"], ["c"]]
    assert taken(scored("a", [], 500), scored("b", [], 2)) == [["a"], ["b"]]


def test_a_prefill_has_continuations_of_one_context():
    one, other = [5] * 20, [6] * 20
    requests = [scored("a", one, 2), scored("b", one, 4), scored("c", other, 2)]
    assert taken(*requests) == [["b", "a"], ["c"]]
    requests = [scored("a", one, 2), *(scored(name, other, 2) for name in "bc")]
    assert taken(*requests) == [["a"], ["b", "c"]]


def test_a_prefill_has_texts_of_a_context_each_where_no_other_needs_it():
    a, b, c, d = (scored(n, [5 + i] * (20 + i), 2) for i, n in enumerate("abcd"))
    assert taken(a, b, c) == [["c", "b", "a"]]
    assert taken(a, b, d, scored("e", [8] * 23, 2)) == [["d", "e"], ["b", "a"]]
    assert taken(*(scored(name, [], 4) for name in "abcd")) == [["a", "b", "c", "d"]]
