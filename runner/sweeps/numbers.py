"""A directory of results -> the numbers that its job wrote, flat."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.errors import OutputError

_PERPLEXITY = (
    "documents", "tokens", "scored_tokens", "words", "bytes", "sum_logprob", "mean_logprob",
    "token_perplexity", "token_perplexity_stderr", "word_perplexity", "byte_perplexity",
)  # fmt: skip


def read_numbers(directory: Path) -> dict[str, Any]:
    """The numbers of `summary.json` and `benchmark.json`; none where neither is there."""
    found = _of_summary(_read(directory / "summary.json"))
    return found | ratios(_read(directory / "benchmark.json"))


def ratios(benchmark: Mapping[str, Any]) -> dict[str, float]:
    """Of a benchmark: by workload, our speed; by workload and peer, the ratio and its spread."""
    found: dict[str, float] = {}
    for workload in benchmark.get("workloads", []):
        name = workload["workload"]
        found[f"{name}_tokens_per_second"] = workload["runner"]["tokens_per_second"]["median"]
        for peer in workload["peers"]:
            column = f"{name}_ratio_{'_'.join(peer['name'].replace(',', '').split())}"
            found[column] = peer["ratio"]["median"]
            found[f"{column}_min"] = peer["ratio"]["min"]
            found[f"{column}_max"] = peer["ratio"]["max"]
    return found


def _of_summary(summary: Mapping[str, Any]) -> dict[str, Any]:
    if not summary:
        return {}
    run = summary.get("run", {})
    useful = run.get("completion_tokens") or run.get("scored_tokens") or 0
    seconds = run.get("seconds") or 0
    found = {
        "rows": summary.get("rows"),
        "errors": sum(summary.get("errors", {}).values()),
        "seconds": seconds,
        "tokens_per_second": useful / seconds if useful and seconds else None,
        "peak_mlx_memory_bytes": run.get("peak_mlx_memory_bytes"),
    }
    perplexity = summary.get("perplexity") or {}
    return found | {name: perplexity[name] for name in _PERPLEXITY if name in perplexity}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
