"""The tensors of a GGUF file under mlx-lm's names and in its order."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from runner.models.gguf.architectures import TOP_MODULES, Architecture
from runner.models.gguf.blocks import GROUP_SIZE, Arrays, unpack
from runner.models.gguf.file import GGUFFile, StoredTensor
from runner.models.gguf.metadata import listed
from runner.models.gguf.rope import FACTORS

_KINDS = ("weight", "bias")


def read_weights(file: GGUFFile, architecture: Architecture, config: dict[str, Any]) -> Arrays:
    """Returns every weight, packed ones with their `scales` and `biases`. Raises ModelError."""
    weights: Arrays = {}
    unknown = []
    for name, tensor in file.tensors.items():
        stem, _, kind = name.rpartition(".")
        module = _module(stem, architecture)
        if module is None or kind not in _KINDS or not _has(module, kind, config, architecture):
            unknown.append(name)
            continue
        for part, array in _converted(tensor, stem, architecture, config).items():
            weights[f"{module}.{kind if part == 'weight' else part}"] = array
    unknown = [name for name in unknown if name not in FACTORS]
    if unknown:
        raise file.metadata.refuse(f"its tensors {listed(unknown)} are not covered")
    missing = [name for name in _expected(config, architecture) if name not in weights]
    if missing:
        raise file.metadata.refuse(f"it lacks the tensors of {listed(missing)}")
    return weights | _missing_biases(weights, architecture, config)


def quantization(weights: Arrays) -> dict[str, Any]:
    """`quantization` of a `config.json` as mlx-lm writes it; empty where every weight is dense."""
    bits = {
        name.removesuffix(".scales"): _bits(weights, name)
        for name in weights
        if name.endswith(".scales")
    }
    if not bits:
        return {}
    ((most, _),) = Counter(bits.values()).most_common(1)
    others = {
        module: {"group_size": GROUP_SIZE, "bits": own, "mode": "affine"}
        for module, own in bits.items()
        if own != most
    }
    return {"group_size": GROUP_SIZE, "bits": most, "mode": "affine", **others}


def _bits(weights: Arrays, scales: str) -> int:
    packed = weights[f"{scales.removesuffix('.scales')}.weight"]
    # So many 32-bit words to a group of 32 values.
    return int(packed.shape[-1] // weights[scales].shape[-1])


def _module(stem: str, architecture: Architecture) -> str | None:
    """mlx-lm's name for what ggml calls `stem`, None if mlx-lm's model has no such part."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer is None:
        return None if architecture.is_tied and stem == "output" else TOP_MODULES.get(stem)
    part = architecture.modules.get(layer[2])
    return part and f"model.layers.{layer[1]}.{part}"


def _has(module: str, kind: str, config: dict[str, Any], architecture: Architecture) -> bool:
    return kind == "weight" or module.split(".", 3)[-1] in _biased(architecture, config)


def _converted(
    tensor: StoredTensor, stem: str, architecture: Architecture, config: dict[str, Any]
) -> Arrays:
    arrays = unpack(tensor.kind, tensor.shape, tensor.data)
    if stem.endswith("norm"):
        return {"weight": arrays["weight"] - architecture.norm_offset}
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(stem.rpartition(".")[2])
    if heads is None or not architecture.is_interleaved:
        return arrays
    return {part: _in_halves(array, heads) for part, array in arrays.items()}


def _in_halves(rows: mx.array, heads: int) -> mx.array:
    """Puts the rows of queries or keys back in the order of split-half RoPE.

    llama.cpp's converter interleaves the two halves of every head (`LlamaModel.permute`).
    """
    half = rows.shape[0] // heads // 2
    interleaved = rows.reshape(heads, half, 2, *rows.shape[1:])
    return interleaved.swapaxes(1, 2).reshape(rows.shape)


def _biased(architecture: Architecture, config: dict[str, Any]) -> list[str]:
    parts = [it for field, them in architecture.biases.items() if config[field] for it in them]
    return [architecture.modules[part] for part in (*parts, *architecture.always_biased)]


def _missing_biases(weights: Arrays, architecture: Architecture, config: dict[str, Any]) -> Arrays:
    """Zeros where only some projections have a bias: mlx-lm gives one to all or to none."""
    zeros = {}
    for module in _layer_modules(config, _biased(architecture, config)):
        if f"{module}.bias" not in weights:
            zeros[f"{module}.bias"] = mx.zeros((weights[f"{module}.weight"].shape[0],))
    return zeros


def _expected(config: dict[str, Any], architecture: Architecture) -> list[str]:
    top = ["model.embed_tokens", "model.norm"]
    parts = list(architecture.modules.values())
    return [f"{module}.weight" for module in (*top, *_layer_modules(config, parts))]


def _layer_modules(config: dict[str, Any], parts: list[str]) -> Iterator[str]:
    for layer in range(config["num_hidden_layers"]):
        yield from (f"model.layers.{layer}.{part}" for part in parts)
