"""Reads adapters as mlx-lm and as PEFT write them: LoRA and DoRA, a directory or arrays."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash

from runner.adapter_weights import AdapterWeights, LowRankWeights
from runner.errors import AdapterError, ParameterError
from runner.models.hub import one_line
from runner.models.safetensors import read_safetensors

CONFIG_FILE = "adapter_config.json"
MLX_FILE = "adapters.safetensors"
PEFT_FILE = "adapter_model.safetensors"

_PARTS = {
    ".lora_a": "a",
    ".lora_b": "b",
    ".m": "magnitude",
    ".lora_A.weight": "a.T",
    ".lora_B.weight": "b.T",
    ".lora_embedding_A": "a.T",
    ".lora_embedding_B": "b.T",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
"""How the names of tensors end, and what they are; those of PEFT are transposed."""

_PEFT_REFUSED = (
    "modules_to_save",
    "layer_replication",
    "use_qalora",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "lora_bias",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
"""Options of PEFT under which an adapter is more than low-rank products."""


@dataclass(frozen=True, slots=True)
class _Config:
    """What a file beside the tensors says of them."""

    scale: Callable[[str, int], float]
    """Of a module, by its path, with the rank that its tensors have."""
    rank: Callable[[str], int | None]
    """What the module's rank should be; None where nothing is said."""
    ties_head: bool
    is_dora: bool | None
    """None where nothing is said."""


def read_adapter(path: str | Path) -> AdapterWeights:
    """Reads the adapter in a directory; which of the formats it is follows from its files.

    Raises:
        AdapterError: files are missing or damaged, or hold what is not covered.
    """
    directory = Path(path).expanduser()
    file = next((it for it in (directory / MLX_FILE, directory / PEFT_FILE) if it.is_file()), None)
    if file is None or not (directory / CONFIG_FILE).is_file():
        there = "is no directory" if not directory.is_dir() else "has no adapter"
        what = f"{CONFIG_FILE} and {MLX_FILE} (mlx-lm) or {PEFT_FILE} (PEFT)"
        raise AdapterError(f"{str(directory)!r} {there}: it takes {what}")
    options = _options(directory / CONFIG_FILE)
    make = _mlx_config if file.name == MLX_FILE else _peft_config
    config = make(options, str(directory))
    tensors, _ = read_safetensors(file, AdapterError)
    return _weights(tensors, config, source=str(directory))


def adapter_from_arrays(
    arrays: Mapping[str, Any], *, scale: float, source: str = "arrays"
) -> AdapterWeights:
    """Takes the tensors of an adapter, `mx.array` by the names that mlx-lm or PEFT gives them.

    `scale` multiplies the products: mlx-lm's `scale`, and alpha / r of PEFT. Float32 arrays are
    not copied. Raises AdapterError.
    """
    config = _Config(
        lambda path, rank: float(scale), lambda path: None, ties_head=True, is_dora=None
    )
    return _weights(arrays, config, source=source)


def adapter_weights(
    path: str | Path | None, arrays: Mapping[str, Any] | None, scale: float | None
) -> AdapterWeights:
    """Reads a directory, or takes arrays with their scale; raises ParameterError for neither."""
    if path is not None and arrays is None and scale is None:
        return read_adapter(path)
    if path is None and arrays is not None and scale is not None:
        return adapter_from_arrays(arrays, scale=scale)
    raise ParameterError("load_adapter takes a path, or arrays with their scale")


def _options(file: Path) -> dict[str, Any]:
    try:
        options = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(file)!r} cannot be read: {one_line(error)}") from error
    if not isinstance(options, dict):
        raise AdapterError(f"{str(file)!r} is not a mapping of options")
    return options


def _mlx_config(options: dict[str, Any], source: str) -> _Config:
    kind = options.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise AdapterError(f"{source}: fine_tune_type={kind!r} is not covered: lora or dora")
    parameters = options.get("lora_parameters")
    parameters = parameters if isinstance(parameters, dict) else {}
    scale = _number(source, "lora_parameters.scale", parameters.get("scale"))
    rank = parameters.get("rank")
    _check_rank(source, "lora_parameters.rank", rank)
    return _Config(lambda path, _: scale, lambda path: rank, ties_head=True, is_dora=kind == "dora")


