"""Other weights for a model that is running: checked whole, exchanged between two steps."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from tiny_adapters import ATTENTION, adapter_tensors, copied, random_adapter

from runner import LLM, SamplingParams
from runner.errors import ModelError

PROMPT = {"prompt_token_ids": [104, 101, 108, 108, 111] * 6}
PARAMS = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, seed=0)


@pytest.fixture
def llm(tiny_directory):
    return LLM(tiny_directory)


def changed(llm, directory, by=0.05, **edits):
    """Weights near the model's own, in two files; `edits` replaces tensors by name."""
    random = mx.random.key(3)
    weights = {
        name: array + by * mx.random.normal(array.shape, key=random)
        for name, array in tree_flatten(llm.model.parameters())
    }
    weights = {k: v for k, v in (weights | edits).items() if v is not None}
    directory.mkdir()
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        file = str(directory / f"model-{number}.safetensors")
        mx.save_safetensors(file, {name: weights[name] for name in part})
    return directory, weights


def said(llm, **options):
    return llm.generate(PROMPT, PARAMS, use_tqdm=False, **options)[0].outputs[0]


def reference(llm, weights):
    model = copied(llm.model)
    model.load_weights(list(weights.items()))
    return model


def raw_logprobs(model, ids):
    logits = model(mx.array([[*PROMPT["prompt_token_ids"], *ids[:-1]]]))[0, -len(ids) :]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [float(logprobs[place, token]) for place, token in enumerate(ids)]


def test_new_weights_serve_and_no_prefix_of_before_is_met(llm, tmp_path):
    before = said(llm)
    directory, weights = changed(llm, tmp_path / "new")
    assert llm.update_weights(directory) == llm.weight_version == 1
    after = said(llm)
    expected = raw_logprobs(reference(llm, weights), after.token_ids)
    assert after.raw_logprobs == pytest.approx(expected, abs=1e-4)
    assert after.raw_logprobs != pytest.approx(before.raw_logprobs, abs=1e-2)
    versions = [
        [(it.version, it.start, it.end) for it in c.weight_versions] for c in (before, after)
    ]
    assert versions == [[(0, 0, 24)], [(1, 0, 24)]]


def test_rows_in_flight_go_on_under_the_new_weights(llm, tmp_path):
    directory, _ = changed(llm, tmp_path / "new")
    short = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, seed=0)
    outputs = llm.as_completed([PROMPT, {"prompt_token_ids": [99, 97]}], [PARAMS, short])
    first = next(outputs)
    llm.update_weights(directory)
    (rest,) = list(outputs)
    assert [len(o.outputs[0].token_ids) for o in (first, rest)] == [3, 24]
    spans = [(it.version, it.start, it.end) for it in rest.outputs[0].weight_versions]
    assert [version for version, _, _ in spans] == [0, 1]
    assert 3 <= spans[0][2] == spans[1][1] < 8 and spans[1][2] == 24


def test_an_adapter_with_magnitudes_is_fitted_to_the_new_weights(llm, tmp_path):
    _, adapted = random_adapter(llm.model, 1, dora=True, keys=ATTENTION)
    llm.load_adapter("a", arrays=adapter_tensors(adapted), scale=2.0)
    said(llm, adapter="a")
    directory, weights = changed(llm, tmp_path / "new")
    llm.update_weights(directory)
    after = said(llm, adapter="a")
    fresh = LLM(llm.loaded)
    assert mx.array_equal(fresh.model.model.norm.weight, weights["model.norm.weight"])
    fresh.load_adapter("a", arrays=adapter_tensors(adapted), scale=2.0)
    assert after.raw_logprobs == pytest.approx(said(fresh, adapter="a").raw_logprobs, abs=1e-4)
    assert [it.version for it in after.weight_versions] == [2]


def test_what_does_not_fit_is_refused_and_the_old_weights_serve_on(llm, tmp_path):
    before = said(llm)
    norm = "model.norm.weight"
    for number, (edit, what) in enumerate(
        [
            ({norm: None}, f"lacks {norm}"),
            ({norm: mx.zeros((3,))}, rf"{norm} has the shape \(3,\), not \(32,\)"),
            ({norm: mx.zeros((32,), mx.int32)}, f"{norm} is mlx.core.int32"),
            ({norm: mx.full((32,), mx.nan)}, f"{norm} holds values that are not numbers"),
            ({"model.other": mx.zeros((2,))}, "has model.other, which this model does not have"),
        ]
    ):
        directory, _ = changed(llm, tmp_path / str(number), **edit)
        with pytest.raises(ModelError, match=what):
            llm.update_weights(directory)
    file = directory / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="model-0.safetensors' cannot be read"):
        llm.update_weights(directory)
    with pytest.raises(ModelError, match="has no safetensors"):
        llm.update_weights(tmp_path)
    assert llm.weight_version == 0 and said(llm).raw_logprobs == before.raw_logprobs
