"""Law 6: an adapter in a mixed batch == alone == merged into the weights."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import assert_same, make_engine, naive_sample, request, run, tiny_model
from tiny_adapters import (
    ATTENTION,
    MLP,
    copied,
    merged,
    quantized,
    random_adapter,
    with_biases,
)
from tiny_architectures import tiny_architecture

from runner.engine.engine import Engine
from runner.engine.lora import Adapter, fitted
from runner.engine.lora_binding import AdapterBinding
from runner.errors import AdapterError, ParameterError, UnknownAdapterError

MODEL = tiny_model(max_position_embeddings=256)
SLIDING = tiny_model(layer_types=["full_attention", "sliding_attention"], sliding_window=6, seed=3)
BIASED = with_biases(tiny_model(attention_bias=True, mlp_bias=True))
EMBEDDING = ("model.embed_tokens",)
# Rank, DoRA, modules: ranks and modules differ, so that slots hold zeros.
KINDS = [
    (4, False, ATTENTION + MLP),
    (9, True, ATTENTION),
    (1, False, ("self_attn.v_proj", *EMBEDDING)),
    (3, True, (*MLP, *EMBEDDING)),
]


def adapters(model, kinds=KINDS):
    """Name -> weights, and mlx-lm's model of it; None stands for the model itself."""
    made = [
        random_adapter(model, seed, rank=rank, dora=dora, keys=keys)
        for seed, (rank, dora, keys) in enumerate(kinds)
    ]
    return {f"a{i}": weights for i, (weights, _) in enumerate(made)}, {
        None: model,
        **{f"a{i}": adapted for i, (_, adapted) in enumerate(made)},
    }


def engine_with(model, weights, **options) -> Engine:
    engine = make_engine(model, **options)
    for name, it in weights.items():
        engine.load_adapter(name, it)
    return engine


def rows(names, num_rows=12, **params):
    """Rows that take turns in the adapters; some share a beginning, some are drawn."""
    header = list(range(20, 44))
    order = [None, *names]
    return [
        request(
            (header if i % 3 else []) + [5 + i, 9, 60 - i],
            f"r{i}",
            adapter=order[i % len(order)],
            **({"max_tokens": 4 + i % 5, "temperature": i % 2, "ignore_eos": True} | params),
        )
        for i in range(num_rows)
    ]


@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        (MODEL, KINDS),
        (SLIDING, KINDS),
        (quantized(MODEL), [KINDS[0], (8, True, ATTENTION)]),
        (BIASED, KINDS),
    ],
    ids=["full", "sliding", "quantised", "biased"],
)
@pytest.mark.parametrize("order", ["offline", "fcfs"])
def test_a_mixed_batch_equals_mlx_lm_and_the_merged_weights(model, kinds, order):
    weights, models = adapters(model, kinds)
    done = run(engine_with(model, weights, max_batch_size=5, order=order), rows(weights))
    for r in rows(weights):
        assert_same(done[r.request_id, 0], naive_sample(models[r.adapter], r, 0))
        if r.adapter is not None:
            assert_same(done[r.request_id, 0], naive_sample(merged(models[r.adapter]), r, 0))
    assert {name: c.adapter for (name, _), c in done.items()} == {
        r.request_id: r.adapter for r in rows(weights)
    }


def test_a_mixed_batch_equals_alone():
    weights, _ = adapters(MODEL)
    mixed = run(engine_with(MODEL, weights, max_batch_size=7), rows(weights))
    for r in rows(weights):
        alone = run(engine_with(MODEL, weights, max_batch_size=1), [r])
        assert_same(mixed[r.request_id, 0], alone[r.request_id, 0])


def test_adapters_change_what_is_said_and_a_row_without_is_not_touched():
    weights, _ = adapters(MODEL)
    asked = [request([7, 31, 5], name or "none", adapter=name) for name in (None, *weights)]
    done = run(engine_with(MODEL, weights), asked)
    assert len({tuple(c.raw_logprobs) for c in done.values()}) == len(asked)
    plain = run(make_engine(MODEL), asked[:1])
    assert_same(done["none", 0], plain["none", 0])


def test_groups_and_scored_prompts_have_their_adapter():
    weights, models = adapters(MODEL)
    group = request(range(5, 40), "g", n=5, temperature=1.0, adapter="a1")
    asked = [group, request(range(5, 40), "s", max_tokens=0, prompt_logprobs=0, adapter="a2")]
    done = run(engine_with(MODEL, weights, max_batch_size=3), [*rows(weights), *asked])
    for index in range(5):
        assert_same(done["g", index], naive_sample(models["a1"], group, index))
    logits = models["a2"](mx.array([list(range(5, 39))]))[0]
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = np.array(logprobs)[range(34), range(6, 40)]
    np.testing.assert_allclose(done["s", 0].prompt_logprobs.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("max_adapters", [1, 2])
def test_more_adapters_than_a_batch_takes_take_turns(max_adapters):
    weights, models = adapters(MODEL)
    engine = engine_with(MODEL, weights, max_batch_size=6, max_adapters=max_adapters)
    seen = set()
    done = {}
    for r in rows(weights):
        engine.add(r)
    while engine.has_unfinished:
        done |= {c.request_id: c for c in engine.step()}
        seen.add(len(engine._flight.adapters))
    assert max(seen) == max_adapters
    for r in rows(weights):
        assert_same(done[r.request_id], naive_sample(models[r.adapter], r, 0))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "lfm2", "gemma3_text", "mamba2"])
