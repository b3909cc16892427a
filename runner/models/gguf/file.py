"""The bytes of a GGUF file: its header, and where its tensors lie (ggml, docs/gguf.md)."""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from runner.errors import ModelError
from runner.models.gguf.blocks import block_type, type_name
from runner.models.gguf.metadata import Metadata
from runner.models.split_files import split_parts

_NUMBERS = ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")
"""How `struct` reads a value of each of GGUF's numbered types; a string is 8, an array 9."""
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as numpy has it."""
    kind: int
    """ggml's number for how the values are written."""
    data: memoryview


@dataclass(frozen=True)
class GGUFFile:
    """What the parts of a file hold together."""

    metadata: Metadata
    tensors: dict[str, StoredTensor]


def read_file(path: Path) -> GGUFFile:
    """Maps a file, with its other parts where it is split. Raises ModelError."""
    parts = [_read_part(part) for part in _parts(path)]
    metadata = parts[0].metadata
    count = metadata.get("split.count", 1) or 1
    if count != len(parts):
        raise metadata.refuse(
            f"it is split into {count} files, and their names end in -00001-of-{count:05}.gguf"
        )
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    stated = metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise metadata.refuse(f"its parts hold {len(tensors)} tensors and should hold {stated}")
    return GGUFFile(metadata, tensors)


def _parts(path: Path) -> list[Path]:
    parts = split_parts(path)
    for part in parts:
        if not part.is_file():
            raise ModelError(f"{path.name} cannot be loaded: its part {part.name} is missing")
    return parts


def _read_part(path: Path) -> GGUFFile:
    with open(path, "rb") as source:
        if not path.stat().st_size:
            raise ModelError(f"{path.name} cannot be read: it is empty")
        content = memoryview(mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        return _Header(path, content).read()
    except (struct.error, UnicodeDecodeError, IndexError) as error:
        raise ModelError(
            f"{path.name} cannot be read: its header is cut short or damaged"
        ) from error


class _Header:
    """Reads a header from front to back."""

    def __init__(self, path: Path, content: memoryview) -> None:
        self._path = path
        self._content = content
        self._place = 0

    def read(self) -> GGUFFile:
        if bytes(self._content[:4]) != b"GGUF":
            raise ModelError(f"{self._path.name} cannot be read: it is not a GGUF file")
        self._place = 4
        version = self._number("I")
        if version not in _VERSIONS:
            raise ModelError(
                f"{self._path.name} cannot be read: GGUF version {version}, not 2 or 3"
            )
        num_tensors, num_values = self._number("Q"), self._number("Q")
        values = {self._string(): self._value() for _ in range(num_values)}
        metadata = Metadata(self._path, values)
        described = [self._described() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-self._place // alignment) * alignment
        tensors = [self._tensor(metadata, start, *it) for it in described]
        return GGUFFile(metadata, {tensor.name: tensor for tensor in tensors})

    def _number(self, kind: str) -> Any:
        layout = "<" + kind
        (value,) = struct.unpack_from(layout, self._content, self._place)
        self._place += struct.calcsize(layout)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        end = self._place + length
        if end > len(self._content):
            raise IndexError
        text = bytes(self._content[self._place : end]).decode()
        self._place = end
        return text

    def _value(self) -> Any:
        kind = self._number("I")
        return self._array() if kind == _ARRAY else self._read_as(kind)()

    def _read_as(self, kind: int) -> Callable[[], Any]:
        if kind == _STRING:
            return self._string
        layout = _NUMBERS[kind]
        return lambda: self._number(layout)

    def _array(self) -> list[Any]:
        kind, length = self._number("I"), self._number("Q")
        if length > len(self._content):
            raise IndexError
        if kind in (_STRING, _ARRAY):
            read = self._string if kind == _STRING else self._array
            return [read() for _ in range(length)]
        layout = f"<{length}{_NUMBERS[kind]}"
        values = list(struct.unpack_from(layout, self._content, self._place))
        self._place += struct.calcsize(layout)
        return values

    def _described(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        sizes = [self._number("Q") for _ in range(self._number("I"))]
        kind, offset = self._number("I"), self._number("Q")
        return name, tuple(reversed(sizes)), kind, offset

    def _tensor(
        self, metadata: Metadata, start: int, name: str, shape: tuple[int, ...], kind: int, at: int
    ) -> StoredTensor:
        block = block_type(kind)
        if block is None:
            raise metadata.refuse(f"the type {type_name(kind)} of its tensor {name} is not covered")
        if not shape or shape[-1] % block.values:
            raise metadata.refuse(f"rows of {shape} are not blocks of {block.name} in {name}")
        size = prod(shape) // block.values * block.size
        end = start + at + size
        if end > len(self._content):
            missing = end - len(self._content)
            raise metadata.refuse(f"it is cut short: {name} lacks {missing} bytes")
        return StoredTensor(name, shape, kind, self._content[start + at : end])
