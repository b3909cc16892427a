"""What is under way, without a model: who uses which adapter, who is taken out, what is left."""

from collections.abc import Callable
from typing import Any, cast

import pytest
from tiny import request

from runner.adapter_weights import AdapterWeights
from runner.engine.batch import Batch
from runner.engine.flight import Flight
from runner.engine.lora import Adapter
from runner.engine.model_runner import Prefill, ReadyPrompt
from runner.engine.sequence import Sequence
from runner.types import Completion, Request


def adapter(name: str) -> Adapter:
    return Adapter(name, 1, AdapterWeights(targets={}, digest=name, source=name), {})


OLD, NEW, OTHER = adapter("old"), adapter("new"), adapter("other")


def row(name: str, index: int = 0, *, adapter: Adapter | None = None) -> Sequence:
    asked = request([5, 6], name, n=2)
    return Sequence(asked, index, max_tokens=4, stop_token_ids=frozenset(), adapter=adapter)


def ready(name: str, *indices: int, adapter: Adapter | None = None) -> ReadyPrompt:
    asked = request([5, 6], name, n=3)
    return ReadyPrompt(asked, [], 0, adapter=adapter, versions=[1], indices=list(indices or (0, 1)))


class InPrefill:
    """Stands for prompts that are half forwarded."""

    def __init__(self, adapter: Adapter | None, *names: str) -> None:
        self.adapter = adapter
        self.requests = [request([5, 6], name) for name in names]


def flight(*rows: Sequence, **parts: Any) -> Flight:
    batch = Batch(vocab_size=97, num_spare=3)
    for one in rows:
        batch.place(one)
    return Flight(batch, **parts)


def sampled(prompt: ReadyPrompt, index: int) -> Sequence:
    return prompt.sequence(
        cast(Callable[..., Sequence], lambda asked, index, **_: row(asked.request_id, index)), index
    )


ENDED = Completion(
    request_id="e", index=0, token_ids=[], raw_logprobs=[], processed_logprobs=[],
    finish_reason="abort",
)  # fmt: skip


@pytest.mark.parametrize("part", ["rows", "prefill", "ready", "scored", "ended"])
def test_it_is_empty_where_nothing_is_left_of_any_kind(part):
    assert flight().is_empty
    parts: dict[str, Any] = {
        "prefill": InPrefill(None, "p"), "ready": [ready("r")], "scored": [ready("s")],
        "ended": [ENDED],
    }  # fmt: skip
    found = flight(row("a")) if part == "rows" else flight(**{part: parts[part]})
    assert not found.is_empty


def test_what_has_ended_outlives_what_is_thrown_away():
    found = flight(row("a"), ready=[ready("r")], prefill=InPrefill(None, "p"), ended=[ENDED])
    emptied = found.emptied()
    assert emptied.ended == [ENDED] and not emptied.is_empty
    assert not (emptied.batch.sequences or emptied.ready or emptied.prefilling)
    assert (emptied.batch.vocab_size, emptied.batch.num_spare) == (97, 3)


def test_adapters_are_those_of_rows_and_of_samples_that_may_start():
    found = flight(row("a", adapter=OLD), row("b"), ready=[ready("r", adapter=OTHER)])
    assert found.adapters == {OLD, OTHER}
    assert flight(row("b")).adapters == set()


def now(of: Adapter | None) -> tuple[Adapter | None, int]:
    return (NEW if of is OLD else of), 7


def is_old(of: Adapter | None) -> bool:
    return of is OLD


def test_rows_and_prompts_of_a_changed_adapter_go_on_under_the_new_one():
    rows = [row("a", adapter=OLD), row("b", adapter=OTHER), row("c")]
    prompts = [ready("r", adapter=OLD), ready("s", adapter=OTHER)]
    rows[0].num_launched = 2
    assert flight(*rows, ready=prompts).go_on(is_old, now) == []
    assert [it.adapter for it in (*rows, *prompts)] == [NEW, OTHER, None, NEW, OTHER]
    assert [it.versions for it in rows] == [[(0, 0), (7, 2)], [(0, 0)], [(0, 0)]]
    assert [it.versions for it in prompts] == [[1, 7], [1]]


@pytest.mark.parametrize(("of", "dropped"), [(OLD, ["p", "q"]), (OTHER, []), (None, [])])
def test_a_prefill_under_what_has_changed_starts_over(of, dropped):
    found = flight(prefill=cast(Prefill, InPrefill(of, "p", "q")))
    again = found.go_on(is_old, now)
    assert [it.request_id for it in again] == dropped
    assert [it.request_id for it in found.prefilling] == ([] if dropped else ["p", "q"])


def names(requests: list[Request]) -> list[str]:
    return [it.request_id for it in requests]


def test_what_is_taken_out_leaves_the_others_where_they_are():
    rows = [row("a"), row("b"), row("a", 1), row("c")]
    queue = [ready("r"), ready("a", 2), ready("b", 1, 2)]
    found = flight(*rows, ready=queue, scored=[ready("b", 0), ready("d")])
    ended = found.end({"a", "b"}, sampled)
    samples = [(it.request.request_id, it.index) for it in ended]
    assert samples == [("a", 0), ("b", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 0)]
    assert found.batch.sequences == [rows[3]] and rows[3].row == 3
    assert names([it.request for it in found.ready]) == ["r"]
    assert names([it.request for it in found.scored]) == ["d"]


def test_what_is_taken_out_by_a_name_that_is_not_there_is_nothing():
    found = flight(row("a"), ready=[ready("r")])
    assert found.end({"x"}, sampled) == [] and len(found.batch.sequences) == len(found.ready) == 1


def test_what_is_prefilled_has_the_samples_that_have_not_started():
    found = flight(row("r"), ready=[ready("r", 1)], scored=[ready("s", 0)])
    assert [(it.request_id, indices) for it, indices in found.prefilled] == [("r", [1]), ("s", [0])]
