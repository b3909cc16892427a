"""Every side of a benchmark does the work that is counted, and is timed in turn."""

import ast
import os
import sys
from inspect import signature
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from runner import LLM
from runner.benchmarking import mlx_lm_side, peers
from runner.benchmarking.adapting import load_adapters
from runner.benchmarking.child import Child
from runner.benchmarking.engine_side import Run, requests, run_engine, timed, weights_bytes
from runner.benchmarking.measure import measure, result
from runner.benchmarking.peers import Peers, Side
from runner.benchmarking.processes import batch_invariant_engine, stock_mlx_lm
from runner.data.workloads import WORKLOADS, Workload
from runner.errors import ParameterError, StoppedError

GROUP = Workload("group", [[5, 6, 7], [8, 9, 10, 11]], 3, [6, 4], 1.0)
DECODE = Workload("decode", [[5, 6, 7], [8, 9, 10]], 1, [6, 6], 0.0)
SCORE = Workload("score", [[5, 6, 7, 8][: 1 + i % 4] * 3 for i in range(11)], 1, [0] * 11, 1.0)


@pytest.fixture(scope="module")
def llm(tiny_directory):
    return LLM(tiny_directory, max_batch_size=2)


@pytest.mark.parametrize(
    ("run", "workload"),
    [
        (run_engine, GROUP), (run_engine, DECODE), (run_engine, SCORE),
        (peers.run_mlx_lm, GROUP), (peers.run_mlx_lm, DECODE), (peers.run_mlx_lm, SCORE),
        (peers.run_forward_loop, DECODE), (peers.run_kernel_loop, DECODE),
    ],
)  # fmt: skip
def test_every_side_gives_exactly_the_tokens_that_are_counted(llm, run, workload):
    assert timed(llm, run, workload).num_tokens == workload.num_tokens


def test_the_counts_are_those_of_the_workload():
    assert (GROUP.num_tokens, GROUP.num_rows) == (3 * 10, 6)
    assert SCORE.is_scored and SCORE.num_tokens == sum(map(len, SCORE.prompts)) - 11


def test_the_loop_beside_the_engine_gives_the_same_losses(llm, monkeypatch):
    texts, losses, evaluate = [[5, 60, 7, 8, 40], [9, 5, 80, 33, 21]], [], mx.eval
    monkeypatch.setattr(mlx_lm_side.mx, "eval", lambda x: (evaluate(x), losses.append(np.array(x))))
    mlx_lm_side.score(llm.model, texts)
    monkeypatch.undo()
    scores = llm.score(texts, use_tqdm=False)
    np.testing.assert_allclose(-losses[0], [s.logprobs[1:] for s in scores], atol=1e-4)


def test_one_loop_has_the_kernels_of_the_engine_and_the_other_has_not(llm, monkeypatch):
    from mlx_lm.models import llama

    plain, bound, model = llama.scaled_dot_product_attention, [], llm.model

    def forward(*arguments, **options):
        bound.append(llama.scaled_dot_product_attention is not plain)
        return model(*arguments, **options)

    class Watched:
        layers = model.layers
        modules = model.modules
        __call__ = staticmethod(forward)

    class Stub:
        model = Watched()

    peers.run_forward_loop(Stub(), DECODE)
    assert bound == [False] * 6
    peers.run_kernel_loop(Stub(), DECODE)
    assert bound[6:] == [peers.on_cpu()] * 6


@pytest.mark.parametrize(("most", "rows", "n"), [(1, 1, 1), (2, 2, 1), (5, 4, 2), (99, 6, 3)])
def test_a_part_of_a_group_keeps_prompts_before_samples(most, rows, n):
    part = GROUP.part(most)
    assert (part.num_rows, part.n) == (rows, n)


def test_a_part_is_spread_over_the_lengths():
    lengths = [50, 3, 9, 7, 100, 1, 8, 2]
    whole = Workload("mixed", [[i] for i in range(8)], 1, lengths, 1.0)
    assert whole.part(8) == whole and whole.part(99) == whole
    assert whole.part(1).max_tokens == [8]
    assert whole.part(2).max_tokens == [50, 3], "the quartiles, in the order of the workload"
    part = whole.part(3)
    assert all(lengths[i] == most for [i], most in zip(part.prompts, part.max_tokens, strict=True))


