"""The trainer: its loss against the formula, its updates against what they are to change."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from tiny_training import experiences, logprobs, trainer

from runner.errors import ParameterError
from runner.training.grpo import GRPOTrainer, LoraShape, Objective


def merged(model_seed: int, one: GRPOTrainer) -> Any:
    """A model of its own with the adapter in its weights."""
    model = tiny.tiny_model(model_seed)
    weights = dict(tree_flatten(model.parameters()))
    arrays = one.arrays
    for name in [it.removesuffix(".lora_a") for it in arrays if it.endswith(".lora_a")]:
        product = arrays[f"{name}.lora_a"] @ arrays[f"{name}.lora_b"]
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + one.shape.scale * product.T
    model.load_weights(list(weights.items()))
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_update_has_ratios_of_one(temperature):
    model = tiny.tiny_model()
    one = trainer(model, Objective(temperature=temperature))
    stats = one.update(experiences(model, temperature=temperature))
    assert stats.ratio_deviation < 1e-4
    assert stats.clipped_share == 0
    assert stats.num_tokens == sum(range(2, 8))


def test_the_loss_is_that_of_the_papers():
    model, other = tiny.tiny_model(0), tiny.tiny_model(1)
    objective = Objective(temperature=0.8, clip_epsilon=0.1, kl_coefficient=0.3)
    given = [
        it.with_reference(
            logprobs(other, list(it.prompt_token_ids), list(it.completion_token_ids), 0.8).tolist()
        )
        for it in experiences(other, temperature=0.8)
    ]
    surrogate, divergence, clipped, most = 0.0, 0.0, 0, 0.0
    for it in given:
        now = logprobs(model, list(it.prompt_token_ids), list(it.completion_token_ids), 0.8)
        ratio = np.exp(now - np.array(it.behaviour_logprobs))
        bounded = np.clip(ratio, 0.9, 1.1)
        surrogate += np.minimum(ratio * it.advantage, bounded * it.advantage).sum()
        back = np.array(it.reference_logprobs) - now
        divergence += (np.exp(back) - back - 1).sum()
        clipped += int((ratio != bounded).sum())
        most = max(most, np.abs(ratio - 1).max())
    total = sum(len(it.completion_token_ids) for it in given)
    stats = trainer(model, objective).update(given)
    assert stats.loss == pytest.approx((0.3 * divergence - surrogate) / total, rel=1e-4)
    assert stats.kl == pytest.approx(divergence / total, rel=1e-4)
    assert stats.clipped_share == pytest.approx(clipped / total)
    assert stats.ratio_deviation == pytest.approx(most, rel=1e-3)


def test_what_was_good_becomes_likelier_and_the_rest_less():
    model = tiny.tiny_model()
    given, one = experiences(model), trainer(model)
    for _ in range(4):
        one.update(given)
    after = merged(0, one)
    changes: dict[bool, list[float]] = {True: [], False: []}
    for it in given:
        now = logprobs(after, list(it.prompt_token_ids), list(it.completion_token_ids), 1.0)
        changes[it.advantage > 0].append(now.sum() - np.sum(it.behaviour_logprobs))
    assert min(changes[True]) > 0
    assert np.mean(changes[True]) > np.mean(changes[False]) + 1


def test_the_model_that_samples_is_not_touched():
    model = tiny.tiny_model()
    before = {name: np.array(array) for name, array in tree_flatten(model.parameters())}
    structure = str(model)
    trainer(model).update(experiences(model))
    assert str(model) == structure
    for name, array in tree_flatten(model.parameters()):
        np.testing.assert_array_equal(array, before[name])


def test_a_few_at_a_time_give_the_update_of_all_together():
    model = tiny.tiny_model()
    given = experiences(model)
    whole, parts = (trainer(model, micro_batch_size=size) for size in (16, 1))
    losses = [one.update(given).loss for one in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, array in whole.arrays.items():
        np.testing.assert_allclose(array, parts.arrays[name], atol=1e-4)


def test_the_seed_decides_where_it_starts():
    model = tiny.tiny_model()
    mx.random.seed(7)
    one, other = trainer(model), trainer(model)
    assert all(mx.array_equal(a, other.arrays[name]) for name, a in one.arrays.items())
    different = trainer(model, seed=2).arrays
    assert not all(mx.array_equal(a, different[name]) for name, a in one.arrays.items())


def test_a_restored_trainer_goes_on_as_the_one_before():
    model = tiny.tiny_model()
    given, one = experiences(model), trainer(model)
    one.update(given)
    arrays, state = dict(one.arrays), dict(one.state)
    other = trainer(model, seed=9)
    other.restore(arrays, state)
    assert one.update(given) == other.update(given)
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, other.arrays[name])


def test_only_the_last_layers_where_so_said():
    names = trainer(tiny.tiny_model(), num_layers=1).arrays
    assert names and all(name.startswith("model.layers.1.") for name in names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraShape(rank=0), "job.rank=0"),
        (lambda: LoraShape(num_layers=0), "job.num_layers=0"),
        (lambda: Objective(temperature=1.0, clip_epsilon=1.5), "job.clip_epsilon=1.5"),
        (lambda: Objective(temperature=1.0, kl_coefficient=-1), "job.kl_coefficient=-1"),
        (lambda: trainer(tiny.tiny_model(), learning_rate=0), "job.learning_rate=0"),
        (lambda: trainer(tiny.tiny_model(), micro_batch_size=0), "job.micro_batch_size=0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ParameterError, match=message):
        make()


def test_names_of_no_module_are_refused():
    shape = LoraShape(keys=["attention.q"])
    with pytest.raises(ParameterError, match="no module has such a name"):
        GRPOTrainer(tiny.tiny_model(), shape, Objective(temperature=1.0), learning_rate=1e-3)


def test_only_the_modules_that_are_named():
    shape = LoraShape(rank=3, keys=["self_attn.v_proj", "mlp.up_proj"], num_layers=1)
    one = GRPOTrainer(tiny.tiny_model(), shape, Objective(temperature=1.0), learning_rate=1e-3)
    names = {"self_attn.v_proj", "mlp.up_proj"}
    parts = {f"model.layers.1.{name}.lora_{part}" for name in names for part in "ab"}
    assert one.arrays.keys() == parts
    assert {array.shape[array.shape.index(3)] for array in one.arrays.values()} == {3}


def test_more_layers_than_the_model_has_are_refused():
    assert trainer(tiny.tiny_model(), num_layers=2).arrays
    with pytest.raises(ParameterError, match="job.num_layers=3 is not allowed: the model has 2"):
        trainer(tiny.tiny_model(), num_layers=3)


def test_the_largest_deviation_is_that_of_any_part():
    """Completions are taken by length: the one that is off may come first or last."""
    model = tiny.tiny_model()
    for place in (0, -1):
        given = experiences(model)
        it = given[place]
        off = [it.behaviour_logprobs[0] - 0.7, *it.behaviour_logprobs[1:]]
        given[place] = replace(it, behaviour_logprobs=off)
        stats = trainer(model, micro_batch_size=1).update(given)
        assert stats.ratio_deviation == pytest.approx(np.exp(0.7) - 1, rel=1e-3)
        assert stats.clipped_share == pytest.approx(1 / stats.num_tokens)


def test_it_starts_from_an_adapter_that_changes_nothing():
    """One factor is drawn, the other is zero."""
    arrays = trainer(tiny.tiny_model()).arrays
    for name, array in arrays.items():
        if name.endswith("lora_b"):
            assert not mx.any(array)
        else:
            bound = 1 / np.sqrt(array.shape[0])
            assert 0.8 * bound < mx.abs(array).max().item() <= bound


def test_prompts_and_pads_are_not_learned_from():
    """The same completion, behind which others are longer, gives the same update."""
    model = tiny.tiny_model()
    short, *_, long = experiences(model)
    silent = replace(long, advantage=0.0)
    alone, padded = trainer(model), trainer(model)
    total = len(short.completion_token_ids) + len(long.completion_token_ids)
    losses = [alone.update([short]).loss * len(short.completion_token_ids)]
    losses.append(padded.update([short, silent]).loss * total)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_an_experience_without_advantage_changes_nothing():
    model = tiny.tiny_model()
    one = trainer(model)
    before = {name: np.array(array) for name, array in one.arrays.items()}
    one.update([replace(it, advantage=0.0) for it in experiences(model)])
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, before[name])
