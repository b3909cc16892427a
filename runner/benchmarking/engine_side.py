"""This package's side of a benchmark; as a module (`python -m`) in a process of its own."""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from runner.data.workloads import Workload
from runner.llm import LLM  # First: it loads the BLAS, then mlx.
from runner.types import Completion, Request, SamplingParams

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from runner.benchmarking.adapting import adapter_name


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload."""

    num_tokens: int
    """Useful tokens: sampled or scored."""
    seconds: float = 0.0
    peak_bytes: int = 0
    """mlx's memory at its highest: weights, caches, and what a forward needs."""
    cache_bytes: int = 0
    """Of the engine: row slots and prefix cache at their largest."""


Runner = Callable[[LLM, Workload], Run]


def run_engine(llm: LLM, workload: Workload) -> Run:
    """The workload on this package's engine."""
    num_tokens = cache_bytes = 0
    for completion in _completions(llm, workload):
        num_tokens += _num_tokens(completion)
        # The slots that are empty at the end are given up before it.
        cache_bytes = max(cache_bytes, llm.engine.cache_bytes)
    return Run(num_tokens, cache_bytes=cache_bytes)


def _completions(llm: LLM, workload: Workload) -> Iterator[Completion]:
    if not workload.is_one_by_one:
        yield from llm.engine.run(requests(workload))
        return
    for request in requests(workload):
        yield from llm.engine.run([request])


def _num_tokens(completion: Completion) -> int:
    scored = completion.prompt_logprobs
    return len(completion.token_ids if scored is None else scored.logprobs)


def requests(workload: Workload) -> Iterator[Request]:
    """What the engine is asked; a request is named by its place."""
    for index, (prompt, most) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True)):
        params = SamplingParams(
            n=workload.n,
            temperature=workload.temperature,
            max_tokens=most,
            prompt_logprobs=0 if workload.is_scored else None,
            ignore_eos=True,
            seed=0,
        )
        name, adapter = str(index), None
        if workload.num_adapters:
            adapter = adapter_name(index % workload.num_adapters)
        yield Request(
            request_id=name, prompt_token_ids=prompt, params=params, key=name, adapter=adapter
        )


def weights_bytes(llm: LLM) -> int:
    """Bytes of the model's parameters."""
    return sum(array.nbytes for _, array in tree_flatten(llm.model.parameters()))


def timed(llm: LLM, run: Runner, workload: Workload) -> Run:
    """Runs a workload in this process, with no prompt or text kept from before.

    The memory of a run that is not the engine's leaves out what the engine holds meanwhile.
    """
    llm.engine.clear_prefix_cache()
    if llm.engine.speculation is not None:
        llm.engine.speculation.clear()
    gc.collect()
    held = 0 if run is run_engine else mx.get_active_memory() - weights_bytes(llm)
    mx.reset_peak_memory()
    started = time.perf_counter()
    done = run(llm, workload)
    seconds = time.perf_counter() - started
    return replace(done, seconds=seconds, peak_bytes=mx.get_peak_memory() - held)


def main(options: str) -> None:
    """Loads an `LLM` with options in JSON, then answers each line with one, as `Child` asks."""
    # What a library prints must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    chosen: dict[str, Any] = json.loads(options)
    llm = LLM(**chosen)
    print(json.dumps({"blas": llm.loaded.blas.name}), file=answers, flush=True)
    for line in sys.stdin:
        run = timed(llm, run_engine, Workload(**json.loads(line)))
        print(json.dumps(asdict(run)), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
