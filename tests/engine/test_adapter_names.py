"""What the names of adapters stand for, and the weight version, as contents come and go."""

import mlx.core as mx
import pytest
from tiny import tiny_model
from tiny_adapters import ATTENTION, copied, random_adapter

from runner.engine.adapters import Adapters, check_swap_mode
from runner.errors import AdapterError, ParameterError, UnknownAdapterError

MODEL = tiny_model()
FIRST, SECOND = (random_adapter(MODEL, seed, keys=ATTENTION)[0] for seed in range(2))
DORA = random_adapter(MODEL, 2, dora=True, keys=ATTENTION)[0]
WRONG = random_adapter(tiny_model(hidden_size=64), 0, keys=ATTENTION)[0]


@pytest.fixture
def adapters() -> Adapters:
    return Adapters(dict(MODEL.named_modules()))


def test_a_change_is_counted_and_the_same_content_is_none(adapters):
    assert adapters.load("a", FIRST) and adapters.weight_version == 1
    assert not adapters.load("a", FIRST) and adapters.weight_version == 1
    assert adapters.load("b", FIRST) and adapters.weight_version == 2
    assert adapters.load("a", SECOND) and adapters.weight_version == 3
    assert adapters.names == ["a", "b"], "a name keeps its place"
    assert [adapters.digests[name] for name in "ab"] == [SECOND.digest, FIRST.digest]
    assert adapters.get("b").targets is not adapters.get("a").targets


def test_what_is_unloaded_is_gone_and_counted(adapters):
    adapters.load("a", FIRST)
    held = adapters.get("a")
    adapters.unload("a")
    assert adapters.weight_version == 2 and adapters.names == []
    for fails in (adapters.get, adapters.unload):
        with pytest.raises(UnknownAdapterError, match="'a' is not loaded; loaded are: none"):
            fails("a")
    assert adapters.now(held) == (held, 1), "rows that use it go on with what they have"
    assert adapters.load("a", FIRST) and adapters.get("a") is not held
    assert adapters.weight_version == 3


def test_no_name_is_the_model_as_it_is(adapters):
    assert adapters.get(None) is None
    assert adapters.now(None) == (None, 0)


def test_now_is_what_a_name_stands_for_since_then(adapters):
    adapters.load("a", FIRST)
    before = adapters.get("a")
    adapters.load("a", SECOND)
    found, version = adapters.now(before)
    assert found is adapters.get("a") is not before and version == found.version == 2
    assert (before.digest, before.version) == (FIRST.digest, 1), "who holds it still has it"


@pytest.mark.parametrize(("name", "weights"), [("a", WRONG), ("", SECOND)])
def test_what_cannot_be_loaded_changes_nothing(adapters, name, weights):
    adapters.load("a", FIRST)
    before = adapters.get("a")
    with pytest.raises(AdapterError):
        adapters.load(name, weights)
    assert adapters.get("a") is before and adapters.weight_version == 1
    assert adapters.names == ["a"]


def test_new_weights_of_the_model_are_newer_than_any_adapter_of_before(adapters):
    adapters.load("a", FIRST)
    held = adapters.get("a")
    assert adapters.refit([]) == []
    assert adapters.weight_version == adapters.model_version == 2
    assert adapters.version_of(None) == adapters.version_of(held) == 2
    adapters.load("b", SECOND)
    assert adapters.version_of(adapters.get("b")) == 3
    assert adapters.version_of(None) == adapters.version_of(held) == 2


def test_magnitudes_are_fitted_to_the_weights_that_there_are_now():
    """Also those of an adapter that no name stands for, and that rows still use."""
    model = copied(MODEL)
    adapters = Adapters(dict(model.named_modules()))
    adapters.load("gone", DORA)
    gone = adapters.get("gone")
    adapters.unload("gone")
    adapters.load("plain", FIRST)
    adapters.load("dora", DORA)
    plain, dora = adapters.get("plain"), adapters.get("dora")
    before, targets = dora.targets, plain.targets
    path = "model.layers.0.self_attn.q_proj"
    model.model.layers[0].self_attn.q_proj.weight *= 3.0
    changed = adapters.refit([gone, dora, plain])
    assert len(changed) == 2 and {*changed} == {gone, dora}
    assert plain.targets is targets, "LoRA alone does not look at the weights"
    for it in (gone, dora):
        assert not mx.allclose(it.targets[path].gain, before[path].gain)
        other = path.replace("layers.0", "layers.1")
        assert mx.array_equal(it.targets[other].gain, before[other].gain)
    fresh = Adapters(dict(model.named_modules()))
    fresh.load("dora", DORA)
    assert mx.array_equal(fresh.get("dora").targets[path].gain, dora.targets[path].gain)


def test_a_mode_that_is_not_there_is_refused():
    for mode in ("keep", "update"):
        check_swap_mode(mode)
    with pytest.raises(ParameterError, match="mode='' is not allowed: keep, update"):
        check_swap_mode("")
