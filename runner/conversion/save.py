"""Writes a model as a directory that mlx-lm and this program load: shards, configuration, tokenizer
and a card."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import get_total_parameters, make_shards, save_config
from tqdm import tqdm

from runner.errors import ModelError, StoppedError
from runner.models.hub import one_line
from runner.models.safetensors_files import truncated_files
from runner.models.weights import ModelFiles

_INDEX_FILE = "model.safetensors.index.json"
_GENERATION_FILE = "generation_config.json"
_CARD = """\
---
library_name: mlx
pipeline_tag: text-generation
tags:
- mlx
{base}---

# {name}

{text}
"""


def save(directory: Path, files: ModelFiles, *, source: Path) -> int:
    """Writes everything but the card; returns the bytes of the weights.

    The model is left without its weights: each is read, changed and written in turn, so that one
    shard (5 GiB) is in memory at a time. `source` is the model that the files came from.
    """
    keeps_vision = "vision_tower" in getattr(files.model, "model", {})
    num_bytes = save_weights(directory, files.model)
    config = dict(files.config)
    config.setdefault("eos_token_id", sorted(files.tokenizer.eos_token_ids))
    save_config(config, directory / "config.json", keep_vision_config=keeps_vision)
    files.tokenizer.save_pretrained(directory)
    _save_generation(directory, config, source)
    if source.is_dir():
        for code in source.glob("*.py"):
            shutil.copy(code, directory)
    return num_bytes


def save_weights(directory: Path, model: nn.Module) -> int:
    """Writes the shards and their index, and takes the weights out of the model."""
    weights = dict(tree_flatten(model.parameters()))
    num_bytes: int = sum(array.nbytes for array in weights.values())
    metadata = {"total_size": num_bytes, "total_parameters": get_total_parameters(model)}
    shards = make_shards(weights)
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    weights.clear()
    places: dict[str, str] = {}
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Converting") as progress:
        for number in range(len(shards)):
            shard, shards[number] = shards[number], {}
            file = _shard_name(number, len(shards))
            for name, array in shard.items():
                _evaluate(name, array)
                progress.update(array.nbytes)
            _write(directory / file, shard)
            places |= dict.fromkeys(shard, file)
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (directory / _INDEX_FILE).write_text(json.dumps(index, indent=4))
    return num_bytes


def _evaluate(name: str, array: mx.array) -> None:
    try:
        mx.eval(array)
    except RuntimeError as error:
        raise ModelError(f"{name} cannot be read: {one_line(error)}") from error


def _write(file: Path, shard: dict[str, mx.array]) -> None:
    """Writes a file and looks at its length: mlx does not tell of every full disk."""
    try:
        mx.save_safetensors(str(file), shard, metadata={"format": "mlx"})
        reason = "it is cut short" if truncated_files(file.parent) else None
    except RuntimeError as error:
        reason = one_line(error)
    if reason is not None:
        raise StoppedError(f"{file.name} cannot be written: {reason}; is the disk full?")


def save_card(directory: Path, *, name: str, text: str, base_model: str | None) -> None:
    """Writes a README.md of a few lines, with the header that the hub reads."""
    base = "" if base_model is None else f"base_model: {base_model}\n"
    (directory / "README.md").write_text(_CARD.format(name=name, text=text, base=base))


def _shard_name(number: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def _save_generation(directory: Path, config: dict[str, Any], source: Path) -> None:
    given = source / _GENERATION_FILE
    if source.is_dir() and given.is_file():
        shutil.copy(given, directory)
        return
    kept = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    (directory / _GENERATION_FILE).write_text(json.dumps(kept, indent=2) + "\n")
