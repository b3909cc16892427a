"""What the options of PEFT and mlx-lm say of an adapter's tensors, read from directories."""

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from runner.errors import AdapterError, ParameterError
from runner.models.adapters import (
    CONFIG_FILE,
    MLX_FILE,
    PEFT_FILE,
    adapter_from_arrays,
    adapter_weights,
    read_adapter,
)

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBEDDING = "model.embed_tokens"


def drawn(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(1).standard_normal(shape).astype(np.float32))


def peft(path: str, rank: int = 4) -> dict[str, mx.array]:
    prefix = f"base_model.model.{path}"
    return {f"{prefix}.lora_A.weight": drawn(rank, 8), f"{prefix}.lora_B.weight": drawn(6, rank)}


def embedding() -> dict[str, mx.array]:
    prefix = f"base_model.model.{EMBEDDING}"
    return {f"{prefix}.lora_embedding_A": drawn(4, 9), f"{prefix}.lora_embedding_B": drawn(8, 4)}


def save(directory: Path, tensors: dict[str, mx.array], **config: Any) -> Path:
    mx.save_safetensors(str(directory / PEFT_FILE), tensors)
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"} | config
    (directory / CONFIG_FILE).write_text(json.dumps(given))
    return directory


def scales(directory: Path) -> dict[str, float]:
    return {path: low.scale for path, low in read_adapter(directory).targets.items()}


@pytest.mark.parametrize(
    ("pattern", "changed"),
    [
        ("q_proj", {Q}),
        (Q, {Q}),
        (r"layers\.\d+\..*_proj", {Q, DOWN}),
        (r".*down_proj|.*q_proj", {Q, DOWN}),
        ("proj", set()),  # A part of a path is from dot to dot,
        ("layers.1.mlp", set()),  # and what is named is its end.
        ("layers.1", set()),
    ],
)
def test_a_pattern_is_for_the_modules_whose_path_ends_with_it(tmp_path, pattern, changed):
    found = scales(save(tmp_path, peft(Q) | peft(DOWN), alpha_pattern={pattern: 20}))
    assert found == {path: 20 / 4 if path in changed else 8 / 4 for path in (Q, DOWN)}


def test_of_two_patterns_the_first_counts(tmp_path):
    both = {"q_proj": 20, "self_attn.q_proj": 12}
    assert scales(save(tmp_path, peft(Q), alpha_pattern=both)) == {Q: 5.0}


def test_the_scale_is_by_the_rank_that_the_module_has(tmp_path):
    given = {"rank_pattern": {"down_proj": 9}, "use_rslora": True}
    found = scales(save(tmp_path, peft(Q) | peft(DOWN, rank=9), **given))
    assert found == {Q: 8 / math.sqrt(4), DOWN: pytest.approx(8 / 3)}


def test_null_patterns_are_none(tmp_path):
    given = {"rank_pattern": None, "alpha_pattern": None}
    assert scales(save(tmp_path, peft(Q), **given)) == {Q: 2.0}


@pytest.mark.parametrize(
    "name",
    [
        "modules_to_save", "layer_replication", "use_qalora", "trainable_token_indices",
        "target_parameters", "alora_invocation_tokens", "lora_bias", "use_bdlora", "arrow_config",
        "kasa_config",
    ],
)  # fmt: skip
def test_what_makes_it_more_than_low_rank_products_is_refused_where_it_is_on(tmp_path, name):
    with pytest.raises(AdapterError, match=f"{name}=True is not covered"):
        read_adapter(save(tmp_path, peft(Q), **{name: True}))
    for nothing in (None, False, []):
        assert read_adapter(save(tmp_path, peft(Q), **{name: nothing})).targets


def test_dora_of_a_layer_that_stands_the_other_way_is_refused(tmp_path):
    given = {"use_dora": True, "fan_in_fan_out": True}
    with pytest.raises(AdapterError, match="fan_in_fan_out=true is not covered with use_dora"):
        read_adapter(save(tmp_path, peft(Q), **given))
    assert read_adapter(save(tmp_path, peft(Q), fan_in_fan_out=True)).targets


