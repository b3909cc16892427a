"""Reads safetensors, whole or not at all."""

from pathlib import Path
from typing import Any

import mlx.core as mx

from runner.errors import UsageError
from runner.models.hub import one_line


def read_safetensors(
    file: Path, error: type[UsageError]
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The arrays of a file by their names, in memory, and its metadata.

    Raises:
        UsageError: of the type `error`, where the file cannot be read.
    """
    try:
        loaded: Any = mx.load(str(file), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        mx.eval(arrays)
    except (RuntimeError, ValueError, OSError) as reason:
        raise error(f"{str(file)!r} cannot be read: {one_line(reason)}") from reason
    return arrays, metadata