def test_the_sides_take_turns_and_the_warm_up_is_not_counted():
    order = []

    def side(name, seconds, **options):
        clock = iter(seconds)

        def run(workload):
            order.append(name)
            return Run(workload.num_tokens, seconds=next(clock), peak_bytes=50, cache_bytes=10)

        return Side(name, name, options.pop("workload", DECODE), run, **options)

    part = DECODE.part(1)
    sides = [
        side("runner", [99, 1, 2, 4]),
        side("mlx_lm", [99, 2, 8, 4]),
        side("stock", [3, 6, 12], workload=part, is_warm=True),
    ]
    runs = measure(sides, 3)
    assert order == ["runner", "mlx_lm"] + ["runner", "mlx_lm", "stock"] * 3
    row = result(DECODE, sides, runs, weights_bytes=30)
    ours, (loop, stock) = row["runner"], row["peers"]
    assert ours["seconds"] == [1, 2, 4]
    assert ours["tokens_per_second"] == {"rounds": [12, 6, 3], "min": 3, "median": 6, "max": 12}
    assert loop["ratio"] == {"rounds": [2, 4, 1], "min": 1, "median": 2, "max": 4}
    assert (stock["rows"], stock["useful_tokens"]) == (1, 6)
    assert stock["ratio"]["rounds"] == [6, 6, 6], "useful tokens per second are compared"
    assert ours["rows_per_hour"]["max"] == 3600 * 2 and stock["rows_per_hour"]["max"] == 3600 / 3
    assert ours["peak_to_weights_and_cache"] == 50 / (30 + 10)


def test_a_side_that_does_other_work_is_not_measured():
    short = Side("runner", "runner", DECODE, lambda _: Run(11))
    with pytest.raises(AssertionError, match="11 tokens, not 12"):
        measure([short], 1)


def test_the_memory_of_a_run_is_the_side_s_own(llm):
    weights = weights_bytes(llm)
    ours = timed(llm, run_engine, GROUP)
    assert ours.cache_bytes > 0 and weights + ours.cache_bytes <= ours.peak_bytes
    held = mx.zeros((1000, 1000))
    mx.eval(held)
    before, after = (timed(llm, peers.run_mlx_lm, DECODE).peak_bytes for _ in range(2))
    assert weights < before < weights + held.nbytes
    assert after == pytest.approx(before, rel=0.2)


