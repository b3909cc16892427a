"""How ggml writes numbers (ggml-common.h), and the arrays of mlx that hold the same ones."""

from typing import NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np

Arrays: TypeAlias = dict[str, mx.array]

GROUP_SIZE = 32
_BLOCKS_AT_ONCE = 2**14


class BlockType(NamedTuple):
    """A way to write the values of a row."""

    name: str
    values: int
    """Values in a block."""
    size: int
    """Bytes of a block."""


_BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}


def block_type(kind: int) -> BlockType | None:
    """The type that ggml gives a number to, None for one that is not covered."""
    return _BLOCK_TYPES.get(kind)


def type_name(kind: int) -> str:
    """ggml's name of a type, covered or not."""
    from gguf.constants import GGMLQuantizationType

    known = kind in set(GGMLQuantizationType)
    return GGMLQuantizationType(kind).name if known else str(kind)


def unpack(kind: int, shape: tuple[int, ...], data: memoryview) -> Arrays:
    """Returns a tensor as `weight`, with `scales` and `biases` where it stays quantised.

    Q4_0, Q4_1 and Q8_0 are mlx's affine quantisation in groups of 32, to the last bit; every other
    type becomes float32.
    """
    name = _BLOCK_TYPES[kind].name
    if name in _PACKED and len(shape) > 1:
        return _PACKED[name](shape, _blocks(kind, data))
    return {"weight": mx.array(_dense(kind, data).reshape(shape))}


def stored_dtype(kind: int) -> str:
    """The floating type of values of a kind, or of the scales of their blocks."""
    return {"F32": "float32", "BF16": "bfloat16"}.get(_BLOCK_TYPES[kind].name, "float16")


def _blocks(kind: int, data: memoryview) -> np.ndarray:
    return np.frombuffer(data, np.uint8).reshape(-1, _BLOCK_TYPES[kind].size)


def _dense(kind: int, data: memoryview) -> np.ndarray:
    name = _BLOCK_TYPES[kind].name
    if name == "F32":
        return np.frombuffer(data, "<f4")
    if name == "F16":
        return np.frombuffer(data, "<f2").astype(np.float32)
    if name == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return _converted(name, _blocks(kind, data))


def _converted(name: str, blocks: np.ndarray) -> np.ndarray:
    from gguf import quants

    # Its own `dequantize` takes sixteen rows at a time, which is slow for short ones.
    reader = getattr(quants, name)
    parts = np.array_split(blocks, max(1, len(blocks) // _BLOCKS_AT_ONCE))
    return np.concatenate([reader.dequantize_blocks(part) for part in parts])


def _halves(blocks: np.ndarray, place: int) -> np.ndarray:
    """The float16 of each block that begins at a byte."""
    return blocks[:, place : place + 2].copy().view("<f2")


def _affine(
    shape: tuple[int, ...], codes: np.ndarray, scales: np.ndarray, biases: np.ndarray
) -> Arrays:
    words = np.ascontiguousarray(codes).view("<u4")
    rows = shape[:-1]
    parts = {"weight": words, "scales": scales, "biases": biases}
    return {name: mx.array(part.reshape(*rows, -1)) for name, part in parts.items()}


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Puts 4-bit codes in the order of their values.

    A byte of ggml holds code i of the first half of a block, then code i of the second; one of mlx
    holds two neighbours.
    """
    codes = np.concatenate([packed & 15, packed >> 4], axis=1)
    in_order: np.ndarray = codes[:, ::2] | codes[:, 1::2] << 4
    return in_order


def _q4_0(shape: tuple[int, ...], blocks: np.ndarray) -> Arrays:
    scales = _halves(blocks, 0)
    return _affine(shape, _nibbles(blocks[:, 2:]), scales, scales * np.float16(-8))


def _q4_1(shape: tuple[int, ...], blocks: np.ndarray) -> Arrays:
    return _affine(shape, _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2))


def _q8_0(shape: tuple[int, ...], blocks: np.ndarray) -> Arrays:
    scales = _halves(blocks, 0)
    # From -128..127 to 0..255.
    return _affine(shape, blocks[:, 2:] ^ 128, scales, scales * np.float16(-128))


_PACKED = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