def _peft_config(options: dict[str, Any], source: str) -> _Config:
    kind = options.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterError(f"{source}: peft_type={kind!r} is not covered: LORA")
    for name in _PEFT_REFUSED:
        if options.get(name):
            raise AdapterError(f"{source}: {name}={options[name]!r} is not covered")
    if options.get("bias", "none") != "none":
        raise AdapterError(f"{source}: bias={options['bias']!r} is not covered: none")
    is_dora = bool(options.get("use_dora"))
    if is_dora and options.get("fan_in_fan_out"):
        raise AdapterError(f"{source}: fan_in_fan_out=true is not covered with use_dora")
    _check_rank(source, "r", options.get("r"))
    own_alpha = _number(source, "lora_alpha", options.get("lora_alpha"))
    ranks, alphas = options.get("rank_pattern") or {}, options.get("alpha_pattern") or {}
    is_rs = bool(options.get("use_rslora"))

    def scale(path: str, rank: int) -> float:
        alpha = float(_matching(alphas, path, own_alpha))
        return alpha / (math.sqrt(rank) if is_rs else rank)

    return _Config(
        scale, lambda path: int(_matching(ranks, path, options["r"])), False, is_dora=is_dora
    )


def _matching(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that a module's path ends with, as PEFT matches them."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _number(source: str, name: str, value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise AdapterError(f"{source}: {name}={value!r} is not allowed: a number")
    return float(value)


def _check_rank(source: str, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{source}: {name}={value!r} is not allowed: at least 1")


def _weights(tensors: Mapping[str, Any], config: _Config, *, source: str) -> AdapterWeights:
    parts: dict[str, dict[str, Any]] = {}
    names: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        path, part = _place(name, source)
        field = part.removesuffix(".T")
        if field in parts.setdefault(path, {}):
            other = names[path][field]
            raise AdapterError(f"{source}: {other} and {name} are for the same module")
        # A handle of our own: what the caller writes into the array later does not reach it.
        parts[path][field] = tensor.T if part.endswith(".T") else tensor[...]
        names.setdefault(path, {})[field] = name
    if not parts:
        raise AdapterError(f"{source}: the adapter has no tensors")
    targets = {path: _target(path, it, names[path], config, source) for path, it in parts.items()}
    return AdapterWeights(targets=targets, digest=_digest(tensors, targets, source), source=source)


def _place(name: str, source: str) -> tuple[str, str]:
    """The path of a tensor's module, and which of the module's tensors it is."""
    for ending, part in _PARTS.items():
        if name.endswith(ending):
            return name.removesuffix(ending).removeprefix("base_model.model."), part
    raise AdapterError(f"{source}: {name} is no tensor of LoRA or DoRA")


def _target(
    path: str, parts: dict[str, Any], names: dict[str, str], config: _Config, source: str
) -> LowRankWeights:
    for field in ("a", "b", *(("magnitude",) if config.is_dora else ())):
        if field not in parts:
            given = next(iter(names.values()))
            raise AdapterError(f"{source}: {given} has no tensor {field} beside it")
    if config.is_dora is False and "magnitude" in parts:
        raise AdapterError(f"{source}: {names['magnitude']} is of DoRA, but the config says LoRA")
    for field, tensor in parts.items():
        most = (1,) if field == "magnitude" else (2, 3)
        if tensor.ndim not in most or not mx.issubdtype(tensor.dtype, mx.floating):
            what = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise AdapterError(f"{source}: {names[field]} is {what}: no factor of an adapter")
    if names["a"].endswith(".lora_embedding_A") and "magnitude" in parts:
        raise AdapterError(
            f"{source}: {names['magnitude']} is of an embedding, not covered in PEFT"
        )
    rank, expected = int(parts["a"].shape[1]), config.rank(path)
    if rank < 1 or expected not in (None, rank):
        what = f"has the rank {rank}" + (f"; the config says {expected}" if rank else "")
        raise AdapterError(f"{source}: {names['a']} {what}")
    return LowRankWeights(
        a=parts["a"],
        b=parts["b"],
        scale=config.scale(path, rank),
        magnitude=parts.get("magnitude"),
        names=names,
        ties_head=config.ties_head,
    )


def _digest(tensors: Mapping[str, Any], targets: Mapping[str, LowRankWeights], source: str) -> str:
    """Names the content; raises AdapterError where a tensor holds what is no number."""
    content = xxhash.xxh3_128()
    for path, low in sorted(targets.items()):
        content.update(f"{path}\0{low.scale!r}\0{low.ties_head}\0".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        wide = tensor if tensor.dtype == mx.float32 else tensor.astype(mx.float32)
        flat = np.ascontiguousarray(np.array(wide, copy=False)).reshape(-1)
        # A sum of squares is no number where an entry is none; it overflows on nonsense alone.
        if not np.isfinite(np.dot(flat, flat)) and not np.isfinite(flat).all():
            raise AdapterError(f"{source}: {name} holds values that are not numbers")
        content.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        memory: Any = flat
        content.update(memory)
    return content.hexdigest()