def test_stock_mlx_lm_runs_the_same_weights_without_this_package(llm, monkeypatch):
    tree = ast.parse(Path(mlx_lm_side.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names
    }
    tops = {module.partition(".")[0] for module in modules}
    assert tops - set(sys.stdlib_module_names) == {"mlx", "mlx_lm", "numpy"}
    monkeypatch.setenv("RUNNER_BLAS", "/nowhere")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    given = []
    monkeypatch.setattr(
        "runner.benchmarking.processes.Child",
        lambda *arguments, env: given.append(env) or Child(*arguments, env=env),
    )
    with stock_mlx_lm(llm) as child:
        done = child.ask(peers._work(GROUP, 2))
        assert done["num_tokens"] == GROUP.num_tokens and done["seconds"] > 0
        assert child.ask(peers._work(SCORE, 2))["num_tokens"] == SCORE.num_tokens
    assert not {"RUNNER_BLAS", "OPENBLAS_CORETYPE", "PYTHONPATH"} & set(given[0])


def test_a_child_that_ends_is_one_line():
    quits = [sys.executable, "-c", "import sys; sys.exit('no such thing\\n\\n')"]
    with pytest.raises(StoppedError, match="^mlx-lm ended with code 1: no such thing$"):
        Child("mlx-lm", quits, env=dict(os.environ))
    dies = "import os; print('{}', flush=True); input(); os.kill(os.getpid(), 9)"
    with Child("mlx-lm", [sys.executable, "-c", dies], env=dict(os.environ)) as child:
        for _ in range(2):
            with pytest.raises(StoppedError, match="ended with code -9: it said nothing"):
                child.ask({})


def test_the_engine_in_a_process_of_its_own(tiny_directory, monkeypatch):
    """With the option where this version has it, else refused."""
    options = {"model": str(tiny_directory), "max_batch_size": 2}
    if "batch_invariant" not in signature(LLM).parameters:
        with pytest.raises(ParameterError, match="engine.batch_invariant"):
            batch_invariant_engine(options)
        return
    with pytest.raises(ParameterError, match="engine.batch_invariant"):
        batch_invariant_engine(options | {"batch_invariant": True})
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    compare = ["batch_invariant"]
    with Peers(LLM(**options), compare, options=options, stock_rows=1) as started:
        ours, peer = started.sides(GROUP)
        assert peer.run(GROUP).num_tokens == ours.run(GROUP).num_tokens == GROUP.num_tokens


@pytest.mark.real_model
@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_fixed_and_of_the_size_they_say(smollm2, name):
    one, two = (WORKLOADS[name](smollm2.tokenizer) for _ in range(2))
    assert one == two and one.name == name
    assert one.is_scored == (name == "score")
    assert len(one.max_tokens) == len(one.prompts)
    if name == "score":
        assert one.num_tokens == sum(map(len, one.prompts)) - 48 and max(one.max_tokens) == 0
    else:
        assert one.num_tokens == one.n * sum(one.max_tokens)
    if name == "group":
        assert all(550 <= len(prompt) <= 600 for prompt in one.prompts)
    if name == "mixed":
        assert max(one.max_tokens) > 4 * sorted(one.max_tokens)[24], "the tail is long"
        part = one.part(2)
        mean = one.num_tokens / one.num_rows
        assert mean / 3 < part.num_tokens / part.num_rows < 3 * mean


def test_drafts_from_the_run_before_are_beside_the_same_engine_without(llm):
    workload = Workload("previous", [[5, 6, 7], [8, 9, 10, 11]], 2, [12, 9], 1.0)
    with Peers(llm, ["plain"], options={"model": "x", "seed": 3}, stock_rows=1) as peers_:
        sides = peers_.sides(workload)
        assert [side.kind for side in sides] == ["runner", "plain"]
        runs = measure(sides, rounds=1)
    assert [run.num_tokens for (run,) in runs] == [42, 42]
    drafting, plain = (side.run.args[0] for side in sides)
    assert plain.engine.speculation is None and plain.loaded is drafting.loaded is llm.loaded
    report = drafting.engine.speculation.report()
    assert report["num_draft_tokens"] == 31 and report["acceptance_rate"] in (None, 1.0)


def test_a_run_drafts_nothing_from_the_run_before_it(llm):
    """A round is no easier for there having been one."""
    drafts = {"proposers": ["ngram"], "ngram_scope": "job", "ngram_min": 1, "gate": False}
    drafting = LLM(llm.loaded, speculative=drafts, max_batch_size=2)
    workload = Workload("decode", [[5, 6, 7] * 3, [8, 9, 10] * 3], 1, [25, 25], 0.0)
    counts = []
    for _ in range(2):
        timed(drafting, run_engine, workload)
        report = drafting.engine.speculation.report()
        counts.append((report["num_drafted"], report["num_accepted"]))
    assert counts[0] == counts[1] > (0, 0)


def test_prompts_one_by_one_are_never_in_one_batch(llm):
    workload = Workload("copy", [[5, 6, 7], [8, 9, 10, 11]], 1, [5, 5], 0.0, is_one_by_one=True)
    before = llm.engine.stats.num_row_steps
    assert timed(llm, run_engine, workload).num_tokens == 10
    assert llm.engine.stats.num_row_steps - before == 10, "a row a step"


@pytest.mark.parametrize("compared", ["mlx_lm", "plain"])
def test_rows_use_adapters_in_turn_beside_one_and_none(tiny_directory, compared):
    llm = LLM(tiny_directory, max_batch_size=4, speculative="auto")
    workload = Workload(
        "adapters", [[5, 6, 7], [8, 9, 10], [4, 4]], 1, [6] * 3, 0.0, num_adapters=2
    )
    options = {"model": str(tiny_directory)}
    with Peers(llm, [compared], options=options, stock_rows=1) as peers_of:
        ours, *others = peers_of.sides(workload)
        plain = ["without drafts"] if compared == "plain" else []
        assert [side.name for side in others] == [*plain, "one adapter", "no adapter"]
        mixed = [[0, 1, 0]] * (1 + len(plain))
        for side, names in zip([ours, *others], (*mixed, [0, 0, 0], None), strict=True):
            wanted = [None] * 3 if names is None else [f"benchmark-{it}" for it in names]
            assert [it.adapter for it in requests(side.workload)] == wanted
            assert side.run(side.workload).num_tokens == 18
    assert llm.adapters.keys() == {"benchmark-0", "benchmark-1"}


def test_the_adapters_of_a_benchmark_change_what_is_said(tiny_directory):
    llm = LLM(tiny_directory)
    load_adapters(llm, 2)
    assert len(set(llm.adapters.values())) == 2
    text = "a text to be scored"
    plain, one, other = (
        llm.score([text], adapter=name, use_tqdm=False)[0].logprobs[1:]
        for name in (None, "benchmark-0", "benchmark-1")
    )
    assert not np.array_equal(plain, one) and not np.array_equal(one, other)
