"""A model's digest: its content wherever it lies, and another one for another content."""

from pathlib import Path

import pytest
from tiny_files import save_tiny_model

from runner.models import digest
from runner.models.digest import model_digest
from runner.models.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples files above 4 KiB, 16 places of 64 bytes."""
    monkeypatch.setattr(digest, "_WHOLE_BYTES", 2**12)
    monkeypatch.setattr(digest, "_SAMPLES", 16)
    monkeypatch.setattr(digest, "_SAMPLE_BYTES", 64)


def model(directory: Path, weights: bytes = bytes(2**16), config: str = "{}") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(config)
    (directory / "model.safetensors").write_bytes(weights)
    return directory


def test_a_copy_elsewhere_has_the_same(tmp_path: Path) -> None:
    one, other = model(tmp_path / "one"), model(tmp_path / "other")
    (other / "README.md").write_text("about it")
    assert model_digest(one) == model_digest(other)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"weights")
    assert model_digest(tmp_path / "a.gguf") == model_digest(tmp_path / "b.gguf")


@pytest.mark.parametrize("at", [0, 63, 2**16 - 64, 2**16 - 1])
def test_weights_that_differ_at_an_end_have_another(tmp_path: Path, at: int) -> None:
    changed = bytearray(2**16)
    changed[at] = 1
    assert model_digest(model(tmp_path / "one")) != model_digest(
        model(tmp_path / "x", bytes(changed))
    )


def test_weights_that_differ_in_a_stretch_have_another(tmp_path: Path) -> None:
    one = model_digest(model(tmp_path / "one"))
    for start in range(0, 2**16 - 5000, 1009):
        changed = bytes(start) + b"\1" * 5000 + bytes(2**16 - 5000 - start)
        assert model_digest(model(tmp_path / "other", changed)) != one


def test_every_file_that_decides_counts(tmp_path: Path) -> None:
    one = model_digest(model(tmp_path / "one"))
    assert model_digest(model(tmp_path / "b", config='{"a": 1}')) != one
    assert model_digest(model(tmp_path / "c", bytes(2**16 + 1))) != one
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ x }}")
    assert model_digest(tmp_path / "one") != one


def test_a_tokenizers_digest_is_of_what_it_does(tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "tiny")
    ours = digest.tokenizer_digest(load_tokenizer(directory))
    assert ours == digest.tokenizer_digest(load_tokenizer(directory))
    merged = save_tiny_model(tmp_path / "merged", merges=["a b"])
    changed = load_tokenizer(directory)
    changed.chat_template = "another"
    others = [digest.tokenizer_digest(it) for it in (load_tokenizer(merged), changed)]
    assert len({ours, *others}) == 3


def test_every_part_of_a_split_file_counts(tmp_path: Path) -> None:
    first, second = (tmp_path / f"a-{number:05}-of-00002.gguf" for number in (1, 2))
    first.write_bytes(b"first")
    second.write_bytes(b"second")
    whole = model_digest(first)
    assert whole == model_digest(second)
    second.write_bytes(b"another")
    assert model_digest(first) != whole
