"""Other weights for a model that is loaded: read aside, checked whole, then exchanged."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from runner.errors import ModelError
from runner.models.hub import one_line
from runner.models.safetensors import read_safetensors


def read_new_weights(model: nn.Module, path: str | Path) -> dict[str, mx.array]:
    """Reads the safetensors of a directory, by the names and in the types of `model`.

    Names may be those of the Hugging Face checkpoint or mlx-lm's own. Raises ModelError where the
    files cannot be read, or names or shapes are not those of the model.
    """
    directory = Path(path).expanduser()
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{str(directory)!r} has no safetensors to update the weights from")
    given: dict[str, Any] = {}
    for file in files:
        given |= read_safetensors(file, ModelError)[0]
    sanitize = getattr(model, "sanitize", None)
    try:
        named = sanitize(given) if sanitize is not None else given
    except Exception as error:  # Another architecture's names break any line of it.
        raise ModelError(f"{str(directory)!r} does not fit: {one_line(error)}") from error
    return _checked(model, named, str(directory))


def exchange_weights(model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Gives a model the weights that `read_new_weights` returned."""
    model.update(tree_unflatten(list(weights.items())))


def _checked(model: nn.Module, given: dict[str, Any], source: str) -> dict[str, mx.array]:
    own = dict(tree_flatten(model.parameters()))
    for what, names in (("lacks", own.keys() - given.keys()), ("has", given.keys() - own.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            rest = "" if what == "lacks" else ", which this model does not have"
            raise ModelError(f"{source!r} {what} {min(names)}{more}{rest}")
    weights = {}
    for name, array in own.items():
        new = given[name]
        if new.shape != array.shape:
            shapes = f"{tuple(new.shape)}, not {tuple(array.shape)}"
            raise ModelError(f"{source!r}: {name} has the shape {shapes}")
        kinds = {mx.issubdtype(it.dtype, mx.floating) for it in (new, array)}
        if len(kinds) > 1 or (not kinds.pop() and new.dtype != array.dtype):
            raise ModelError(
                f"{source!r}: {name} is {new.dtype}, where the model has {array.dtype}"
            )
        weights[name] = new.astype(array.dtype)
        if not mx.isfinite(weights[name].astype(mx.float32).sum()):
            raise ModelError(f"{source!r}: {name} holds values that are not numbers")
    mx.eval(weights)
    return weights
