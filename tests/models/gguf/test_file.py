"""The bytes of a file: what they hold, split files, and damaged ones."""

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_gguf import TINY_MODELS, write_gguf

from runner.errors import ModelError
from runner.models.gguf import load_gguf
from runner.models.gguf.file import read_file


def test_values_of_every_type_are_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "llama")
    added: dict[str, Any] = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1,
        "int32": -(2**31), "float32": 0.5, "bool": True, "string": "naïve 東京", "uint64": 2**60,
        "int64": -(2**60), "float64": 0.1, "array": ["a", "", "é"],
    }  # fmt: skip
    for kind, value in added.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_array("numbers", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    values = read_file(tmp_path / "all.gguf").metadata.values
    assert values == added | {"general.architecture": "llama", "numbers": [1, 2, 3]}


@pytest.mark.parametrize("alignment", [32, 256])
def test_tensors_lie_where_the_header_says(tmp_path: Path, alignment: int) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(40, dtype=np.float16),
    }
    metadata = {"general.architecture": "llama", "general.alignment": alignment}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_file(tmp_path / "a.gguf")
    assert file.metadata.values == metadata
    for name, array in tensors.items():
        assert file.tensors[name].shape == array.shape
        np.testing.assert_array_equal(
            np.frombuffer(file.tensors[name].data, array.dtype), array.ravel()
        )


def _split(tmp_path: Path, count: int) -> list[Path]:
    metadata, tensors = TINY_MODELS["llama"]
    names = list(tensors)
    paths = []
    for number in range(count):
        own = metadata if number == 0 else {"general.architecture": "llama"}
        parts = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
        path = tmp_path / f"tiny-{number + 1:05}-of-{count:05}.gguf"
        paths.append(
            write_gguf(path, own | parts, {it: tensors[it] for it in names[number::count]})
        )
    return paths


@pytest.mark.parametrize("given", [0, 2])
def test_a_split_file_is_one_file(tmp_path: Path, given: int) -> None:
    whole = load_gguf(write_gguf(tmp_path / "tiny.gguf", *TINY_MODELS["llama"]))
    content = load_gguf(_split(tmp_path, 3)[given])
    assert content.config == whole.config
    assert content.weights.keys() == whole.weights.keys()
    for name, array in whole.weights.items():
        np.testing.assert_array_equal(np.array(content.weights[name]), np.array(array))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    paths = _split(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(ModelError, match=r"its part tiny-00002-of-00003\.gguf is missing"):
        load_gguf(paths[0])
    alone = paths[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(ModelError, match=r"split into 3 files, and their names end in -00001-of-0"):
        load_gguf(alone)


def test_parts_that_lack_tensors_are_refused(tmp_path: Path) -> None:
    first, second = _split(tmp_path, 2)
    metadata, tensors = TINY_MODELS["llama"]
    write_gguf(second, {"general.architecture": "llama"}, {"a": tensors["output_norm.weight"]})
    with pytest.raises(ModelError, match="parts hold 11 tensors and should hold 20"):
        load_gguf(first)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b"not a gguf file", "it is not a GGUF file"),
        (b"GGUF\x03\0\0\0", "its header is cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "GGUF version 1, not 2 or 3"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "GGUF version 50331648, not 2 or 3"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**40), "its header is cut short or damaged"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff", "its header is cut short"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0) + struct.pack("<I", 77), "its header is"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 0) + struct.pack("<IIQ", 9, 8, 2**60),
            "its header is cut short",
        ),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_gguf(tmp_path / "bad.gguf")
    assert str(caught.value).startswith("bad.gguf cannot be read: ")
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_noticed_wherever_it_ends(tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", *TINY_MODELS["llama"])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match="is cut short"):
        load_gguf(path)


def test_a_type_that_is_not_covered_is_named(tmp_path: Path) -> None:
    metadata, tensors = TINY_MODELS["llama"]
    kind = gguf.GGMLQuantizationType.IQ4_NL
    raw = np.zeros((96, 2 * gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    path = write_gguf(tmp_path / "a.gguf", metadata, tensors | {"blk.0.ffn_up.weight": (raw, kind)})
    with pytest.raises(ModelError, match="type IQ4_NL of its tensor blk.0.ffn_up.weight is not"):
        load_gguf(path)
