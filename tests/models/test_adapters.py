"""Adapter files of mlx-lm and PEFT: what they come to, and what is refused by name."""

import json

import mlx.core as mx
import numpy as np
import pytest
from tiny import assert_same, make_engine, naive_sample, request, run, tiny_model
from tiny_adapters import (
    ATTENTION,
    MLP,
    adapter_tensors,
    loaded_by_mlx_lm,
    merged,
    quantized,
    random_adapter,
    save_mlx,
    shifted,
)

from runner.errors import AdapterError
from runner.models.adapters import (
    CONFIG_FILE,
    MLX_FILE,
    PEFT_FILE,
    adapter_from_arrays,
    read_adapter,
)

MODEL = tiny_model()
UNTIED = tiny_model(tie_word_embeddings=False)


def answers(model, weights):
    engine = make_engine(model)
    engine.load_adapter("a", weights)
    r = request([7, 31, 5, 64], "r", adapter="a", ignore_eos=True, temperature=1.0)
    return r, run(engine, [r])["r", 0]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("model", "keys"),
    [
        (MODEL, ATTENTION + MLP),
        (MODEL, ("model.embed_tokens", "self_attn.q_proj")),
        (UNTIED, ("lm_head", "mlp.down_proj")),
        (quantized(MODEL), ATTENTION),
    ],
    ids=["linear", "embedding", "head", "quantised"],
)
def test_a_directory_of_mlx_lm_equals_its_own_loading(tmp_path, model, keys, dora):
    _, adapted = random_adapter(model, 5, rank=8, dora=dora, keys=keys)
    directory = save_mlx(tmp_path / "adapter", adapted, rank=8, dora=dora, keys=keys)
    theirs = loaded_by_mlx_lm(model, directory)
    r, ours = answers(model, read_adapter(directory))
    assert_same(ours, naive_sample(theirs, r, 0))
    assert_same(ours, naive_sample(merged(theirs), r, 0))
    with pytest.raises(AssertionError):
        assert_same(ours, naive_sample(model, r, 0))


def save_peft(directory, tensors, **config):
    """Tensors by the path of the module: (A (r, in), B (out, r)) and maybe a magnitude."""
    named = {}
    for path, (a, b, *magnitude) in tensors.items():
        prefix = f"base_model.model.{path}"
        named |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        for it in magnitude:
            named[f"{prefix}.lora_magnitude_vector"] = it
    directory.mkdir(exist_ok=True)
    mx.save_safetensors(str(directory / PEFT_FILE), named)
    given = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none"} | config
    (directory / CONFIG_FILE).write_text(json.dumps(given))
    return directory


def peft_tensors(paths, rank=4, dora=False, model=MODEL):
    random = np.random.default_rng(3)
    modules = dict(model.named_modules())
    found = {}
    for path in paths:
        num_out, num_in = modules[path].weight.shape
        a, b = random.standard_normal((rank, num_in)), random.standard_normal((num_out, rank))
        pair = [mx.array((0.2 * it).astype(np.float32)) for it in (a, b)]
        norms = random.uniform(0.5, 2, num_out).astype(np.float32)
        found[path] = [*pair, mx.array(norms)] if dora else pair
    return found


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def fused_by_hand(tensors, scales, model=MODEL):
    """The formulas of the papers, spelled out on the weights."""
    changed = tiny_model()
    changed.update(model.parameters())
    for path, (a, b, *magnitude) in tensors.items():
        module = dict(changed.named_modules())[path]
        weight = np.array(module.weight, np.float64) + scales[path] * (np.array(b) @ np.array(a))
        if magnitude:
            norm = np.linalg.norm(weight, axis=1, keepdims=True)
            weight = np.array(magnitude[0])[:, None] * weight / norm
        module.weight = mx.array(weight.astype(np.float32))
    return changed


@pytest.mark.parametrize(
    ("config", "scales", "dora"),
    [
        ({}, {Q: 6 / 4, DOWN: 6 / 4}, False),
        ({"use_rslora": True}, {Q: 6 / 2, DOWN: 6 / 2}, False),
        ({"alpha_pattern": {"layers.0.*q_proj": 12}}, {Q: 12 / 4, DOWN: 6 / 4}, False),
        ({"use_dora": True}, {Q: 6 / 4, DOWN: 6 / 4}, True),
    ],
    ids=["lora", "rslora", "alpha_pattern", "dora"],
)
def test_a_directory_of_peft_equals_its_formulas(tmp_path, config, scales, dora):
    tensors = peft_tensors([Q, DOWN], dora=dora)
    weights = read_adapter(save_peft(tmp_path / "adapter", tensors, **config))
    r, ours = answers(MODEL, weights)
    assert_same(ours, naive_sample(fused_by_hand(tensors, scales), r, 0))


def test_ranks_may_differ_as_the_pattern_says(tmp_path):
    tensors = peft_tensors([Q]) | peft_tensors([DOWN], rank=7)
    directory = save_peft(tmp_path / "a", tensors, rank_pattern={"down_proj": 7})
    r, ours = answers(MODEL, read_adapter(directory))
    scales = {Q: 6 / 4, DOWN: 6 / 7}
    assert_same(ours, naive_sample(fused_by_hand(tensors, scales), r, 0))
    save_peft(tmp_path / "a", tensors)
    with pytest.raises(AdapterError, match="down_proj.lora_A.weight has the rank 7; .* says 4"):
        read_adapter(directory)


