"""Weights on the device: read, unpacked where that is faster, and cast.

Importing this imports mlx: `runner.models.blas.load_blas` comes first.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as load_directory

from runner.errors import ModelError
from runner.models.gguf import build_model, load_gguf
from runner.models.hub import one_line
from runner.models.tokenizer import load_tokenizer


def read_model(found: Path, *, dtype: str) -> tuple[nn.Module, dict[str, Any], TokenizerWrapper]:
    """Returns a model in evaluation mode, its configuration and its tokenizer.

    `dtype` is float32, bfloat16, float16 or auto (float32 on a CPU, the file's own elsewhere).
    Raises ModelError.
    """
    model, config, tokenizer, own_dtype = _read_directory(found) if found.is_dir() else _read(found)
    on_cpu = device_name() == "cpu"
    if on_cpu:
        _unpack(model, found)
    target = ("float32" if on_cpu else own_dtype) if dtype == "auto" else dtype
    if target is not None:
        _cast(model, target)
    model.eval()
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise _unreadable(found, error) from error
    return model, config, tokenizer


def device_name() -> str:
    """Returns what mlx computes on: cpu, metal or cuda."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def floating_dtype(model: nn.Module) -> str:
    """Returns the floating type of most of a model's parameters, scales of packed ones included."""
    sizes: Counter[str] = Counter()
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[str(array.dtype).rpartition(".")[2]] += array.size
    return sizes.most_common(1)[0][0]


_Read = tuple[nn.Module, dict[str, Any], TokenizerWrapper, str | None]


def _read(file: Path) -> _Read:
    content = load_gguf(file)
    try:
        model = build_model(content)
    except (ValueError, TypeError) as error:
        raise _unreadable(file, error) from error
    config = content.config | {"max_position_embeddings": content.context_length}
    return model, config, content.tokenizer, content.dtype


def _read_directory(directory: Path) -> _Read:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{str(directory)!r} is not a model: it has no config.json")
    try:
        model, config = load_directory(directory, lazy=True, trust_remote_code=False)
    except Exception as error:  # a configuration that does not fit breaks any line of any model
        raise _unreadable(directory, error) from error
    return model, config, load_tokenizer(directory), None


def _unreadable(found: Path, error: BaseException) -> ModelError:
    return ModelError(f"{str(found)!r} cannot be loaded: {one_line(error)}")


def _unpack(model: nn.Module, found: Path) -> None:
    """Makes quantised layers dense: a CPU multiplies packed weights row by row of the batch."""
    if any("global_scale" in module for _, module in model.named_modules()):
        raise ModelError(
            f"{str(found)!r} cannot be loaded: nvfp4 weights with global scales run on a GPU only"
        )
    # The dense weights take the type of the scales, and a product in bfloat16 loses digits.
    _cast(model, "float32")
    dequantize_model(model)


def _cast(model: nn.Module, dtype: str) -> None:
    allowed = getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(getattr(mx, dtype)) if floating and allowed(path) else array

    model.update(tree_map_with_path(cast, model.parameters()))
