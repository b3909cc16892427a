"""What the engine is timed beside, in this process or in one of its own."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from runner.benchmarking import mlx_lm_side
from runner.benchmarking.adapting import load_adapters
from runner.benchmarking.child import Child
from runner.benchmarking.drafting import with_earlier, without_drafts
from runner.benchmarking.engine_side import Run, Runner, run_engine, timed
from runner.benchmarking.processes import batch_invariant_engine, stock_mlx_lm
from runner.data.workloads import Workload
from runner.engine.cpu_kernels import CPUKernels
from runner.engine.cpu_math import on_cpu
from runner.llm import LLM

COMPARED = ("mlx_lm", "stock", "batch_invariant", "plain")
"""What `job.compare` may name."""

Kind: TypeAlias = Literal["runner", "mlx_lm", "stock", "batch_invariant", "plain", "adapters"]
"""The engine, which of `COMPARED`, or the engine with fewer adapters."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of those that take turns."""

    kind: Kind
    name: str
    """As the table and the picture say it."""
    workload: Workload
    """What it is given: all of it, or a part."""
    run: Callable[[Workload], Run]
    is_warm: bool = False
    """Whether it has warmed up by itself."""


def run_mlx_lm(llm: LLM, workload: Workload) -> Run:
    """The workload on mlx-lm's own loops, on the weights and the BLAS of this process."""
    return Run(**mlx_lm_side.run(llm.model, _work(workload, llm.engine.max_batch_size)))


def _work(workload: Workload, batch_size: int) -> dict[str, Any]:
    """What mlx-lm is told: a prompt is there once for each sample."""
    if workload.is_scored:
        return {"prompts": workload.prompts}
    return {
        "prompts": [prompt for prompt in workload.prompts for _ in range(workload.n)],
        "max_tokens": [most for most in workload.max_tokens for _ in range(workload.n)],
        "temperature": workload.temperature,
        "batch_size": batch_size,
    }


def run_forward_loop(llm: LLM, workload: Workload) -> Run:
    """A bare loop of forwards and argmax with mlx-lm's own functions and cache."""
    tokens = mx.array(workload.prompts)
    cache = make_prompt_cache(llm.model)
    for _ in range(workload.max_tokens[0]):
        tokens = mx.argmax(llm.model(tokens, cache=cache)[:, -1], axis=-1)[:, None]
        mx.eval(tokens)
    return Run(len(workload.prompts) * workload.max_tokens[0])


def run_kernel_loop(llm: LLM, workload: Workload) -> Run:
    """The same loop with the engine's CPU kernels: what is left is what the engine adds."""
    with CPUKernels(llm.model).bound():
        return run_forward_loop(llm, workload)


def _in_process(workload: Workload) -> list[tuple[str, Runner]]:
    if workload.is_scored:
        return [("mlx-lm's loop", run_mlx_lm)]
    if workload.name != "decode":
        return [("mlx-lm", run_mlx_lm)]
    ours: list[tuple[str, Runner]] = [("loop, our kernels", run_kernel_loop)]
    return [("forward loop", run_forward_loop), *(ours if on_cpu() else [])]


class Peers:
    """The sides of every workload; ends the processes that it started when it is left."""

    def __init__(
        self, llm: LLM, compare: Sequence[str], *, options: dict[str, Any], stock_rows: int
    ) -> None:
        """Starts the processes that `compare` needs; `options` are those `llm` was made with."""
        self._llm = llm
        self._stock_rows = stock_rows
        self._compare = compare
        self._options = options
        self._plain = without_drafts(llm, options) if "plain" in compare else None
        self._children: dict[str, Child] = {}
        with ExitStack() as stack:
            if "stock" in compare:
                self._children["stock"] = stack.enter_context(stock_mlx_lm(llm))
            if "batch_invariant" in compare:
                same = options | {"max_batch_size": llm.engine.max_batch_size}
                child = stack.enter_context(batch_invariant_engine(same))
                self._children["batch_invariant"] = child
            self._stack = stack.pop_all()

    def sides(self, workload: Workload) -> list[Side]:
        """The engine, then each of its peers."""
        llm, sides = self._llm, []
        ours = with_earlier(llm, self._options, workload) if workload.name == "previous" else llm
        sides.append(Side("runner", "runner", workload, partial(timed, ours, run_engine)))
        load_adapters(llm, workload.num_adapters)
        if self._plain is not None:
            load_adapters(self._plain, workload.num_adapters)
            plain = partial(timed, self._plain, run_engine)
            sides.append(Side("plain", "without drafts", workload, plain))
        if workload.num_adapters:
            return sides + self._fewer_adapters(workload)
        runners: list[tuple[Kind, str, Runner]] = []
        if "mlx_lm" in self._compare:
            runners += [("mlx_lm", name, run) for name, run in _in_process(workload)]
        for kind, name, run in runners:
            sides.append(Side(kind, name, workload, partial(timed, llm, run)))
        if child := self._children.get("stock"):
            part = workload.part(self._stock_rows)
            sides.append(Side("stock", "mlx-lm from pip", part, self._stock(child), is_warm=True))
        if child := self._children.get("batch_invariant"):
            name = "batch-invariant"
            sides.append(Side("batch_invariant", name, workload, _engine(child)))
        return sides

    def _fewer_adapters(self, workload: Workload) -> list[Side]:
        """The same rows with one adapter for all, and with none: nobody else mixes them."""
        one, none = (replace(workload, num_adapters=count) for count in (1, 0))
        run = partial(timed, self._llm, run_engine)
        return [
            Side("adapters", "one adapter", one, run),
            Side("adapters", "no adapter", none, run),
        ]

    def _stock(self, child: Child) -> Callable[[Workload], Run]:
        size = self._llm.engine.max_batch_size
        return lambda workload: Run(**child.ask(_work(workload, size)))

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _engine(child: Child) -> Callable[[Workload], Run]:
    return lambda workload: Run(**child.ask(asdict(workload)))
