"""Which tensors of an adapter fit which modules of a model, and what they come to there."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import make_engine, naive_sample, request, run, tiny_model
from tiny_adapters import quantized
from tiny_architectures import tiny_architecture

from runner.adapter_weights import AdapterWeights
from runner.engine.lora import HEAD, fitted
from runner.errors import AdapterError
from runner.models.adapters import adapter_from_arrays

MODEL = tiny_model()
Q = "model.layers.0.self_attn.q_proj"


def arrays(path: str, *shapes: tuple[int, ...], seed: int = 0) -> dict[str, mx.array]:
    """Random tensors by mlx-lm's names: a, b and maybe a magnitude."""
    random = np.random.default_rng(seed)
    names = (f"{path}.lora_a", f"{path}.lora_b", f"{path}.m")
    drawn = [0.2 + 0.3 * random.standard_normal(shape) for shape in shapes]
    return {name: mx.array(it.astype(np.float32)) for name, it in zip(names, drawn, strict=False)}


def weights(*given: dict[str, mx.array], scale: float = 2.0) -> AdapterWeights:
    merged = {name: array for one in given for name, array in one.items()}
    return adapter_from_arrays(merged, scale=scale)


def fit(model: Any, *given: dict[str, mx.array]) -> Any:
    return fitted(dict(model.named_modules()), weights(*given))


def test_a_module_is_found_by_the_end_of_its_path():
    """An adapter of a language model serves the model that it is a part of."""
    modules = {f"language_model.{name}": it for name, it in MODEL.named_modules()}
    found = fitted(modules, weights(arrays(Q, (32, 4), (4, 32))))
    assert list(found) == [f"language_model.{Q}"]


def test_an_end_that_several_modules_have_names_none():
    with pytest.raises(AdapterError, match="self_attn.q_proj.lora_a is for a module that this"):
        fit(MODEL, arrays("self_attn.q_proj", (32, 4), (4, 32)))


def test_the_end_of_a_name_is_no_end_of_a_path():
    with pytest.raises(AdapterError, match="proj.lora_a is for a module that this model does not"):
        fit(MODEL, arrays("proj", (32, 4), (4, 32)))


def test_two_tensors_for_one_module_are_refused():
    """Each by a name of its own, which the file may hold side by side."""
    short = Q.removeprefix("model.")
    with pytest.raises(AdapterError, match=f"two tensors are for the module {Q}"):
        fit(MODEL, arrays(Q, (32, 4), (4, 32)), arrays(short, (32, 4), (4, 32)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_packed_weight_has_the_width_of_what_is_packed(bits):
    found = fit(quantized(MODEL, bits=bits), arrays(Q, (32, 4), (4, 32)))
    assert found[Q].a.shape == (32, 4) and found[Q].b.shape == (4, 32)
    narrow = 32 * bits // 32
    with pytest.raises(AdapterError, match=rf"has the shape \({narrow}, 4\), .* needs \(32, 4\)"):
        fit(quantized(MODEL, bits=bits), arrays(Q, (narrow, 4), (4, 32)))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((31, 4), (4, 32)), r"lora_a has the shape \(31, 4\), where this model needs \(32, 4\)"),
        (((32, 4), (4, 31)), r"lora_b has the shape \(4, 31\), where this model needs \(4, 32\)"),
        (((32, 4), (5, 32)), r"lora_b has the shape \(5, 32\), where this model needs \(4, 32\)"),
        (((32, 4), (4, 32), (31,)), r"q_proj.m has the shape \(31,\), where .* needs \(32,\)"),
    ],
)
def test_a_tensor_of_another_shape_is_named_with_what_is_needed(shapes, message):
    with pytest.raises(AdapterError, match=message):
        fit(MODEL, arrays(Q, *shapes))


@pytest.mark.parametrize("place", ["model.embed_tokens", "lm_head"])
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_an_embedding_and_its_head_are_checked_too(place, wrong):
    shapes = [(97, 4), (4, 32), (97,)] if place != "lm_head" else [(32, 4), (4, 97), (97,)]
    assert fit(MODEL, arrays(place, *shapes))
    shapes[wrong] = tuple(size + (size != 4) for size in shapes[wrong])
    with pytest.raises(AdapterError, match=f"{place}.*has the shape"):
        fit(MODEL, arrays(place, *shapes))