def test_the_head_alone_may_be_adapted_where_it_is_tied(tmp_path):
    """PEFT's lm_head is a layer of its own, also where it has the embedding's weights."""
    tensors = peft_tensors(["lm_head"], model=UNTIED)
    weights = read_adapter(save_peft(tmp_path / "a", tensors))
    r, ours = answers(MODEL, weights)
    untied = tiny_model(tie_word_embeddings=False)
    untied.update(MODEL.parameters())
    untied.lm_head.weight = MODEL.model.embed_tokens.weight
    a, b = tensors["lm_head"]
    untied.lm_head.weight = untied.lm_head.weight + 6 / 4 * (b @ a)
    assert_same(ours, naive_sample(untied, r, 0))


def test_the_digest_names_the_content():
    _, adapted = random_adapter(MODEL, 5)
    tensors = adapter_tensors(adapted)
    digest = adapter_from_arrays(tensors, scale=2.0).digest
    assert adapter_from_arrays(dict(reversed(tensors.items())), scale=2.0).digest == digest
    assert adapter_from_arrays(tensors, scale=1.0).digest != digest
    name = next(iter(tensors))
    changed = tensors | {name: tensors[name] + 1e-3}
    assert adapter_from_arrays(changed, scale=2.0).digest != digest


def test_what_the_caller_writes_later_does_not_reach_the_adapter():
    _, adapted = random_adapter(MODEL, 5)
    tensors = adapter_tensors(adapted)
    weights = adapter_from_arrays(tensors, scale=2.0)
    r, before = answers(MODEL, weights)
    for array in tensors.values():
        array[:] = 7.0
    assert_same(answers(MODEL, weights)[1], before)


def test_what_is_damaged_or_missing_is_refused_by_name(tmp_path):
    _, adapted = random_adapter(MODEL, 5)
    directory = save_mlx(tmp_path / "a", adapted, rank=4, keys=ATTENTION + MLP)
    with pytest.raises(AdapterError, match="'nowhere' is no directory: .*adapters.safetensors"):
        read_adapter("nowhere")
    with pytest.raises(AdapterError, match="has no adapter: .*adapter_model.safetensors"):
        read_adapter(tmp_path)
    file, config = directory / MLX_FILE, directory / CONFIG_FILE
    whole, options = file.read_bytes(), json.loads(config.read_text())
    for size in (3, 200, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(AdapterError, match="adapters.safetensors' cannot be read"):
            read_adapter(directory)
    file.write_bytes(whole)
    config.write_text("{")
    with pytest.raises(AdapterError, match="adapter_config.json' cannot be read"):
        read_adapter(directory)
    for changes, what in (
        ({"fine_tune_type": "full"}, "fine_tune_type='full' is not covered"),
        ({"lora_parameters": {"scale": 2.0, "rank": 0}}, "rank=0 is not allowed: at least 1"),
        ({"lora_parameters": {"scale": 2.0, "rank": 5}}, "lora_a has the rank 4; .* says 5"),
        ({"lora_parameters": {"rank": 4}}, "scale=None is not allowed: a number"),
        ({"fine_tune_type": "dora"}, "has no tensor magnitude beside it"),
    ):
        config.write_text(json.dumps(options | changes))
        with pytest.raises(AdapterError, match=what):
            read_adapter(directory)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' is not covered: LORA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*lm_head.* is not covered"),
        ({"bias": "all"}, "bias='all' is not covered"),
        ({"r": 0}, "r=0 is not allowed: at least 1"),
        ({"lora_alpha": "x"}, "lora_alpha='x' is not allowed"),
        ({"use_dora": True}, "has no tensor magnitude beside it"),
    ],
)
def test_what_peft_can_do_besides_is_refused_by_name(tmp_path, config, what):
    with pytest.raises(AdapterError, match=what):
        read_adapter(save_peft(tmp_path / "a", peft_tensors([Q]), **config))


def test_tensors_that_are_no_adapters_are_refused_by_name():
    _, adapted = random_adapter(MODEL, 5, keys=("self_attn.q_proj",))
    tensors = adapter_tensors(adapted)
    a, b = f"{Q}.lora_a", f"{Q}.lora_b"
    infinite = mx.where(mx.arange(128).reshape(32, 4) == 77, mx.inf, tensors[a])
    for changes, what in (
        ({f"{Q}.weight": tensors[a]}, "q_proj.weight is no tensor of LoRA or DoRA"),
        ({a: tensors[a] * mx.nan}, "q_proj.lora_a holds values that are not numbers"),
        ({a: infinite}, "q_proj.lora_a holds values that are not numbers"),
        ({a: mx.zeros((32, 4), mx.int32)}, "lora_a is .*int32 of shape"),
        ({a: tensors[a][:, :0], b: tensors[b][:0]}, "q_proj.lora_a has the rank 0"),
        ({f"{Q}.lora_A.weight": tensors[a].T}, "are for the same module"),
    ):
        with pytest.raises(AdapterError, match=what):
            adapter_from_arrays(tensors | changes, scale=1.0)
    with pytest.raises(AdapterError, match="has no tensor b beside it"):
        adapter_from_arrays({a: tensors[a]}, scale=1.0)
    with pytest.raises(AdapterError, match="the adapter has no tensors"):
        adapter_from_arrays({}, scale=1.0)
    large = adapter_from_arrays(shifted(tensors, 1e18), scale=1.0)
    assert large.digest, "a sum of squares that overflows is no infinity among the values"
