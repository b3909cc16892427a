from tiny import request

from runner.engine.scheduler import Scheduler


def scheduler(*shapes: tuple[int, int], max_batch_size: int = 8) -> Scheduler:
    """Requests r0, r1, … of (prompt length, n)."""
    made = Scheduler(max_batch_size=max_batch_size)
    for index, (length, n) in enumerate(shapes):
        made.add(request([5] * length, f"r{index}", n=n))
    return made


def names(requests):
    return [r.request_id for r in requests]


def test_takes_what_the_free_rows_hold_in_order():
    made = scheduler((4, 2), (4, 2), (4, 2))
    assert names(made.next_prompts(5)) == ["r0", "r1"]
    assert names(made.next_prompts(5)) == ["r2"]
    assert made.next_prompts(5) == []


def test_no_free_row_takes_nothing():
    made = scheduler((4, 1))
    assert made.next_prompts(0) == []
    assert len(made) == 1


def test_a_group_larger_than_the_free_rows_starts_alone():
    made = scheduler((4, 20), (4, 1))
    assert names(made.next_prompts(1)) == ["r0"]


def test_prompts_of_very_different_length_are_prefilled_apart():
    made = scheduler((100, 1), (90, 1), (2, 1), (2, 1))
    assert names(made.next_prompts(8)) == ["r0", "r1", "r2"]
    assert names(made.next_prompts(8)) == ["r3"]
    made = scheduler((100, 1), (2, 1), (2, 1))
    assert names(made.next_prompts(8)) == ["r0", "r1"]


def test_wants_requests_until_a_batch_waits():
    made = scheduler((4, 1), (4, 1), max_batch_size=2)
    assert not made.wants_requests
    made.next_prompts(1)
    assert made.wants_requests


def test_remove_takes_out_one_that_waits():
    made = scheduler((4, 1), (4, 1))
    taken = made.remove("r0")
    assert taken is not None and taken.request_id == "r0"
    assert made.remove("r0") is None
    assert names(made.next_prompts(8)) == ["r1"]


def scored(name: str, context: list[int], num_scored: int, **options):
    prompt = [*context, *[9] * num_scored]
    asked = {"max_tokens": 0, "prompt_logprobs": 0, "logprobs_start": max(1, len(context))}
    return request(prompt, name, **(asked | options))


def taken(*requests, num_free_rows: int = 8) -> list[list[str]]:
    """Which of the requests are prefilled together, one prefill after the other."""
    made = Scheduler(max_batch_size=8, max_scored_tokens=100, max_scored_positions=30)
    for one in requests:
        made.add(one)
    prefills = []
    while prefill := made.next_prompts(num_free_rows):
        prefills.append(names(prefill))
    return prefills


def test_prompts_that_are_only_scored_need_no_row():
    assert taken(scored("a", [], 5), scored("b", [], 5), num_free_rows=0) == [["a", "b"]]
    sampled = scored("c", [], 5, max_tokens=1)
    assert taken(scored("a", [], 5), sampled, num_free_rows=0) == [["a"]]
    assert taken(scored("a", [], 5), sampled, num_free_rows=1) == [["a", "c"]]
    made = Scheduler(max_batch_size=8)
    made.add(scored("a", [], 5))
    assert not made.wants_rows
    made.add(sampled)
    assert made.wants_rows


def test_scored_prompts_are_prefilled_without_those_that_are_not():
    plain = [request([5] * 5, name) for name in ("x", "y")]
    mixed = [scored("a", [], 5), plain[0], plain[1], scored("b", [], 5)]
    assert taken(*mixed) == [["a"], ["x", "y"], ["b"]]


def test_so_many_are_scored_together_as_a_forward_or_two_hold():
    four = [scored(name, [], 12) for name in "abcd"]
    assert taken(*four) == [["a", "b"], ["c", "d"]], "three would be 33 positions"
    assert taken(*(scored(name, [5] * 40, 3) for name in "abc")) == [["a", "b"], ["c"]]
    assert taken(scored("a", [], 500), scored("b", [], 2)) == [["a"], ["b"]]


def test_a_prefill_has_continuations_of_one_context():
    one, other = [5] * 20, [6] * 20
    requests = [scored("a", one, 2), scored("b", one, 4), scored("c", other, 2)]
    assert taken(*requests) == [["a", "b"], ["c"]]
    requests = [scored("a", one, 2), *(scored(name, other, 2) for name in "bc")]
    assert taken(*requests) == [["a"], ["b", "c"]]


def test_a_prefill_has_texts_of_a_context_each_where_no_other_needs_it():
    contexts = {"a": [5] * 20, "b": [6] * 21, "c": [7] * 22, "d": []}
    assert taken(*(scored(name, contexts[name], 2) for name in "abc")) == [["a", "b", "c"]]
    assert taken(*(scored(name, contexts[name], 2) for name in "abcc")) == [["a", "b"], ["c", "c"]]
    assert taken(*(scored(name, [], 4) for name in "abcd")) == [["a", "b", "c", "d"]]
