"""A model that does not fit is refused before its weights are read, with what would fit."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from runner import LLM
from runner.engine.kv_options import KVOptions
from runner.errors import ModelError
from runner.memory_fit import MemoryFit
from runner.models.weights import open_model, read_model


def fit(memory_budget: int | None, prefix_cache_bytes: int = 0) -> MemoryFit:
    return MemoryFit(
        memory_budget=memory_budget,
        prefill_step_size=512,
        prefix_cache_bytes=prefix_cache_bytes,
        kv_options=KVOptions(),
    )


def weights_bytes(directory: Path) -> int:
    parameters = tree_flatten(open_model(directory).model.parameters())
    return sum(array.nbytes for _, array in parameters)


def test_nothing_is_read_before(tiny_directory: Path) -> None:
    held: list[int] = []

    def check(model: Any) -> None:
        held.append(mx.get_active_memory())
        fit(2**30)(model)
        held.append(mx.get_active_memory())

    read_model(tiny_directory, dtype="float32", check_fit=check)
    assert held[1] - held[0] < weights_bytes(tiny_directory) / 10


def test_says_what_it_takes_and_what_would_fit(tiny_directory: Path) -> None:
    weights = weights_bytes(tiny_directory)
    model = open_model(tiny_directory).model
    fit(3 * weights)(model)
    with pytest.raises(ModelError, match="the model does not fit into memory: its weights take"):
        fit(weights)(model)
    with pytest.raises(ModelError, match=r"memory_budget is .*; model.dtype=bfloat16 would take"):
        fit(weights)(model)
    with pytest.raises(ModelError, match=r"engine.prefix_cache_bytes=0 would take"):
        fit(3 * weights, prefix_cache_bytes=2**30)(model)
    with pytest.raises(ModelError, match="take a smaller model") as caught:
        fit(weights // 10)(model)
    assert "\n" not in str(caught.value)


def test_a_run_that_fits_is_the_one_that_the_engine_takes(tiny_directory: Path) -> None:
    """The least budget that is not refused here is the least that the engine works with."""
    model = open_model(tiny_directory).model
    low, high = 1, 2**30
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fit(middle)(model)
            high = middle
        except ModelError:
            low = middle
    assert LLM(tiny_directory, memory_budget=high, prefill_step_size=512, prefix_cache_bytes=0)
    with pytest.raises(ModelError, match="does not fit into memory"):
        LLM(tiny_directory, memory_budget=low, prefill_step_size=512, prefix_cache_bytes=0)


def test_the_device_is_the_default(tiny_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.memory_fit.default_memory_budget", lambda: 1000)
    with pytest.raises(ModelError, match="the device has 1000 bytes"):
        LLM(tiny_directory)


def test_where_packed_weights_pay_they_are_named(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU they become dense, so that nothing is said of them there."""
    weights = weights_bytes(tiny_directory)
    model = open_model(tiny_directory).model
    monkeypatch.setattr("runner.memory_fit.mx.default_device", lambda: mx.gpu)
    with pytest.raises(ModelError, match=r"4 bits \(runner convert\) would take"):
        fit(weights)(model)


def test_fewer_rows_than_asked_for_are_said(tiny_directory: Path) -> None:
    model = open_model(tiny_directory).model
    asked = replace(fit(3 * weights_bytes(tiny_directory)), max_batch_size=64, max_model_len=256)
    said = r"max_model_len=256 tokens (\d+) fit .* all max_batch_size=64 do with up to (\d+) each"
    with pytest.warns(UserWarning, match=said) as warned:
        asked(model)
    rows, length = map(int, re.search(said, str(warned[0].message)).groups())
    assert 0 < rows < 64 and 0 <= length < 256
    # What it names is quiet.
    replace(asked, max_batch_size=rows)(model)
    if length:
        replace(asked, max_model_len=length)(model)
