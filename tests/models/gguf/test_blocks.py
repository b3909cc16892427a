"""Blocks of bytes, against ggml's own code in C."""

import base64
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny_gguf import BLOCK_TYPES, NUM_BLOCK_VALUES, random_blocks

from runner.models.gguf.blocks import BlockType, block_type, unpack

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "gguf_by_llama_cpp.json").read_text())[
    "blocks"
]
_COVERED = {block.name: number for number in range(64) if (block := block_type(number)) is not None}


def test_every_quantised_type_is_tried() -> None:
    assert {"F32", "F16", "BF16", *BLOCK_TYPES} == _COVERED.keys()
    assert block_type(8) == BlockType("Q8_0", 32, 34)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_stand_for_the_numbers_that_ggml_reads(kind: str) -> None:
    shape = (2, NUM_BLOCK_VALUES // 2)
    arrays = unpack(_COVERED[kind], shape, memoryview(random_blocks(kind).tobytes()))
    values = np.array(_dense(arrays))
    expected = np.frombuffer(base64.b64decode(GOLDEN[kind]), np.float32)
    assert values.shape == shape
    np.testing.assert_allclose(values.ravel(), expected, rtol=1e-6, atol=1e-7)
    assert np.abs(expected).max() > 0.1


def _dense(arrays: dict[str, mx.array]) -> mx.array:
    if "scales" not in arrays:
        return arrays["weight"]
    parts = {name: arrays[name].astype(mx.float32) for name in ("scales", "biases")}
    bits = arrays["weight"].shape[-1] // arrays["scales"].shape[-1]
    return mx.dequantize(arrays["weight"], **parts, group_size=32, bits=bits)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_what_mlx_packs_alike_stays_packed(kind: str) -> None:
    raw = random_blocks(kind)
    arrays = unpack(_COVERED[kind], (1, NUM_BLOCK_VALUES), memoryview(raw.tobytes()))
    assert {str(it.dtype) for it in arrays.values()} == {"mlx.core.uint32", "mlx.core.float16"}
    alone = unpack(_COVERED[kind], (NUM_BLOCK_VALUES,), memoryview(raw.tobytes()))
    assert alone.keys() == {"weight"}
    np.testing.assert_allclose(np.array(alone["weight"]), np.array(_dense(arrays))[0], rtol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", "<f4"), ("F16", "<f2")])
def test_plain_numbers_are_read(kind: str, dtype: str) -> None:
    numbers = np.array([[1.5, -2.25, 0.0, 65504.0]], dtype)
    arrays = unpack(_COVERED[kind], (1, 4), memoryview(numbers.tobytes()))
    np.testing.assert_array_equal(np.array(arrays["weight"]), numbers.astype(np.float32))


def test_bfloat16_is_the_upper_half_of_float32() -> None:
    halves = np.array([0x3F80, 0xC040, 0x7F7F], "<u2")
    arrays = unpack(_COVERED["BF16"], (3,), memoryview(halves.tobytes()))
    np.testing.assert_allclose(np.array(arrays["weight"]), [1.0, -3.0, 3.3895e38], rtol=1e-4)