def test_other_architectures(kind):
    """Experts, sorted from 64 entries on, norms between layers, states of a recurrence."""
    model = tiny_architecture(kind)
    named = dict(model.named_modules())
    wanted = (
        "q_proj", "v_proj", "in_proj", "out_proj", "gate_proj", "down_proj", "up_proj"
    )  # fmt: skip
    keys = [name for name in named if name.rpartition(".")[2] in wanted]
    made = [random_adapter(model, seed, rank=3 + seed, keys=keys) for seed in range(2)]
    weights = {f"a{i}": it for i, (it, _) in enumerate(made)}
    models = {None: model, **{f"a{i}": it for i, (_, it) in enumerate(made)}}
    asked = rows(weights, 7, max_tokens=3)
    done = run(engine_with(model, weights, max_batch_size=4), asked)
    for r in asked:
        assert_same(done[r.request_id, 0], naive_sample(models[r.adapter], r, 0))


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_experts_that_sort_their_entries_know_the_rows(num_tokens):
    """mlx-lm sorts 64 entries and more by expert, and forgets the rows."""
    model = tiny_architecture("mixtral")
    keys = [name for name, _ in model.named_modules() if "switch_mlp" in name and "proj" in name]
    made = [random_adapter(model, seed, rank=3 + seed, keys=keys) for seed in range(2)]
    slots = AdapterBinding(model, max_adapters=2)
    used = [Adapter(str(i), i, it, fitted(slots.modules, it)) for i, (it, _) in enumerate(made)]
    rows = [used[0], None, used[1], used[0]]
    ids = mx.array(np.random.default_rng(0).integers(0, 97, (4, num_tokens)))
    with slots.bound(rows):
        mixed = model(ids)
        mx.eval(mixed)
    models = [made[0][1], model, made[1][1], made[0][1]]
    for row, alone in enumerate(models):
        np.testing.assert_allclose(mixed[row], alone(ids[row : row + 1])[0], atol=1e-4)


def test_the_model_stays_as_it_is():
    weights, _ = adapters(MODEL)
    kinds = {name: type(module) for name, module in MODEL.named_modules()}
    before = copied(MODEL)
    run(engine_with(MODEL, weights), rows(weights))
    assert {name: type(module) for name, module in MODEL.named_modules()} == kinds
    ids = mx.array([[5, 9, 60]])
    assert mx.array_equal(MODEL(ids), before(ids))


def test_an_unknown_name_lists_those_that_are_loaded():
    weights, _ = adapters(MODEL)
    engine = engine_with(MODEL, weights)
    with pytest.raises(UnknownAdapterError, match="'b' is not loaded; loaded are: a0, a1, a2, a3"):
        engine.add(request([5], adapter="b"))
    with pytest.raises(UnknownAdapterError, match="loaded are: none"):
        make_engine(MODEL).add(request([5], adapter="b"))


def test_another_models_adapter_is_refused_by_tensor():
    other = tiny_model(hidden_size=64)
    weights, _ = random_adapter(other, 0, keys=("self_attn.q_proj",))
    engine = make_engine(MODEL)
    what = r"model.layers.0.self_attn.q_proj.lora_a has the shape \(64, 4\), .*needs \(32, 4\)"
    with pytest.raises(AdapterError, match=what):
        engine.load_adapter("a", weights)
    deeper = tiny_model(num_hidden_layers=3)
    weights, _ = random_adapter(deeper, 0, keys=("self_attn.q_proj",))
    with pytest.raises(AdapterError, match="layers.2.self_attn.q_proj.lora_a is for a module"):
        engine.load_adapter("a", weights)
    assert engine.adapters.names == [] and engine.adapters.weight_version == 0


def test_bad_options_are_refused():
    weights, _ = random_adapter(MODEL, 0)
    with pytest.raises(ParameterError, match="max_adapters=0 is not allowed"):
        make_engine(MODEL, max_adapters=0)
    with pytest.raises(ParameterError, match="mode='now' is not allowed: keep, update"):
        make_engine(MODEL).load_adapter("a", weights, mode="now")
    with pytest.raises(AdapterError, match="needs a name"):
        make_engine(MODEL).load_adapter("", weights)