def test_a_tied_head_of_an_embedding_is_its_transpose_with_the_same_gain():
    found = fit(MODEL, arrays("model.embed_tokens", (97, 4), (4, 32), (97,)))
    own, head = found["model.embed_tokens"], found[f"model.embed_tokens{HEAD}"]
    assert mx.allclose(head.a @ head.b, (own.a @ own.b).T, atol=1e-6)
    assert mx.array_equal(head.gain, own.gain)


def test_peft_s_embedding_leaves_the_head_alone():
    given = weights(arrays("model.embed_tokens", (97, 4), (4, 32)))
    targets = {path: replace(low, ties_head=False) for path, low in given.targets.items()}
    found = fitted(dict(MODEL.named_modules()), replace(given, targets=targets))
    assert list(found) == ["model.embed_tokens"]


def test_dora_on_a_tied_head_is_dora_on_a_head_of_its_own():
    given = weights(arrays("lm_head", (32, 4), (4, 97), (97,), seed=3))
    untied = tiny_model(tie_word_embeddings=False)
    untied.update(MODEL.parameters())
    low = given.targets["lm_head"]
    adapted = MODEL.model.embed_tokens.weight + 2.0 * (low.a @ low.b).T
    norms = mx.linalg.norm(adapted, axis=1)
    untied.lm_head.weight = (low.magnitude / norms)[:, None] * adapted
    engine = make_engine(MODEL)
    engine.load_adapter("a", given)
    asked = request([7, 31, 5], adapter="a", ignore_eos=True)
    done = run(engine, [asked])["r", 0]
    expected = naive_sample(untied, asked, 0)
    assert done.token_ids == expected.token_ids
    np.testing.assert_allclose(done.raw_logprobs, expected.raw_logprobs, atol=1e-4)


def test_a_layer_of_experts_takes_one_pair_for_each_and_no_magnitude():
    model = tiny_architecture("mixtral")
    path, experts = next(
        (name, it) for name, it in model.named_modules() if name.endswith("switch_mlp.up_proj")
    )
    count, num_out, num_in = experts.weight.shape
    assert path in fit(model, arrays(path, (count, 3, num_in), (count, num_out, 3)))
    with pytest.raises(AdapterError, match=rf"up_proj.lora_a has the shape \({count + 1}, 3,"):
        fit(model, arrays(path, (count + 1, 3, num_in), (count, num_out, 3)))
    with pytest.raises(AdapterError, match="up_proj.lora_b has the shape"):
        fit(model, arrays(path, (count, 3, num_in), (count, 3, num_out)))
    with pytest.raises(AdapterError, match="up_proj.m is of DoRA, which a layer of experts"):
        fit(model, arrays(path, (count, 3, num_in), (count, num_out, 3), (num_out,)))


def test_a_norm_takes_no_adapter():
    with pytest.raises(AdapterError, match="norm.lora_a is for a RMSNorm, which takes no adapter"):
        fit(MODEL, arrays("model.norm", (32, 4), (4, 32)))


def test_the_scale_is_in_one_of_the_factors_and_the_arrays_of_the_caller_stay():
    given = arrays(Q, (32, 4), (4, 32))
    before = {name: np.array(array) for name, array in given.items()}
    found = fitted(dict(MODEL.named_modules()), weights(given, scale=3.0))[Q]
    product = before[f"{Q}.lora_a"] @ before[f"{Q}.lora_b"]
    np.testing.assert_allclose(found.a @ found.b, 3 * product, rtol=1e-5)
    for name, array in given.items():
        np.testing.assert_array_equal(array, before[name])


def test_the_factors_are_float32_whatever_the_file_has():
    half = {name: array.astype(mx.bfloat16) for name, array in arrays(Q, (32, 4), (4, 32)).items()}
    assert {array.dtype for array in fit(MODEL, half)[Q].arrays} == {mx.float32}
