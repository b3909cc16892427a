"""`batch_invariant`: the bits of a row whatever the batch.

With the BLAS of this process they may differ, so what has to be equal runs in one of its own.
"""

import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny import make_engine, tiny_model

from runner.engine.invariance import check_batch_invariance
from runner.errors import ParameterError

SCRIPT = Path(__file__).parent.parent / "invariance_digests.py"


def digests(model: str) -> dict[str, str]:
    """One digest of all token ids and logprobs for each way to run the same 64 requests."""
    pinned = {"OPENBLAS_CORETYPE": "Sandybridge"} if platform.machine() == "x86_64" else {}
    command = [sys.executable, str(SCRIPT), model]
    done = subprocess.run(
        command, env=os.environ | pinned, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("model", ["full", "sliding", "sinks", "quantised"])
def test_64_requests_have_the_same_bits_in_any_batch(model):
    """Batches of 1, 3, 8 and 32, shuffled, prefilled 16 and 512 tokens at a time, cached or not,
    and with drafts or without.

    And scored with the bits that they were sampled with, which the script asserts.
    """
    found = digests(model)
    assert len(found) == 12 and sum("drafts" in way for way in found) == 2
    assert len(set(found.values())) == 1, found


def test_rows_with_several_adapters_have_the_same_bits_in_any_batch():
    """Alone, beside rows with others and with none, drafted for, and scored."""
    found = digests("adapters")
    assert len(found) == 7
    assert len(set(found.values())) == 1, found


@pytest.mark.real_model
def test_64_requests_to_the_real_model_have_the_same_bits_in_any_batch():
    assert len(set(digests("smollm2").values())) == 1


class DependsOnItsBatch:
    """A model whose logits are a little larger in a larger batch."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, token_ids: mx.array, cache: Any) -> mx.array:
        logits = self._model(token_ids, cache=cache)
        return logits * (1 + 1e-6 * token_ids.shape[0])


def test_what_depends_on_the_batch_is_refused():
    with pytest.raises(ParameterError, match="batch_invariant=True is not possible here.*OPENBLAS"):
        check_batch_invariance(
            partial(make_engine, DependsOnItsBatch(tiny_model())), max_batch_size=8
        )
