"""The peers that run in a process of their own, because another BLAS is in place there."""

import json
import os
import platform
import sys
import tempfile
from dataclasses import asdict, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import save_config, save_model

from runner.benchmarking import engine_side, mlx_lm_side
from runner.benchmarking.child import Child
from runner.errors import ModelError, ParameterError
from runner.llm import LLM

# What this package, or its user, sets for a BLAS in place of mlx's own.
_OURS = ("RUNNER_BLAS", "OPENBLAS_CORETYPE", "LD_PRELOAD", "PYTHONPATH")
_QUANTIZATION = ("quantization", "quantization_config")


def stock_mlx_lm(llm: LLM) -> Child:
    """mlx-lm as pip installs it: the same weights, mlx's own BLAS, nothing of this package."""
    environment = {name: value for name, value in os.environ.items() if name not in _OURS}
    with tempfile.TemporaryDirectory() as directory:
        _save(llm, Path(directory))
        # -P: what lies beside the script must not be found in place of a library.
        command = [sys.executable, "-P", mlx_lm_side.__file__, directory]
        return Child("job.compare=stock: mlx-lm", command, env=environment)


def _save(llm: LLM, directory: Path) -> None:
    """Writes the weights as they are in memory, and the configuration, for mlx-lm to load."""
    save_model(directory, llm.model)
    save_config(_config(llm), directory / "config.json")


def _config(llm: LLM) -> dict[str, Any]:
    own = Path(llm.loaded.path) / "config.json"
    if own.is_file():
        config: dict[str, Any] = json.loads(own.read_text())
    elif is_dataclass(args := getattr(llm.model, "args", None)) and not isinstance(args, type):
        config = asdict(args)
    else:
        name = llm.loaded.name
        raise ModelError(
            f"job.compare=stock: {name} does not say its configuration, as mlx-lm's do"
        )
    is_packed = any(isinstance(module, nn.QuantizedLinear) for module in llm.model.modules())
    return {key: it for key, it in config.items() if is_packed or key not in _QUANTIZATION}


def batch_invariant_engine(options: dict[str, Any]) -> Child:
    """The same engine with `batch_invariant=true`, its BLAS held to kernels that do not vary."""
    if "batch_invariant" not in signature(LLM).parameters or options.get("batch_invariant"):
        why = "engine.batch_invariant has to be there, and false"
        raise ParameterError(f"job.compare=[batch_invariant] is not allowed: {why}")
    environment = dict(os.environ)
    if platform.machine().lower() in ("x86_64", "amd64"):
        environment["OPENBLAS_CORETYPE"] = "Sandybridge"
    command = [sys.executable, "-m", engine_side.__name__]
    command.append(json.dumps(options | {"batch_invariant": True}))
    return Child("job.compare=batch_invariant: the engine", command, env=environment)
