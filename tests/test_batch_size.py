import json
from dataclasses import replace
from pathlib import Path

import pytest

from runner import LLM, batch_size
from runner.batch_size import SIZES, choose_batch_size, measure_curve
from runner.engine.kv_options import KVOptions
from runner.errors import ParameterError
from runner.models.load import load_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "runner" / "batch_size"


@pytest.fixture(scope="module")
def loaded(tiny_directory):
    return load_model(str(tiny_directory))


def setting(loaded, **options):
    return batch_size._Setting(loaded, KVOptions(**options), False)


@pytest.fixture
def speeds(monkeypatch):
    """Sizes that are measured from here on, at a speed that levels off at 8 rows."""
    measured = []

    def speed(setting, size):
        measured.append(size)
        return 100.0 * min(size, 8)

    monkeypatch.setattr(batch_size, "_decode_speed", speed)
    return measured


@pytest.mark.parametrize(
    ("speed", "chosen", "measured"),
    [
        (lambda n: 100.0 * n, 1024, SIZES),
        (lambda n: 100.0 * min(n, 16), 16, (1, 2, 4, 8, 16, 32, 64)),
        (lambda n: 100.0, 1, (1, 2, 4)),
        (lambda n: {2: 90.0}.get(n, 100.0 * min(n, 4)), 4, (1, 2, 4, 8, 16)),
        (lambda n: 100.0 + n / 1000, 1, (1, 2, 4)),
    ],
    ids=["grows", "levels off", "flat", "dips once", "hardly gains"],
)
def test_stops_where_more_rows_gain_hardly_anything(speed, chosen, measured):
    curve = measure_curve(speed, SIZES)
    assert tuple(curve) == tuple(measured)
    assert batch_size._best(curve) == chosen


def test_chooses_once_and_remembers(loaded, speeds):
    first = choose_batch_size(loaded, memory_budget=None)
    assert first.max_batch_size == 8 and not first.remembered
    assert speeds == [1, 2, 4, 8, 16, 32]
    again = choose_batch_size(loaded, memory_budget=None)
    assert (again.max_batch_size, again.tokens_per_second) == (8, first.tokens_per_second)
    assert again.remembered and len(speeds) == 6
    assert "\n" not in str(again) and "max_batch_size=auto: 8 (" in str(again)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"a": 1}', '{"3": 5}', '{"1": null}', '{"1": -1}', "\0"]
)
def test_a_broken_cache_is_measured_anew(loaded, speeds, cache, content):
    choose_batch_size(loaded, memory_budget=None)
    (kept,) = cache.iterdir()
    kept.write_text(content)
    assert choose_batch_size(loaded, memory_budget=None).max_batch_size == 8
    assert len(speeds) == 12
    assert json.loads(kept.read_text())["8"] == 800.0


def test_a_cache_that_cannot_be_written_is_no_error(loaded, speeds, cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the directory belongs")
    for _ in range(2):
        assert choose_batch_size(loaded, memory_budget=None).max_batch_size == 8
    assert len(speeds) == 12


def test_another_device_or_other_weights_are_measured_apart(loaded, speeds, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_text("weights")
    changes = [{}, {"dtype": "bfloat16"}, {"device": "metal"}, {"path": str(other)}]
    changes.append({"blas": replace(loaded.blas, name="another")})
    for change in changes:
        assert not choose_batch_size(replace(loaded, **change), memory_budget=None).remembered
    other.write_text("other weights")
    changed = replace(loaded, path=str(other))
    assert not choose_batch_size(changed, memory_budget=None).remembered


@pytest.mark.parametrize(
    "change",
    [
        {"kv_options": KVOptions(kv_bits=4, kv_group_size=32)},
        {"kv_options": KVOptions(kv_bits=8, kv_group_size=32)},
        {"kv_options": KVOptions(kv_bits=8, kv_group_size=64)},
        {"kv_options": KVOptions(kv_bits=8, kv_group_size=32, quantized_kv_start=64)},
        {"kv_options": KVOptions(max_kv_size=32)},
        {"batch_invariant": True},
    ],
    ids=str,
)
def test_other_options_of_keys_and_values_or_pinned_kernels_are_measured_apart(
    loaded, speeds, change, monkeypatch
):
    monkeypatch.setattr(batch_size, "_sizes_that_fit", lambda setting, budget: SIZES)
    choose_batch_size(loaded, memory_budget=None)
    assert not choose_batch_size(loaded, memory_budget=None, **change).remembered
    assert choose_batch_size(loaded, memory_budget=None, **change).remembered
    assert choose_batch_size(loaded, memory_budget=None).remembered


def test_a_shorter_context_is_measured_apart(loaded, speeds):
    choose_batch_size(loaded, memory_budget=None)
    short = replace(loaded, max_model_len=64)
    assert not choose_batch_size(short, memory_budget=None).remembered


def test_what_is_measured_keeps_keys_and_values_as_the_run_will(loaded):
    plain, bounded = (setting(loaded, **options) for options in ({}, {"max_kv_size": 32}))
    tokens = plain.prompt_length + 9
    sizes = [it.engine(1).memory.batch_bytes(64, tokens) for it in (plain, bounded)]
    assert sizes[1] < sizes[0]


def test_memory_bounds_what_is_tried_and_that_is_not_remembered(loaded, speeds, cache):
    engine = setting(loaded).engine(1)
    budget = engine.memory.batch_bytes(5, 160)
    choice = choose_batch_size(loaded, memory_budget=budget)
    assert speeds == [1, 2, 4] and choice.max_batch_size == 4
    assert not cache.exists()


def test_measures_the_decode_of_a_real_engine(loaded):
    assert batch_size._decode_speed(setting(loaded), 4) > 0


def test_auto_is_what_the_engine_runs_with_and_says_so(tiny_directory, speeds, capsys):
    llm = LLM(tiny_directory, max_batch_size="auto")
    other = LLM(tiny_directory, max_batch_size="auto", max_kv_size=32)
    assert not other.batch_size_choice.remembered
    assert llm.engine.max_batch_size == llm.batch_size_choice.max_batch_size == 8
    assert capsys.readouterr().err.startswith("max_batch_size=auto: 8 (")
    assert LLM(tiny_directory).batch_size_choice is None


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many", None, "8"])
def test_another_batch_size_is_refused(value):
    with pytest.raises(ParameterError, match=f"max_batch_size={value!r} .*least 1, or auto"):
        LLM("no such model", max_batch_size=value)
