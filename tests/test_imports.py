"""Imports point down: a part may import what lies below it, and siblings leave each other be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = [
    {"types", "errors", "config", "adapter_weights", "encoding", "logprobs"},
    {"engine", "models", "data", "rewards", "prompts", "scores", "progress", "interrupt", "pooling"}
    | {"device_memory", "run_log", "text_offsets", "trackers"},
    {"batch_size", "earlier_results", "identity", "lora_options", "prompt_requests"}
    | {"conversion", "fresh_directory", "memory_fit"}
    | {"status", "text_stream", "texts", "training", "watch"},
    {"embeddings", "speculative", "text_engine"},
    {"openai"},
    {"llm"},
    {"answerer"},
    {
        "certificate",
        "configured",
        "report",
        "adapter_watch",
        "result_rows",
        "rows",
        "server",
        "benchmarking",
    }
    | {"perplexity"},
    {"reading"},
    {"job", "documents", "choices"},
    {"scoring_run", "sweeps"},
    {"jobs"},
    {"cli", "arguments", "composition", "config_errors", "environment", "help", "multirun"}
    | {"overrides"},
]
FOUNDATION, COMMAND_LINE = LEVELS[0], LEVELS[-1]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
GRAB_BAGS = {"utils", "util", "common", "helpers", "misc"}
SOURCES = sorted([*ROOT.glob("runner/**/*.py"), *ROOT.glob("jobs/**/*.py")])


def part_of(path: Path) -> str:
    """The part a file belongs to: `engine` for runner/engine/batch.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "jobs" else parts[1]


def imported(path: Path) -> Iterator[str]:
    """The parts of `runner` that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides where it points"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("runner."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = part_of(path)
    if here in ("__init__", "__main__"):
        return
    assert here in LEVEL, f"{here} has no place in LEVELS"
    for there in set(imported(path)) - {here, "__version__"}:
        is_sibling = {here, there} <= FOUNDATION or {here, there} <= COMMAND_LINE
        assert there in LEVEL, f"{here} imports {there} from runner, not from the part it is in"
        assert LEVEL[there] < LEVEL[here] or is_sibling, f"{here} imports {there}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_command_line_reaches_jobs_only_by_name(path: Path) -> None:
    source = path.read_text()
    assert not {"jobs", "conf"} & set(imported(path))
    if part_of(path) in COMMAND_LINE:
        # The BLAS has to be there before a job imports mlx, and only the command line comes first.
        blas = {"models"} if "\nfrom runner.models.blas import load_blas" in source else set()
        assert set(imported(path)) <= FOUNDATION | COMMAND_LINE | {"__version__"} | blas
        assert source.count("runner.models") == len(blas)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_is_named_for_what_it_does(path: Path) -> None:
    assert path.stem not in GRAB_BAGS and path.parent.name not in GRAB_BAGS
