"""Random adapters for tiny models, as weights, as files of either format, and merged."""

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from runner.models.adapters import CONFIG_FILE, MLX_FILE, adapter_from_arrays

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SCALE = 2.0


def copied(model: nn.Module) -> nn.Module:
    """Another model with the same arrays."""
    return copy.deepcopy(model)


def with_lora_layers(
    model: nn.Module, *, rank: int, dora: bool, keys: Collection[str], seed: int
) -> nn.Module:
    """A copy with mlx-lm's own layers, all of their tensors random."""
    adapted = copied(model)
    config = {"rank": rank, "scale": SCALE, "dropout": 0.0, "keys": set(keys)}
    linear_to_lora_layers(adapted, len(adapted.layers), config, use_dora=dora)
    random = np.random.default_rng(seed)

    def fresh(name: str, array: mx.array) -> mx.array:
        drawn = random.standard_normal(array.shape).astype(np.float32)
        return array * mx.array(1 + 0.3 * drawn) if name == "m" else mx.array(0.2 * drawn)

    tensors = {
        path: fresh(path.rpartition(".")[2], array)
        for path, array in tree_flatten(adapted.parameters())
        if path.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }
    adapted.update(tree_unflatten(list(tensors.items())))
    mx.eval(adapted.parameters())
    return adapted


def adapter_tensors(adapted: nn.Module) -> dict[str, mx.array]:
    """The tensors of mlx-lm's layers, by name."""
    return {
        path: array
        for path, array in tree_flatten(adapted.parameters())
        if path.rpartition(".")[2] in ("lora_a", "lora_b", "m")
    }


def random_adapter(
    model: nn.Module,
    seed: int,
    *,
    rank: int = 4,
    dora: bool = False,
    keys: Collection[str] = ATTENTION + MLP,
) -> tuple[Any, nn.Module]:
    """An adapter's weights, and the model that mlx-lm makes of the base and them."""
    adapted = with_lora_layers(model, rank=rank, dora=dora, keys=keys, seed=seed)
    return adapter_from_arrays(adapter_tensors(adapted), scale=SCALE), adapted


def merged(adapted: nn.Module) -> nn.Module:
    """mlx-lm's layers fused into the weights, as `mlx_lm.fuse` does."""
    fused = copied(adapted)
    layers = [
        (name, module.fuse(dequantize=True))
        for name, module in fused.named_modules()
        if hasattr(module, "fuse")
    ]
    fused.update_modules(tree_unflatten(layers))
    mx.eval(fused.parameters())
    return fused


def save_mlx(
    directory: Path, adapted: nn.Module, *, rank: int, dora: bool = False, keys: Collection[str]
) -> Path:
    """Writes what `mlx_lm.lora` writes."""
    directory.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(directory / MLX_FILE), adapter_tensors(adapted))
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": len(adapted.layers),
        "lora_parameters": {"rank": rank, "scale": SCALE, "dropout": 0.0, "keys": list(keys)},
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    return directory


def loaded_by_mlx_lm(model: nn.Module, directory: Path) -> nn.Module:
    """What mlx-lm's own loading makes of a directory."""
    loaded = load_adapters(copied(model), str(directory))
    loaded.eval()
    return loaded


def quantized(model: nn.Module, *, bits: int = 8) -> nn.Module:
    """A copy with packed weights."""
    packed = copied(model)
    nn.quantize(packed, group_size=32, bits=bits, class_predicate=lambda _, it: _fits(it))
    mx.eval(packed.parameters())
    return packed


def _fits(module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def with_biases(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose biases are random."""
    biased, random = copied(model), np.random.default_rng(seed)
    biases = {
        path: mx.array(random.standard_normal(array.shape).astype(np.float32))
        for path, array in tree_flatten(biased.parameters())
        if path.endswith(".bias")
    }
    assert biases, "the model has layers with a bias"
    biased.update(tree_unflatten(list(biases.items())))
    return biased


def shifted(tensors: dict[str, mx.array], by: float) -> dict[str, mx.array]:
    """Other tensors of the same shapes."""
    return dict(tree_map(lambda it: it + by, tensors))
