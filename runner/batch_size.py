"""`max_batch_size=auto`: measures once per model and device how decode gains from more rows."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from runner.models.load import LoadedModel  # First: it loads the BLAS, then mlx.

# isort: split
import mlx.core as mx

from runner.engine.engine import Engine
from runner.engine.kv_options import KVOptions
from runner.errors import ParameterError
from runner.types import Request, SamplingParams

SIZES = tuple(2**power for power in range(11))
"""Batch sizes that are tried, from 1 to 1024."""
_MIN_GAIN = 1.05
"""More rows are worth their memory where they give at least so many times the tokens a second."""
_PROMPT_TOKENS = 128
_WARM_UP_STEPS = 2
_STEPS = 6
_NUM_STEPS = _WARM_UP_STEPS + _STEPS + 1


@dataclass(frozen=True, slots=True)
class BatchSizeChoice:
    """The batch size that was chosen, and what for."""

    max_batch_size: int
    tokens_per_second: dict[int, float]
    """Of decode, by batch size, as far as it was measured."""
    remembered: bool = False
    """Whether an earlier run measured it."""

    def __str__(self) -> str:
        rates = ", ".join(f"{n}: {rate:.0f}" for n, rate in self.tokens_per_second.items())
        how = "measured before" if self.remembered else "measured now"
        return f"max_batch_size=auto: {self.max_batch_size} (tokens/s by rows, {how}: {rates})"


def check_batch_size(value: object) -> None:
    """Raises ParameterError for what is neither a number of rows nor auto."""
    is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_size and value != "auto":
        raise ParameterError(
            f"max_batch_size={value!r} is not allowed: a whole number of at least 1, or auto"
        )


def settled_batch_size(
    asked: int | str,
    loaded: LoadedModel,
    memory_budget: int | None,
    kv_options: KVOptions,
    *,
    batch_invariant: bool,
) -> tuple[int, BatchSizeChoice | None]:
    """The number of rows; measured, said and returned as well where that was left to us."""
    if not isinstance(asked, str):
        return asked, None
    choice = choose_batch_size(
        loaded,
        memory_budget=memory_budget,
        kv_options=kv_options,
        batch_invariant=batch_invariant,
    )
    print(choice, file=sys.stderr)
    return choice.max_batch_size, choice


@dataclass(frozen=True, slots=True)
class _Setting:
    """What the speed of decode depends on, and the bytes of a row."""

    loaded: LoadedModel
    kv_options: KVOptions
    batch_invariant: bool
    """The engine is the same; the kernels of the process are pinned."""

    @property
    def prompt_length(self) -> int:
        """Tokens of each row before decode is timed."""
        return max(1, min(_PROMPT_TOKENS, self.loaded.max_model_len - _NUM_STEPS))

    def engine(self, size: int, *, memory_budget: int | None = None) -> Engine:
        """An engine for so many rows, as the run's will be."""
        return Engine(
            self.loaded.model,
            max_batch_size=size,
            prefix_cache_bytes=0,
            memory_budget=memory_budget,
            kv_options=self.kv_options,
        )


def choose_batch_size(
    loaded: LoadedModel,
    *,
    memory_budget: int | None,
    kv_options: KVOptions | None = None,
    batch_invariant: bool = False,
) -> BatchSizeChoice:
    """The batch size from which on more rows give hardly more tokens a second.

    What was measured is kept in the user's cache directory, unless memory ended the measurement.
    """
    setting = _Setting(loaded, kv_options or KVOptions(), batch_invariant)
    place = _cache_file(setting)
    if (curve := _read(place)) is not None:
        return BatchSizeChoice(_best(curve), curve, remembered=True)
    sizes = list(_sizes_that_fit(setting, memory_budget))
    curve = measure_curve(lambda size: _decode_speed(setting, size), sizes)
    if len(sizes) == len(SIZES) or len(curve) < len(sizes):
        _write(place, curve)
    return BatchSizeChoice(_best(curve), curve)


def measure_curve(measure: Callable[[int], float], sizes: Iterable[int]) -> dict[int, float]:
    """Tokens a second by batch size; ends after two sizes in a row that gain too little.

    One alone may be where a matrix product changes its kernel.
    """
    curve: dict[int, float] = {}
    for size in sizes:
        curve[size] = measure(size)
        if len(curve) > 2 and _best(curve) not in list(curve)[-2:]:
            break
    return curve


def _best(curve: dict[int, float]) -> int:
    """The last size that gained enough over the best smaller one."""
    best = min(curve)
    for size in sorted(curve):
        if curve[size] >= _MIN_GAIN * curve[best]:
            best = size
    return best


def _sizes_that_fit(setting: _Setting, memory_budget: int | None) -> Iterable[int]:
    engine = setting.engine(1, memory_budget=memory_budget)
    most = max(1, engine.memory.max_rows(setting.prompt_length + _NUM_STEPS))
    return (size for size in SIZES if size <= most)


def _decode_speed(setting: _Setting, size: int) -> float:
    """Tokens a second of `size` rows decoded together, sampling included."""
    engine = setting.engine(size)
    params = SamplingParams(n=size, max_tokens=_NUM_STEPS, ignore_eos=True, seed=0)
    prompt = [1] * setting.prompt_length
    engine.add(Request(request_id="", prompt_token_ids=prompt, params=params, key=""))
    while engine.stats.num_steps < _WARM_UP_STEPS:
        engine.step()
    started, before = time.perf_counter(), engine.stats.num_steps
    while engine.stats.num_steps < before + _STEPS:
        engine.step()
    return size * _STEPS / (time.perf_counter() - started)


def _cache_file(setting: _Setting) -> Path:
    """Where the curve of this model on this device, with these libraries and options, is kept."""
    directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    digest = hashlib.blake2b(json.dumps(_identity(setting)).encode(), digest_size=16)
    return directory / "runner" / "batch_size" / f"{digest.hexdigest()}.json"


def _identity(setting: _Setting) -> list[Any]:
    loaded = setting.loaded
    path = Path(loaded.path).resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    weights = [it for it in files if it.suffix in (".safetensors", ".gguf", ".json")]
    info = mx.device_info()
    return [
        str(path),
        [(it.name, it.stat().st_size, it.stat().st_mtime_ns) for it in weights],
        loaded.dtype,
        [loaded.device, info.get("device_name"), info.get("architecture"), os.cpu_count()],
        [loaded.blas.name, os.environ.get("OPENBLAS_NUM_THREADS")],
        [version("mlx"), version("mlx-lm")],
        [asdict(setting.kv_options), setting.batch_invariant, setting.prompt_length],
    ]


def _read(place: Path) -> dict[int, float] | None:
    """A curve that was kept; None where there is none that makes sense."""
    try:
        curve = {int(size): float(rate) for size, rate in json.loads(place.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return curve if curve and all(n in SIZES and rate > 0 for n, rate in curve.items()) else None


def _write(place: Path, curve: dict[int, float]) -> None:
    # A cache that cannot be written costs the next run a measurement, and this one nothing.
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(curve))
        unfinished.replace(place)
