"""From a GGUF file to a configuration, weights and a tokenizer, and from these to a model."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from runner.models.gguf.architectures import Architecture
from runner.models.gguf.blocks import Arrays, stored_dtype
from runner.models.gguf.configuration import architecture_of, configuration, context_length
from runner.models.gguf.file import GGUFFile, read_file
from runner.models.gguf.vocabulary import eos_ids, read_tokenizer
from runner.models.gguf.weights import quantization, read_weights


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file holds."""

    config: dict[str, Any]
    """As in the `config.json` of a directory that mlx-lm reads."""
    weights: Arrays
    """By mlx-lm's names: packed where mlx packs alike, otherwise float32."""
    tokenizer: TokenizerWrapper
    dtype: str
    """The floating type to run the model in where there is no reason for another."""
    context_length: int
    """Prompt and completion together, in tokens."""


def load_gguf(path: Path) -> GGUFModel:
    """Reads a GGUF file. Raises ModelError, which names what is missing or not covered."""
    file = read_file(path)
    architecture = architecture_of(file.metadata)
    config = configuration(file, architecture) | {"eos_token_id": eos_ids(file.metadata)}
    tokenizer = read_tokenizer(file.metadata)
    weights = read_weights(file, architecture, config)
    packed = quantization(weights)
    return GGUFModel(
        config=config | ({"quantization": packed} if packed else {}),
        weights=weights,
        tokenizer=tokenizer,
        dtype=_dtype(file, architecture),
        context_length=context_length(file, architecture),
    )


def build_model(content: GGUFModel) -> nn.Module:
    """Builds mlx-lm's model with the weights in it. Raises ValueError where they do not fit."""
    module = importlib.import_module(f"mlx_lm.models.{content.config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(content.config))
    weights = dict(content.weights)
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    packed = content.config.get("quantization")
    if packed:
        nn.quantize(
            model,
            group_size=packed["group_size"],
            bits=packed["bits"],
            class_predicate=lambda path, _: f"{path}.scales" in weights and packed.get(path, True),
        )
    model.load_weights(list(weights.items()), strict=True)
    return model


def _dtype(file: GGUFFile, architecture: Architecture) -> str:
    stored = stored_dtype(file.tensors["token_embd.weight"].kind)
    # Gemma's activations are too large for float16.
    is_gemma = architecture.model_type.startswith("gemma")
    return "bfloat16" if is_gemma and stored == "float16" else stored
