"""Offline batch inference and RL rollouts on MLX."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.llm import LLM as LLM
    from runner.types import Completion as Completion
    from runner.types import Embedding as Embedding
    from runner.types import Logprob as Logprob
    from runner.types import RequestOutput as RequestOutput
    from runner.types import SamplingParams as SamplingParams
    from runner.types import Score as Score
    from runner.types import TokenLogprobs as TokenLogprobs

_root = Path(__file__).resolve().parent
if not (_root / "conf").is_dir() and (_root.parent / "pyproject.toml").is_file():
    # In a checkout `jobs/` and `conf/` lie beside this package; in a wheel they lie inside it.
    __path__.append(str(_root.parent))

_PUBLIC = {
    "LLM": "runner.llm",
    "Completion": "runner.types",
    "Embedding": "runner.types",
    "Logprob": "runner.types",
    "RequestOutput": "runner.types",
    "SamplingParams": "runner.types",
    "Score": "runner.types",
    "TokenLogprobs": "runner.types",
}
__all__ = sorted(_PUBLIC)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `runner --help` never imports mlx."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'runner' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
