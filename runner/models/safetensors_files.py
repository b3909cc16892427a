"""What the header of a safetensors file says, which is enough to notice that the rest is gone.

The format: 8 bytes with the length of the header, the header as JSON, the tensors' bytes.
"""

import json
from pathlib import Path

from runner.errors import ModelError

_LENGTH_BYTES = 8
_INDEX_FILE = "model.safetensors.index.json"


def check_weight_files(directory: Path) -> None:
    """Raises ModelError where there are no weights or they are cut short, before they are read."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        others = [*directory.glob("*.gguf"), *directory.glob("*.bin"), *directory.glob("*.pth")]
        there = f", only {min(it.name for it in others)}" if others else ""
        raise ModelError(f"{str(directory)!r} cannot be loaded: No safetensors found{there}")
    if short := truncated_files(directory):
        size = (directory / short[0]).stat().st_size
        raise ModelError(
            f"{str(directory)!r} cannot be loaded: {short[0]} is cut short, or no safetensors file "
            f"({size} bytes): fetch or copy it again"
        )


def truncated_files(directory: Path) -> list[str]:
    """The names of the weight files in a directory that are not as long as they say."""
    files = sorted(directory.glob("model*.safetensors"))
    return [file.name for file in files if file.stat().st_size != _stated_size(file)]


def _stated_size(file: Path) -> int | None:
    """Bytes that the file should have; None where not even the header is whole."""
    size = file.stat().st_size
    with open(file, "rb") as source:
        length = int.from_bytes(source.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES + length:
            return None
        try:
            header = json.loads(source.read(length))
            ends = [it["data_offsets"][1] for key, it in header.items() if key != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return None
    return _LENGTH_BYTES + length + max(ends, default=0)


def missing_files(directory: Path) -> list[str]:
    """The weight files that the index of a model in several of them names and that are not there.

    An index can be older than the weights, so that alone it is no error.
    """
    try:
        index = json.loads((directory / _INDEX_FILE).read_text())
        named = set(index["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    return sorted(name for name in named if not (directory / name).is_file())
