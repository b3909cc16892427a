"""From the name of a model to its weights and tokenizer, ready to run."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from runner.errors import ParameterError
from runner.models.blas import Blas, load_blas
from runner.models.digest import model_digest, tokenizer_digest
from runner.models.hub import resolve_model
from runner.models.provenance import commit_of
from runner.models.reference import parse_reference

if TYPE_CHECKING:
    import mlx.nn as nn
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from runner.models.weights import FitCheck

# Whoever imports this imports mlx next, and the BLAS has to be there by then.
load_blas()

DTYPES = ("auto", "float32", "bfloat16", "float16")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run."""

    model: "nn.Module"
    """In evaluation mode, its weights in memory."""
    tokenizer: "TokenizerWrapper"
    name: str
    """Short: the Hugging Face id, or the stem of the file or directory."""
    path: str
    """The local file or directory that was read."""
    dtype: str
    """Floating type of the weights in memory, or of the scales of packed ones."""
    max_model_len: int
    """Prompt and completion together, in tokens."""
    blas: Blas
    device: str
    """cpu, metal or cuda."""
    digest: str = ""
    """Of the files: `runner.models.digest.model_digest`."""
    tokenizer_digest: str = ""
    """Of what the tokenizer does, the chat template included, wherever it comes from."""
    revision: str | None = None
    """The commit on the hub; None for files that do not say so."""
    file_dtype: str = ""
    """Floating type of the weights in the files."""
    quantization: list[dict[str, Any]] = field(default_factory=list)
    """How layers are packed in the files; on a CPU they are dense in memory."""


Loader: TypeAlias = Callable[..., LoadedModel]
"""What takes the arguments of `load_model` and gives what it gives."""


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    trust_remote_code: bool = False,
    check_fit: "FitCheck | None" = None,
) -> LoadedModel:
    """Loads a model and its tokenizer; `runner.config.ModelConfig` says what the options mean.

    On a CPU quantised weights become dense. `check_fit` may refuse the model before its weights are
    read. Raises ModelError where the model cannot be loaded and ParameterError where an option has
    a value that is not allowed.
    """
    if dtype not in DTYPES:
        raise ParameterError(f"dtype={dtype!r} is not allowed: {', '.join(DTYPES)}")
    found = resolve_model(path, revision=revision, trust_remote_code=trust_remote_code)
    blas = load_blas()
    quieten_transformers()
    from runner.models.weights import device_name, floating_dtype, read_model

    files = read_model(found, dtype=dtype, trust_remote_code=trust_remote_code, check_fit=check_fit)
    return LoadedModel(
        model=files.model,
        tokenizer=files.tokenizer,
        name=short_name(path, found),
        path=str(found),
        dtype=floating_dtype(files.model),
        max_model_len=_context_length(files.config, max_model_len),
        blas=blas,
        device=device_name(),
        digest=model_digest(found),
        tokenizer_digest=tokenizer_digest(files.tokenizer),
        revision=commit_of(found),
        file_dtype=files.dtype,
        quantization=files.quantization,
    )


def loaded_model(model: str | Path | LoadedModel, **options: Any) -> LoadedModel:
    """A model that is loaded already, or else is now; warns where its BLAS is slow.

    The options are those of `load_model`.
    """
    if not isinstance(model, LoadedModel):
        model = load_model(str(model), **options)
    if model.blas.warning is not None:
        warnings.warn(model.blas.warning, stacklevel=3)
    return model


def quieten_transformers() -> None:
    """Keeps it from advising to install PyTorch, which nothing here needs, when it is imported."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def short_name(path: str, found: Path) -> str:
    """How a model is called: the Hugging Face id, or the stem of the file or directory."""
    if found.suffix == ".gguf":
        return found.stem
    is_local = path.startswith("pkg://") or Path(path).expanduser().exists()
    return found.resolve().name if is_local else parse_reference(path).repository


def _context_length(config: dict[str, Any], asked: int | None) -> int:
    texts = (config, config.get("text_config") or {})
    stated = next(
        (int(text[key]) for text in texts for key in _CONTEXT_KEYS if text.get(key)), None
    )
    length = stated if asked is None else asked
    if length is None:
        raise ParameterError("max_model_len=None is not allowed: the model does not state its own")
    if length < 1 or (stated is not None and length > stated):
        most = "" if stated is None else f" and at most {stated}, which the model states"
        raise ParameterError(f"max_model_len={length} is not allowed: at least 1{most}")
    return length
