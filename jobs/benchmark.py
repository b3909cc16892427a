"""Times the engine beside mlx-lm on the same loaded weights, in turn, several rounds."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from omegaconf import DictConfig

from runner.data.workloads import WORKLOADS, Workload
from runner.errors import OutputError, ParameterError
from runner.llm import LLM
from runner.types import Request, SamplingParams

Runner = Callable[[LLM, Workload], None]
_RESULT_FILE = "benchmark.json"


def benchmark(config: DictConfig, *, workloads: list[str], rounds: int) -> None:
    """Runs `workloads`, by name, for `rounds` rounds of each side; writes `benchmark.json`."""
    unknown = [name for name in workloads if name not in WORKLOADS]
    if unknown:
        known = ", ".join(WORKLOADS)
        raise ParameterError(f"job.workloads={unknown[0]} is not a workload: {known} are")
    if rounds < 1:
        raise ParameterError(f"job.rounds={rounds} is not allowed: at least 1")
    result = Path(config.output.dir) / _RESULT_FILE
    if result.exists():
        raise OutputError(f"{result} is there already: choose another directory")
    llm = LLM(seed=config.sampling.seed, **_options(config))
    measured = [_compare(llm, WORKLOADS[name](llm.tokenizer), rounds) for name in workloads]
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(_machine(llm) | {"workloads": measured}, indent=2) + "\n")
    _print_table(measured)


def _options(config: DictConfig) -> dict[str, Any]:
    options = {str(key): value for key, value in (*config.model.items(), *config.engine.items())}
    return {"model": options.pop("path")} | options


def _compare(llm: LLM, workload: Workload, rounds: int) -> dict[str, Any]:
    """Seconds of both sides, a round of one after a round of the other, after a warm-up."""
    peer, run_peer = _PEERS[workload.name]
    sides: dict[str, Runner] = {"runner": run_engine, peer: run_peer}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run(llm, workload)
            if turn > 0:
                seconds[name].append(time.perf_counter() - started)
    ratios = [theirs / ours for ours, theirs in zip(*seconds.values(), strict=True)]
    return {
        "workload": workload.name,
        "rows": workload.num_rows,
        "useful_tokens": workload.num_tokens,
        "sides": {name: _speed(workload, taken) for name, taken in seconds.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def _speed(workload: Workload, seconds: list[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "seconds": seconds,
        "tokens_per_second": workload.num_tokens / median,
        "rows_per_hour": workload.num_rows / median * 3600,
    }


def run_engine(llm: LLM, workload: Workload) -> None:
    """The workload on this package's engine, with nothing cached from before."""
    llm.engine.clear_prefix_cache()
    done = 0
    for completion in llm.engine.run(_requests(workload)):
        scored = completion.prompt_logprobs
        done += len(completion.token_ids if scored is None else scored.logprobs)
    assert done == workload.num_tokens, "every token that was asked for, and no other"


def _requests(workload: Workload) -> Iterator[Request]:
    for index, (prompt, most) in enumerate(zip(workload.prompts, workload.max_tokens, strict=True)):
        params = SamplingParams(
            n=workload.n,
            temperature=workload.temperature,
            max_tokens=most,
            prompt_logprobs=0 if workload.is_scored else None,
            ignore_eos=True,
            seed=0,
        )
        name = str(index)
        yield Request(request_id=name, prompt_token_ids=prompt, params=params, key=name)


def run_mlx_lm(llm: LLM, workload: Workload) -> None:
    """The workload on mlx-lm's continuous batching; a prompt is there once for each sample."""
    size = llm.engine.max_batch_size
    sampler = make_sampler(temp=workload.temperature)
    generator = BatchGenerator(llm.model, sampler=sampler, completion_batch_size=size)
    prompts = [prompt for prompt in workload.prompts for _ in range(workload.n)]
    most = [most for most in workload.max_tokens for _ in range(workload.n)]
    generator.insert(prompts, most)
    done = 0
    while responses := generator.next_generated():
        done += len(responses)
    generator.close()
    assert done == workload.num_tokens, "every token that was asked for, and no other"


def run_forward_loop(llm: LLM, workload: Workload) -> None:
    """A bare loop of forwards and argmax: what no engine that uses this model can beat."""
    tokens = mx.array(workload.prompts)
    cache = make_prompt_cache(llm.model)
    for _ in range(workload.max_tokens[0]):
        tokens = mx.argmax(llm.model(tokens, cache=cache)[:, -1], axis=-1)[:, None]
        mx.eval(tokens)


def run_log_softmax(llm: LLM, workload: Workload, *, batch_size: int = 8) -> None:
    """The loop of `mlx_lm.perplexity`: batches of 8, all logits of a batch, their cross-entropy.

    Its rows are of one length; these are sorted by it, so that few pads are forwarded.
    """
    prompts, done = sorted(workload.prompts, key=len), 0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        padded = np.zeros((len(batch), len(batch[-1])), np.int32)
        for row, prompt in enumerate(batch):
            padded[row, : len(prompt)] = prompt
        logits = llm.model(mx.array(padded[:, :-1])).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(padded[:, 1:]), reduction="none")
        mx.eval(losses)
        done += sum(len(prompt) - 1 for prompt in batch)
    assert done == workload.num_tokens, "every token that was asked for, and no other"


_PEERS: dict[str, tuple[str, Runner]] = {
    "group": ("mlx-lm", run_mlx_lm),
    "mixed": ("mlx-lm", run_mlx_lm),
    "decode": ("forward loop", run_forward_loop),
    "score": ("mlx-lm's loop", run_log_softmax),
}


def _machine(llm: LLM) -> dict[str, Any]:
    loaded = llm.loaded
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "device": loaded.device,
        "blas": loaded.blas.name,
        "model": loaded.name,
        "dtype": loaded.dtype,
        "max_batch_size": llm.engine.max_batch_size,
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")},
    }


def _print_table(measured: list[dict[str, Any]]) -> None:
    print(f"  {'workload':<10}{'beside':<14}{'tokens/s':>10}{'theirs':>10}{'ratio':>8}  spread")
    for row in measured:
        (_, ours), (peer, theirs) = row["sides"].items()
        ratio = row["ratio"]
        print(
            f"  {row['workload']:<10}{peer:<14}{ours['tokens_per_second']:>10.0f}"
            f"{theirs['tokens_per_second']:>10.0f}{ratio['median']:>8.2f}"
            f"  {ratio['min']:.2f} to {ratio['max']:.2f}"
        )