@pytest.mark.parametrize("name", [".lora_magnitude_vector", ".lora_magnitude_vector.weight"])
def test_a_magnitude_has_either_of_its_names(tmp_path, name):
    tensors = peft(Q) | {f"base_model.model.{Q}{name}": drawn(6)}
    low = read_adapter(save(tmp_path, tensors, use_dora=True)).targets[Q]
    assert low.magnitude.shape == (6,)
    with pytest.raises(AdapterError, match="magnitude_vector.* is of DoRA, but the config says"):
        read_adapter(save(tmp_path, tensors, use_dora=False))


def test_dora_of_an_embedding_is_refused(tmp_path):
    tensors = embedding() | {f"base_model.model.{EMBEDDING}.lora_magnitude_vector": drawn(9)}
    with pytest.raises(AdapterError, match="lora_magnitude_vector is of an embedding, not covered"):
        read_adapter(save(tmp_path, tensors, use_dora=True))


def test_an_embedding_of_peft_is_one_alone_and_of_mlx_lm_its_head_too(tmp_path):
    """The same tensors, then, are two different adapters."""
    directory = read_adapter(save(tmp_path, embedding()))
    arrays = adapter_from_arrays(embedding(), scale=2.0)
    assert (directory.targets[EMBEDDING].ties_head, arrays.targets[EMBEDDING].ties_head) == (
        False, True,
    )  # fmt: skip
    assert directory.targets[EMBEDDING].scale == arrays.targets[EMBEDDING].scale
    assert directory.digest != arrays.digest


def test_peft_s_tensors_are_transposed_and_mlx_lm_s_are_not():
    given = peft(Q)
    low = adapter_from_arrays(given, scale=1.0).targets[Q]
    assert mx.array_equal(low.a, given[f"base_model.model.{Q}.lora_A.weight"].T)
    assert mx.array_equal(low.b, given[f"base_model.model.{Q}.lora_B.weight"].T)
    low = adapter_from_arrays({f"{Q}.lora_a": drawn(8, 4), f"{Q}.lora_b": drawn(4, 6)}, scale=1.0)
    assert low.targets[Q].a.shape == (8, 4) and low.targets[Q].b.shape == (4, 6)


def test_the_digest_tells_types_shapes_and_places_apart():
    def digest(**changes: Any) -> str:
        arrays = {f"{Q}.lora_a": drawn(8, 4), f"{Q}.lora_b": drawn(4, 6)} | changes
        return adapter_from_arrays(arrays, scale=1.0).digest

    a, b = mx.zeros((8, 4)), mx.zeros((4, 6))
    found = [
        digest(**{f"{Q}.lora_a": a, f"{Q}.lora_b": b}),
        digest(**{f"{Q}.lora_a": a.astype(mx.float16), f"{Q}.lora_b": b}),
        digest(**{f"{Q}.lora_a": a.astype(mx.bfloat16), f"{Q}.lora_b": b}),
        digest(**{f"{Q}.lora_a": mx.zeros((4, 8)), f"{Q}.lora_b": b}),
    ]
    assert len(set(found)) == 4
    assert (
        adapter_from_arrays({f"{DOWN}.lora_a": a, f"{DOWN}.lora_b": b}, scale=1.0).digest
        != (found[0])
    )


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "true", '"2"', "null", "[2]"])
def test_a_scale_that_is_no_number_is_refused(tmp_path, scale):
    arrays = {f"{Q}.lora_a": drawn(8, 4), f"{Q}.lora_b": drawn(4, 6)}
    mx.save_safetensors(str(tmp_path / MLX_FILE), arrays)
    (tmp_path / CONFIG_FILE).write_text(f'{{"lora_parameters": {{"rank": 4, "scale": {scale}}}}}')
    with pytest.raises(AdapterError, match=r"lora_parameters.scale=.* is not allowed: a number"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("config", ["[]", '"lora"', "3"])
def test_a_config_that_is_no_mapping_is_refused(tmp_path, config):
    save(tmp_path, peft(Q))
    (tmp_path / CONFIG_FILE).write_text(config)
    with pytest.raises(AdapterError, match=f"{CONFIG_FILE}' is not a mapping of options"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "given",
    [(None, None, None), ("here", {}, None), ("here", None, 2.0), (None, {}, None),
     (None, None, 1.0), ("here", {}, 1.0)],
)  # fmt: skip
def test_an_adapter_is_a_path_or_arrays_with_their_scale(given):
    with pytest.raises(ParameterError, match="takes a path, or arrays with their scale"):
        adapter_weights(*given)
