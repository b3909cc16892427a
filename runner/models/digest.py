"""What tells one model's files from another's, wherever they lie."""

import hashlib
import json
from pathlib import Path
from typing import Any

from runner.models.split_files import split_parts

_SUFFIXES = frozenset(
    {".safetensors", ".npz", ".gguf", ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py"}
)
"""Weights, configuration, tokenizer, chat template and code; a README decides nothing."""
_WHOLE_BYTES = 2**24
_SAMPLES = 256
_SAMPLE_BYTES = 2**16


def model_digest(path: Path) -> str:
    """Returns a digest of a model's files, 16 bytes in hex: names, sizes and content.

    A file above 16 MiB is read at 256 evenly spaced places, 64 KiB each, its beginning and end
    among them: retrained or requantised weights differ everywhere, and a model of any size takes
    a moment. A few changed numbers in between are not noticed.
    """
    inside = split_parts(path) if path.is_file() else sorted(path.iterdir())
    files = [it for it in inside if it.is_file()]
    content = hashlib.blake2b(digest_size=16)
    for file in files:
        if file.suffix in _SUFFIXES:
            # The name of the one file is the user's; in a directory names have a meaning.
            name = file.name if path.is_dir() else ""
            content.update(f"{name}\0{file.stat().st_size}\0".encode())
            _add(content, file)
    return content.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns a digest of what a tokenizer makes of a text, 16 bytes in hex: its vocabulary and
    rules, special tokens and chat template, whether read from a directory or from a GGUF file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    described = [rules, tokenizer.chat_template, sorted(tokenizer.eos_token_ids)]
    text = json.dumps(described, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _add(content: "hashlib.blake2b", file: Path) -> None:
    size = file.stat().st_size
    with open(file, "rb") as source:
        if size <= _WHOLE_BYTES:
            content.update(source.read())
            return
        for number in range(_SAMPLES):
            source.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            content.update(source.read(_SAMPLE_BYTES))
