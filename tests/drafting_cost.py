"""Times an engine with drafts and two without in lock step, a few steps of each in turn.

`python drafting_cost.py MODEL ROUNDS WORKLOAD...` prints, as a line of JSON for each workload, how
much faster than the first the second one without drafts is, which is noise, and the one with
`speculative=auto`, from a cold start each round. What slows a machine down for some seconds slows
all three alike; single rounds still differ by some 5 %, and engines may for as long as they live.
`lost` is what trials of drafts cost at most, by the gate's own account, as a share of the time.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import islice

from runner.llm import LLM  # First: it loads the BLAS, then mlx.

# isort: split
import mlx.core as mx

from runner.benchmarking.adapting import load_adapters
from runner.benchmarking.engine_side import requests, run_engine, timed
from runner.data.workloads import WORKLOADS, Workload

STEPS = 4
"""Steps of a turn: the fewer, the less a machine that slows down for a second matters. But without
drafts a step is launched while the one before it runs, which the last of a turn cannot gain from;
on a CPU next to nothing is gained by that."""


class Timed:
    """An engine's run of a workload, step by step, and the seconds it took so far."""

    def __init__(self, llm: LLM, workload: Workload) -> None:
        self.seconds = 0.0
        self.num_tokens = 0
        self._engine = llm.engine
        self._engine.clear_prefix_cache()
        if self._engine.speculation is not None:
            self._engine.speculation.clear()
        self._steps = self._run(workload)

    def take_turn(self) -> bool:
        """Does `STEPS` steps; False where there are none left."""
        started = time.perf_counter()
        num_done = sum(1 for _ in islice(self._steps, STEPS))
        # A step that goes on meanwhile would be timed as another engine's.
        mx.synchronize()
        self.seconds += time.perf_counter() - started
        return num_done == STEPS

    def _run(self, workload: Workload) -> Iterator[int]:
        waiting, engine = list(requests(workload))[::-1], self._engine
        while waiting or engine.has_unfinished:
            while waiting and engine.wants_requests:
                engine.add(waiting.pop())
            done = engine.step()
            self.num_tokens += sum(len(one.token_ids) for one in done)
            yield len(done)


def once(engines: dict[str, LLM], workload: Workload, turn: int) -> dict[str, float]:
    """The seconds of each engine; in every round and turn another one begins."""
    runs = {name: Timed(llm, workload) for name, llm in engines.items()}
    live = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
    while live:
        live = [name for name in live if runs[name].take_turn()]
        live = live[1:] + live[:1]
    assert {run.num_tokens for run in runs.values()} == {workload.num_tokens}
    return {name: run.seconds for name, run in runs.items()}


def lost(llm: LLM) -> float:
    """By the gate's account, of the time."""
    assert llm.engine.speculation is not None
    account = llm.engine.speculation._gate._account
    return max(0.0, -account.gained / account.spent)


def main(path: str, rounds: int, names: list[str]) -> None:
    """Prints the ratios of each workload: all rounds, and their median."""
    options = {"max_batch_size": 32}
    plain = LLM(path, **options)
    again = LLM(plain.loaded, **options)
    drafting = LLM(plain.loaded, speculative="auto", **options)
    engines = {"plain": plain, "again": again, "drafting": drafting}
    for name in names:
        workload = WORKLOADS[name](plain.tokenizer)
        assert not (workload.is_one_by_one or workload.is_scored), f"{name} does not batch decoding"
        for llm in engines.values():
            load_adapters(llm, workload.num_adapters)
            timed(llm, run_engine, workload)
        ratios: dict[str, list[float]] = {"again": [], "drafting": []}
        losses = []
        for turn in range(rounds):
            seconds = once(engines, workload, turn)
            for side, found in ratios.items():
                found.append(round(seconds["plain"] / seconds[side], 3))
            losses.append(lost(drafting))
        medians = {side: statistics.median(found) for side, found in ratios.items()}
        print(json.dumps({
            "workload": name, "median": medians, "rounds": ratios, "lost": round(max(losses), 4)
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
