"""The loop of `grpo` without a model: which prompts a step has, and what is learned from them."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from runner.jobs.grpo import ADAPTER, Schedule, _Group, _Loop, _metrics
from runner.rows import NamedRow
from runner.training.grpo import Experience, UpdateStats
from runner.types import Completion, RequestOutput, SamplingParams


class Rewards:
    """Rewards every text by the number that it is."""

    def submit(self, texts: list[str], row: Any) -> Any:
        return SimpleNamespace(result=lambda: [float(text) for text in texts])


class Context:
    """Stands for a run: answers each request by `answer`, and notes what is asked and written."""

    def __init__(self, *, seed: int | None = 0, done: tuple[str, ...] = ()) -> None:
        self.params = SamplingParams(n=2, seed=seed, max_tokens=3)
        self.asked: list[Any] = []
        self.written: list[tuple[str, dict[int, dict[str, Any]]]] = []
        self.is_interrupted = False
        self.directory = None
        self.writer = SimpleNamespace(done_rows=set(done))
        self.scored: list[Any] = []
        self.llm = SimpleNamespace(score=self._score)

    def run(self, requests: list[Any]) -> list[RequestOutput]:
        self.asked += requests
        # The last comes first: rows finish in any order.
        return [self.answer(it.request_id) for it in reversed(requests)]

    def answer(self, name: str) -> RequestOutput:
        return output(name, 1.0, 0.0)

    def count(self, output: RequestOutput) -> None:
        pass

    def write(self, row: Any, output: RequestOutput, columns: dict[int, Any]) -> None:
        self.written.append((output.request_id, columns))

    def _score(self, inputs: Any, *, use_tqdm: bool) -> list[Any]:
        self.scored = inputs
        return [SimpleNamespace(logprobs=[None, *[-2.0] * (len(ids) - 1)]) for _, ids in inputs]


def sample(index: int, reward: float, *, reason: Any = "stop") -> Completion:
    done = Completion(
        request_id="r", index=index, token_ids=[7, 8 + index], raw_logprobs=[-9.0, -9.0],
        processed_logprobs=[-1.0, -1.5], finish_reason=reason,
    )  # fmt: skip
    done.text = str(reward)
    return done


def output(name: str, *rewards: float) -> RequestOutput:
    samples = [sample(i, it) for i, it in enumerate(rewards)]
    return RequestOutput(request_id=name, prompt="p", prompt_token_ids=[5, 6], outputs=samples)


class Trainer:
    def __init__(self, kl: float = 0.0) -> None:
        self.objective = SimpleNamespace(kl_coefficient=kl)
        self.updates: list[list[Experience]] = []

    def update(self, experiences: list[Experience]) -> UpdateStats:
        self.updates.append(list(experiences))
        return UpdateStats(
            loss=0.0, num_tokens=1, ratio_deviation=0.1 * len(self.updates), clipped_share=0.0,
            kl=0.0,
        )  # fmt: skip


def loop(
    context: Context, *, rows: int = 5, size: int = 2, updates: int = 1, trainer: Any = None
) -> _Loop:
    named = [
        NamedRow(row={"i": i}, row_id=f"row-{i}", key=f"key-{i}", prompt=f"prompt {i}")
        for i in range(rows)
    ]
    schedule = Schedule(steps=9, prompts_per_step=size, updates_per_step=updates)
    made: Any = (context, named, Rewards(), trainer or Trainer(), schedule)
    return _Loop(*made, normalize=True)


def chosen(one: _Loop, steps: range) -> list[list[str]]:
    return [[row.row_id for row in one._chosen(step)] for step in steps]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_prompt_comes_once_before_any_comes_again(size):
    names = sum(chosen(loop(Context(), size=size), range(30)), [])
    for start in range(0, len(names) - 4, 5):
        assert len(set(names[start : start + 5])) == 5
    rounds = {tuple(names[start : start + 5]) for start in range(0, 30, 5)}
    assert len(rounds) > 1, "each round has an order of its own"


def test_the_seed_and_the_step_decide_what_is_chosen():
    """So that a training that goes on has the prompts that it would have had."""
    one = chosen(loop(Context(seed=3)), range(6))
    assert one[4:] == chosen(loop(Context(seed=3)), range(4, 6))
    assert one != chosen(loop(Context(seed=4)), range(6))
    assert chosen(loop(Context(seed=None)), range(3)) == chosen(loop(Context(seed=0)), range(3))


def test_a_prompt_that_comes_again_draws_anew_and_has_a_name_of_its_own():
    context = Context()
    one = loop(context, rows=2, size=2)
    for step in range(4):
        one._sampled(step)
    assert len({it.request_id for it in context.asked}) == 8
    assert len({it.key for it in context.asked}) == 8
    assert {it.adapter for it in context.asked} == {ADAPTER}
    first, again = [it for it in context.asked if it.request_id.endswith("-row-0")][:2]
    assert first.prompt == again.prompt == "prompt 0"
    assert {first.key.partition("/")[2], again.key.partition("/")[2]} == {"key-0"}


def test_a_round_that_ends_within_a_step_may_bring_a_prompt_twice():
    context = Context()
    one = loop(context, rows=3, size=2)
    groups = [one._sampled(step) for step in range(6)]
    assert all(group is not None and len(group) == 2 for group in groups)


def test_groups_come_in_the_order_of_the_prompts_however_they_finish():
    context = Context()
    groups = loop(context, size=4)._sampled(0)
    assert groups is not None
    names = [it.output.request_id for it in groups]
    assert names == [it.request_id for it in context.asked]
    assert [name for name, _ in context.written] == names
    assert {columns[0]["step"] for _, columns in context.written} == {0}


def test_rows_that_are_there_already_are_not_written_again():
    probe = Context()
    loop(probe)._sampled(1)
    done = probe.asked[0].request_id
    context = Context(done=(done,))
    groups = loop(context)._sampled(1)
    assert groups is not None and len(groups) == 2, "they are learned from all the same"
    assert [name for name, _ in context.written] == [probe.asked[1].request_id]


def test_an_interrupt_leaves_the_step_undone():
    context = Context()
    context.is_interrupted = True
    assert loop(context)._sampled(0) is None and context.written == []


def group(*rewards: float, **more: Any) -> _Group:
    columns = {
        index: {"reward": it, "advantage": it - sum(rewards) / len(rewards)}
        for index, it in enumerate(rewards)
    }
    return _Group(output("r", *rewards), columns | more.get("columns", {}))


def test_an_experience_is_of_the_distribution_that_was_sampled_from():
    first, last = group(1.0, 0.0).experiences()
    assert first == Experience(
        prompt_token_ids=[5, 6], completion_token_ids=[7, 8], behaviour_logprobs=[-1.0, -1.5],
        advantage=0.5,
    )  # fmt: skip
    assert last.advantage == -0.5 and last.completion_token_ids == [7, 9]


def test_what_earned_the_same_or_nothing_is_not_learned_from():
    assert list(group(0.5, 0.5).experiences()) == []
    failed = {1: {"error": {"type": "RewardError", "message": "no"}}}
    mixed = group(1.0, 0.0, columns=failed)
    assert [it.advantage for it in mixed.experiences()] == [0.5]
    assert mixed.rewards == [1.0]


@pytest.mark.parametrize("updates", [1, 3])
def test_a_step_updates_as_often_as_said_and_not_on_nothing(updates):
    trainer = Trainer()
    one = loop(Context(), updates=updates, trainer=trainer)
    assert one._learn([group(0.5, 0.5)]) == [] and trainer.updates == []
    stats = one._learn([group(1.0, 0.0), group(0.5, 0.5), group(0.0, 1.0)])
    assert len(stats) == updates
    assert [len(it) for it in trainer.updates] == [4] * updates


def test_the_reference_is_asked_for_where_it_counts():
    context, trainer = Context(), Trainer(kl=0.1)
    loop(context, trainer=trainer)._learn([group(1.0, 0.0)])
    assert context.scored == [([5, 6], [7, 8]), ([5, 6], [7, 9])]
    assert [it.reference_logprobs for it in trainer.updates[0]] == [[0.0, -2.0]] * 2
    context, trainer = Context(), Trainer()
    loop(context, trainer=trainer)._learn([group(1.0, 0.0)])
    assert context.scored == [] and trainer.updates[0][0].reference_logprobs is None


def test_metrics_are_those_of_all_completions_and_of_the_first_update():
    trainer = Trainer()
    stats = [trainer.update([]), trainer.update([])]
    found = _metrics([group(1.0, 0.0), group(1.0, 1.0)], stats)
    assert found["reward_mean"] == 0.75 and found["completion_tokens_mean"] == 2.0
    assert found["reward_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
    assert found["first_ratio_deviation"] == pytest.approx(0.1)
    assert [it["ratio_deviation"] for it in found["updates"]] == pytest.approx([0.1, 0.2])


def test_of_nothing_there_are_no_metrics():
    found = _metrics([_Group(output("r"), {})], [])
    assert found == {
        "reward_mean": None, "reward_stderr": None, "completion_tokens_mean": None,
        "first_ratio_deviation": None, "updates": [],
    }  # fmt: skip
