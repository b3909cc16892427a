"""What a finished run says: `summary.json` and a short table."""

import functools
import resource
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from runner import __version__
from runner.data import ResultWriter
from runner.llm import LLM

_PACKAGES = ("mlx", "mlx-lm", "transformers", "pyarrow")


def summary(
    writer: ResultWriter, llm: LLM, *, total: int | None, num_rows: int, seconds: float
) -> dict[str, Any]:
    """The content of `summary.json`: all results that are committed, and the speed of this run.

    `total` is the number of input rows; None where only reading them all would tell. `num_rows` of
    them were finished in this run, which has taken more from the input by now.
    """
    stats = llm.engine.stats
    useful = stats.num_completion_tokens or stats.num_scored_tokens or stats.num_embedded_tokens
    return writer.totals.report() | {
        "complete": writer.complete,
        "total_rows": total,
        "run": {
            "seconds": seconds,
            "prompt_tokens": stats.num_prompt_tokens,
            "prefix_cached_tokens": stats.num_cached_tokens,
            "scored_tokens": stats.num_scored_tokens,
            "embedded_tokens": stats.num_embedded_tokens,
            "completion_tokens": stats.num_completion_tokens,
            "tokens_per_second": useful / seconds,
            "rows_per_hour": num_rows / seconds * 3600,
            "batch_occupancy": stats.occupancy,
            "max_batch_size": llm.engine.max_batch_size,
            "max_batch_size_auto": _auto(llm),
            "batch_halvings": stats.num_halvings,
            "speculative": _speculative(llm),
            "memory_budget_bytes": llm.engine.memory.num_bytes,
            "peak_memory_bytes": _peak_memory(),
            "peak_mlx_memory_bytes": mx.get_peak_memory(),
        },
        "model": {
            "name": llm.loaded.name,
            "path": llm.loaded.path,
            "revision": llm.loaded.revision,
            "digest": llm.loaded.digest,
            "tokenizer_digest": llm.loaded.tokenizer_digest,
            "dtype": llm.loaded.dtype,
            "file_dtype": llm.loaded.file_dtype,
            "quantization": llm.loaded.quantization,
            "max_model_len": llm.loaded.max_model_len,
        },
        "device": llm.loaded.device,
        "blas": llm.loaded.blas.name,
        "versions": _versions(),
    }


@functools.cache
def _versions() -> dict[str, str]:
    """Looked up once: it reads a file of each package, and a summary comes with every commit."""
    return {"mlx-runner": __version__} | {name: version(name) for name in _PACKAGES}


def _auto(llm: LLM) -> dict[str, Any] | None:
    """What max_batch_size=auto chose and why; None where a number was given."""
    return None if llm.batch_size_choice is None else asdict(llm.batch_size_choice)


def _speculative(llm: LLM) -> dict[str, Any] | None:
    """What was drafted and what came of it; None where nothing is."""
    speculation = llm.engine.speculation
    return None if speculation is None else speculation.report()


def _peak_memory() -> int:
    """Most bytes that the process held in memory; macOS counts bytes, Linux kibibytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _score_lines(numbers: dict[str, Any]) -> dict[str, str]:
    """What a job that scores prints of its own."""
    lines: dict[str, str] = {}
    if found := numbers.get("perplexity"):
        spread = found["token_perplexity_stderr"]
        lines["per token"] = _shown(found["token_perplexity"]) + (
            f" ± {_shown(spread)} perplexity" if spread is not None else " perplexity"
        )
        for unit in ("word", "byte"):
            if found[f"{unit}_perplexity"] is not None:
                lines[f"per {unit}"] = f"{_shown(found[f'{unit}_perplexity'])} perplexity"
        if found["bits_per_byte"] is not None:
            lines["per byte"] += f", {_shown(found['bits_per_byte'])} bits"
    if found := numbers.get("embedding"):
        cut = "" if found["dimensions"] is None else " first"
        length = ", of length 1" if found["normalize"] else ""
        lines["vectors"] = f"{found['size']}{cut} components, {found['pooling']}{length}"
    if found := numbers.get("accuracy"):
        shares = [f"{it['mean']:.3f} {name.replace('_', ' ')}" for name, it in found.items()]
        lines["accuracy"] = ", ".join(shares)
    return lines


def _certified(found: dict[str, Any]) -> str:
    """What a certificate says: how far sampled logprobs are from scored ones."""
    rows = f"{found['rows']} rows" + (f" ({found['errors']} failed)" if found["errors"] else "")
    if not found["tokens"]:
        return rows
    most, divergence = (
        "not finite" if found[name] is None else f"{found[name]:.1e}"
        for name in ("max_difference", "mismatch_kl")
    )
    same = f"{100 * found['share_bit_equal']:.0f} % the same bits"
    return f"{rows}: differ by {most} at most, KL {divergence}, {same}"


def _shown(number: float | None) -> str:
    return "not finite" if number is None else f"{number:.4f}"


def _types(model: dict[str, Any]) -> str:
    """The type that is computed in, and what the files have where that is another one."""
    packed = [f"{it['bits']} bits" for it in model["quantization"]]
    stored = " and ".join(dict.fromkeys(packed)) or model["file_dtype"]
    is_same = stored in ("", model["dtype"])
    return model["dtype"] if is_same else f"{model['dtype']} (files: {stored})"


def _drafts_line(drafts: dict[str, Any]) -> str:
    if not drafts["num_drafted"]:
        return "none that looked worth a try"
    share, speedup = drafts["acceptance_rate"], drafts["speedup_estimate"]
    rate = f"{drafts['num_drafted']} tokens drafted, {share:.0%} accepted"
    return rate if speedup is None else f"{rate}: {speedup:.2f} times as fast"


def print_report(numbers: dict[str, Any], directory: Path) -> None:
    """Prints the table, at most 80 columns wide, and how to read the results."""
    run, reward = numbers["run"], numbers["reward"]
    errors = sum(numbers["errors"].values())
    reasons = ", ".join(f"{count} {name}" for name, count in numbers["finish_reasons"].items())
    is_scored = not reasons
    useful = run["completion_tokens"] or run["scored_tokens"] or run["embedded_tokens"]
    lines = {
        "rows": f"{numbers['rows']} rows, {numbers['samples']} samples, {errors} errors",
        "finished": reasons,
        "tokens": f"{useful} in {run['seconds']:.1f} s: "
        f"{run['tokens_per_second']:.0f} tokens/s, {run['rows_per_hour']:.0f} rows/hour",
        "model": f"{numbers['model']['name']}, {_types(numbers['model'])}, {numbers['device']}",
        "BLAS": numbers["blas"],
        "memory": f"{run['peak_memory_bytes'] / 2**30:.2f} GiB at most",
    }
    if is_scored:
        lines = {name: line for name, line in lines.items() if line} | _score_lines(numbers)
        lines["rows"] = lines["rows"].replace("samples", "result rows")
    elif run["scored_tokens"]:
        lines["scored"] = f"{run['scored_tokens']} tokens of the prompts"
    if drafts := run["speculative"]:
        lines["drafts"] = _drafts_line(drafts)
    if run["batch_halvings"]:
        lines["batch"] = f"{run['max_batch_size']} rows in the end: memory ran out before"
    if found := numbers.get("certificate"):
        lines["certified"] = _certified(found)
    if reward is not None:
        lines["reward"] = f"{reward['mean']:.3f} ± {reward['std']:.3f}"
    print()
    for name, value in lines.items():
        print(f"  {name:<9} {value}")
    print(f'\nRead them with: polars.scan_ipc("{directory}/part-*.arrow").collect()')
