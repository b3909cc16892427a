"""Weights for a model that is loaded: which files, names, types and shapes fit it."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny import tiny_model
from tiny_adapters import copied, quantized

from runner.errors import AdapterError, ModelError
from runner.models.new_weights import exchange_weights, read_new_weights
from runner.models.safetensors import read_safetensors

MODEL = tiny_model()
NORM = "model.norm.weight"


def parameters(model: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def save(directory: Path, weights: dict[str, mx.array], name: str = "model") -> Path:
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / f"{name}.safetensors"), weights)
    return directory


def test_weights_come_in_the_types_of_the_model(tmp_path):
    other = parameters(tiny_model(seed=4))
    half = {name: array.astype(mx.bfloat16) for name, array in other.items()}
    found = read_new_weights(MODEL, save(tmp_path, half))
    assert found.keys() == parameters(MODEL).keys()
    for name, array in found.items():
        assert array.dtype == mx.float32
        assert mx.array_equal(array, half[name].astype(mx.float32))


def test_the_names_of_a_checkpoint_are_brought_to_those_of_the_model(tmp_path):
    """A tied head and tables of rotations, which published files may have."""
    more = {
        "lm_head.weight": mx.zeros((97, 32)),
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros((4,)),
    }
    found = read_new_weights(MODEL, save(tmp_path, parameters(MODEL) | more))
    assert found.keys() == parameters(MODEL).keys()


def test_the_tensors_of_all_files_count_and_other_files_do_not(tmp_path):
    names = sorted(parameters(MODEL))
    for number in range(3):
        part = {name: parameters(MODEL)[name] for name in names[number::3]}
        save(tmp_path, part, f"model-{number}")
    (tmp_path / "model.bin").write_text("not of these")
    assert sorted(read_new_weights(MODEL, tmp_path)) == names


def test_an_exchange_changes_the_model_and_nothing_that_holds_the_old_arrays(tmp_path):
    model, other = copied(MODEL), tiny_model(seed=4)
    ids = mx.array([[5, 9, 60]])
    before = MODEL(ids)
    exchange_weights(model, read_new_weights(model, save(tmp_path, parameters(other))))
    assert mx.array_equal(model(ids), other(ids))
    assert mx.array_equal(MODEL(ids), before) and not mx.array_equal(model(ids), before)


def test_packed_weights_are_exchanged_for_packed_ones_of_the_same_type(tmp_path):
    model, other = quantized(MODEL), parameters(quantized(tiny_model(seed=4)))
    found = read_new_weights(model, save(tmp_path, other))
    packed = "model.layers.0.self_attn.q_proj.weight"
    assert found[packed].dtype == mx.uint32 and mx.array_equal(found[packed], other[packed])
    signed = other | {packed: other[packed].astype(mx.int32)}
    with pytest.raises(ModelError, match=f"{packed} is .*int32, where the model has .*uint32"):
        read_new_weights(model, save(tmp_path, signed))
    # Weights that are not packed have neither the shapes nor the scales.
    with pytest.raises(ModelError, match="lacks model.*biases and .* more"):
        read_new_weights(model, save(tmp_path, parameters(MODEL)))


def test_names_that_are_missing_or_too_many_are_counted(tmp_path):
    own = parameters(MODEL)
    few = {name: array for name, array in own.items() if "layers.1" not in name}
    missing = len(own) - len(few)
    with pytest.raises(ModelError, match=rf"lacks model.layers.1.* and {missing - 1} more$"):
        read_new_weights(MODEL, save(tmp_path, few))
    extra = {"x.a": mx.zeros(1), "x.b": mx.zeros(1)}
    with pytest.raises(ModelError, match="has x.a and 1 more, which this model does not have"):
        read_new_weights(MODEL, save(tmp_path, own | extra))


def test_names_that_break_the_models_own_reading_are_one_line(tmp_path):
    class Strict:
        def __getattr__(self, name: str) -> Any:
            return getattr(MODEL, name)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return {NORM: weights["experts.0.gate"]}

    with pytest.raises(ModelError, match="does not fit: 'experts.0.gate' is missing"):
        read_new_weights(Strict(), save(tmp_path, parameters(MODEL)))


def test_a_model_without_a_reading_of_its_own_takes_the_names_as_they_are(tmp_path):
    class Plain:
        sanitize = None

        def parameters(self) -> Any:
            return {"w": mx.zeros((2,))}

    assert set(read_new_weights(Plain(), save(tmp_path, {"w": mx.ones((2,))}))) == {"w"}


@pytest.mark.parametrize("value", [mx.nan, mx.inf, -mx.inf])
def test_a_value_that_is_no_number_is_refused(tmp_path, value):
    own = parameters(MODEL)
    broken = mx.where(mx.arange(32) == 31, value, own[NORM])
    with pytest.raises(ModelError, match=f"{NORM} holds values that are not numbers"):
        read_new_weights(MODEL, save(tmp_path, own | {NORM: broken}))


@pytest.mark.parametrize("error", [ModelError, AdapterError])
@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_damaged_file_is_one_line_of_the_error_that_is_wanted(tmp_path, size, error):
    file = save(tmp_path, {"w": mx.ones((64,))}) / "model.safetensors"
    arrays, metadata = read_safetensors(file, error)
    assert mx.array_equal(arrays["w"], mx.ones((64,))) and metadata is not None
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(error, match="model.safetensors' cannot be read: ") as caught:
        read_safetensors(file, error)
    assert "\n" not in str(caught.value)
    with pytest.raises(error, match="cannot be read"):
        read_safetensors(tmp_path / "nowhere.safetensors", error)
