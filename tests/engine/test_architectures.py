import pkgutil
from pathlib import Path

import mlx_lm.models
import pytest
import which_models
from alone import assert_batched_equals_alone, assert_embedded_alike
from tiny_architectures import NOT_TRIED, architectures, tiny_architecture

from runner.engine.layer_kinds import REFUSED, layer_kinds
from runner.errors import ModelError

README = Path(__file__).parents[2] / "README.md"

YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale_all_dim": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONGROPE = {
    "rope_type": "longrope",
    "type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 8,
}
OPTIONS = [
    ("deepseek_v2", {"rope_scaling": YARN, "q_lora_rank": None}),
    ("deepseek_v3", {"rope_scaling": YARN, "n_group": 2, "n_routed_experts": 8}),
    ("falcon_h1", {"mamba_rms_norm": True, "mamba_n_groups": 2}),
    ("gemma2", {"num_key_value_heads": 4}),
    ("gemma4_text", {"enable_moe_block": True, "top_k_experts": 2}),
    ("gpt_oss", {"rope_scaling": YARN}),
    ("granitemoehybrid", {"num_local_experts": None, "position_embedding_type": "nope"}),
    ("lfm2", {"conv_bias": False, "conv_L_cache": 4}),
    ("llama", {"layer_types": None, "rope_scaling": LLAMA3}),
    ("mamba", {"use_bcdt_rms": True}),
    ("mamba2", {"num_heads": 8, "n_groups": 2}),
    ("nemotron_h", {"layer_types": None, "hybrid_override_pattern": list("M*M-E")}),
    ("phi3", {"rope_scaling": LONGROPE, "partial_rotary_factor": 1.0}),
    ("qwen3_moe", {"mlp_only_layers": [1], "rope_scaling": YARN}),
]
"""Options that published models set and the tiny ones do not."""

WITHOUT_EMBEDDINGS = {"talkie"}
"""Modules whose projection onto the vocabulary is no linear layer."""


@pytest.mark.parametrize("name", which_models.held())
def test_batched_equals_alone(name):
    model = tiny_architecture(name)
    assert_batched_equals_alone(model)
    if name in WITHOUT_EMBEDDINGS:
        with pytest.raises(ModelError, match="gives no embeddings"):
            assert_embedded_alike(model)
    else:
        assert_embedded_alike(model)


@pytest.mark.parametrize(("name", "changes"), OPTIONS)
def test_batched_equals_alone_with_other_options(name, changes):
    assert_batched_equals_alone(tiny_architecture(name, **changes))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_would_be_wrong_is_refused_with_the_reason(name):
    assert name in architectures()
    with pytest.raises(ModelError, match=f"{name}.*{REFUSED[name]}"):
        layer_kinds(tiny_architecture(name))


def test_what_is_not_tried_is_there():
    found = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    assert found >= NOT_TRIED.keys()


def test_the_table_in_the_readme_is_this_one():
    assert which_models.render() in README.read_text(), "print it: python tests/which_models.py"
