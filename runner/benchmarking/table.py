"""The table that a benchmark prints, in 80 columns."""

from textwrap import wrap
from typing import Any

from runner.config import EngineConfig

_CHANGES_THE_WORK = ("kv_bits", "max_kv_size")


def print_table(result: dict[str, Any]) -> None:
    """A line for each workload and peer, then what one has to know about them."""
    unequal = result["unequal"]
    mark = "*" if unequal else " "
    print(f"  {'workload':<9}{'beside':<18}{'tokens/s':>9}{'theirs':>9}{'ratio':>8}  spread")
    for workload in result["workloads"]:
        ours = shown_speed(workload["runner"]["tokens_per_second"]["median"])
        for peer in workload["peers"]:
            theirs = shown_speed(peer["tokens_per_second"]["median"])
            low, middle, high = (shown_ratio(peer["ratio"][it]) for it in ("min", "median", "max"))
            print(
                f"  {workload['workload']:<9}{peer['name']:<18}{ours:>9}{theirs:>9}"
                f"{middle:>8}{mark} {low} to {high}"
            )
    notes = [*parts(result), _memory(result)]
    if unequal:
        notes.append(f"* not equal: only this engine runs with {', '.join(unequal)}")
    for note in notes:
        print("\n".join(wrap(note, 80, initial_indent="  ", subsequent_indent="    ")))


def unequal_options(engine: dict[str, Any]) -> list[str]:
    """Options of the engine in effect that make it compute something else than its peers do."""
    defaults = EngineConfig()
    changed = [name for name in _CHANGES_THE_WORK if engine[name] != getattr(defaults, name)]
    return [f"engine.{name}={engine[name]}" for name in changed]


def shown_speed(speed: float) -> str:
    """Tokens per second, to what is worth reading."""
    return f"{speed:.1f}" if speed < 10 else f"{speed:.0f}"


def shown_ratio(ratio: float) -> str:
    """A ratio with three digits, more or less."""
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}"


def parts(result: dict[str, Any]) -> list[str]:
    """Which peers did only some rows."""
    done: dict[str, list[str]] = {}
    for workload in result["workloads"]:
        for peer in workload["peers"]:
            if peer["rows"] < workload["rows"]:
                share = f"{peer['rows']} of {workload['rows']} rows of {workload['workload']}"
                done.setdefault(peer["name"], []).append(share)
    return [
        f"{name} did {', '.join(shares)}; its tokens/s are those of these rows"
        for name, shares in done.items()
    ]


def _memory(result: dict[str, Any]) -> str:
    """What mlx held at most, as a multiple of what has to be there."""
    shares = [
        f"{workload['workload']} {workload['runner']['peak_to_weights_and_cache']:.2f}"
        for workload in result["workloads"]
    ]
    return f"runner's memory at most, by weights and cache: {', '.join(shares)}"
