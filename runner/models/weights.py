"""Weights on the device: read, unpacked where that is faster, and cast.

Importing this imports mlx: `runner.models.blas.load_blas` comes first.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import dequantize_model
from mlx_lm.utils import load_model as load_directory

from runner.errors import ModelError
from runner.models.gguf import build_model, load_gguf
from runner.models.hub import one_line
from runner.models.safetensors_files import check_weight_files, missing_files
from runner.models.tokenizer import load_tokenizer, own_code


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A model and its tokenizer as their files hold them, the weights not read yet."""

    model: nn.Module
    """In evaluation mode; its arrays are read as they are evaluated."""
    config: dict[str, Any]
    """As in a Hugging Face `config.json`."""
    tokenizer: TokenizerWrapper
    dtype: str
    """Floating type of the weights, or of the scales of packed ones."""
    narrows_to: str | None
    """The type to give the weights where `model` has them wider than the files; else None."""
    quantization: list[dict[str, Any]]
    """How layers are packed: mode, bits, group_size and their number, most layers first."""


FitCheck: TypeAlias = Callable[[nn.Module], None]
"""Raises where a model, none of whose weights is read yet, does not fit into memory."""


def open_model(found: Path, *, trust_remote_code: bool = False) -> ModelFiles:
    """Opens a directory or a `.gguf` file. Raises ModelError."""
    if found.is_dir():
        model, config, tokenizer, dtype = _read_directory(found, trust_remote_code)
    else:
        model, config, tokenizer, dtype = _read(found)
    model.eval()
    return ModelFiles(
        model=model,
        config=config,
        tokenizer=tokenizer,
        dtype=dtype or floating_dtype(model),
        narrows_to=dtype,
        quantization=packed_layers(model),
    )


def read_model(
    found: Path,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    check_fit: FitCheck | None = None,
) -> ModelFiles:
    """Returns a model that is ready to run: its weights in memory, unpacked where that is faster.

    `dtype` is float32, bfloat16, float16 or auto (float32 on a CPU, the file's own elsewhere); that
    of the returned one is still the file's. Raises ModelError.
    """
    files = open_model(found, trust_remote_code=trust_remote_code)
    model, on_cpu = files.model, device_name() == "cpu"
    if on_cpu:
        unpack(model, found)
    target = ("float32" if on_cpu else files.narrows_to) if dtype == "auto" else dtype
    if target is not None:
        cast(model, target)
    model.eval()
    if check_fit is not None:
        check_fit(model)
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:
        raise _unreadable(found, error) from error
    return files


def packed_layers(model: nn.Module) -> list[dict[str, Any]]:
    """How a model's quantised layers are packed, and how many layers each way."""
    counts = Counter(
        (module.mode, module.bits, module.group_size)
        for _, module in model.named_modules()
        if "scales" in module and hasattr(module, "bits")
    )
    return [
        {"mode": mode, "bits": bits, "group_size": group_size, "layers": count}
        for (mode, bits, group_size), count in counts.most_common()
    ]


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


def _read_directory(directory: Path, trust_remote_code: bool) -> _Read:
    if not (directory / "config.json").is_file():
        raise ModelError(f"{str(directory)!r} is not a model: it has no config.json")
    check_weight_files(directory)
    try:
        model, config = load_directory(directory, lazy=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # a configuration that does not fit breaks any line of any model
        missing = ", ".join(missing_files(directory))
        cause = ValueError(f"it lacks {missing}") if missing else error
        raise _unreadable(directory, cause) from error
    return model, config, load_tokenizer(directory, trust_remote_code=trust_remote_code), None


def _unreadable(found: Path, error: BaseException) -> ModelError:
    if "trust_remote_code" in str(error):
        found_code = re.search(r"custom module \('(.*?)'\)", str(error))
        name = f" ({found_code[1]})" if found_code else ""
        return ModelError(f"{str(found)!r} cannot be loaded: {own_code(name)}")
    return ModelError(f"{str(found)!r} cannot be loaded: {one_line(error)}")


def unpack(model: nn.Module, found: Path) -> None:
    """Makes quantised layers dense: a CPU multiplies packed weights row by row of the batch."""
    if any("global_scale" in module for _, module in model.named_modules()):
        raise ModelError(
            f"{str(found)!r} cannot be loaded: nvfp4 weights with global scales run on a GPU only"
        )
    # The dense weights take the type of the scales, and a product in bfloat16 loses digits.
    cast(model, "float32")
    dequantize_model(model)


def cast(model: nn.Module, dtype: str) -> None:
    """Gives the floating parameters another type, but for those that the model says to leave."""
    allowed = getattr(model, "cast_predicate", lambda _: True)

    def converted(path: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(getattr(mx, dtype)) if floating and allowed(path) else array

    model.update(tree_map_with_path(converted, model.parameters()))
