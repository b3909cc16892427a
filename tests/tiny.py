"""A tiny random llama and a naive way to sample from it, which the laws are checked against."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.llama import Model, ModelArgs
from naive_cache import naive_caches

from runner.engine.engine import Engine
from runner.engine.kv_options import KVOptions
from runner.engine.sampler import race_numbers
from runner.engine.sequence import stream_key
from runner.types import Completion, Pooling, Request, SamplingParams, TokenLogprobs

VOCAB_SIZE = 97
EOS = 2
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
}


def tiny_model(seed: int = 0, **changes: Any) -> nn.Module:
    """Two layers, grouped heads, float32; weights are large enough that the context matters."""
    model = Model(ModelArgs(**(CONFIG | changes)))
    random = np.random.default_rng(seed)

    def fresh(parameter: mx.array) -> mx.array:
        return mx.array((random.standard_normal(parameter.shape) * 0.25).astype(np.float32))

    model.update(tree_map(lambda p: p if p.ndim == 1 else fresh(p), model.parameters()))
    mx.eval(model.parameters())
    return model


def make_engine(model: nn.Module, **options: Any) -> Engine:
    """An engine with the tiny model's end of sequence; takes the options of `KVOptions` as well."""
    names = {field.name for field in fields(KVOptions)} & options.keys()
    kv_options = KVOptions(**{name: options.pop(name) for name in names})
    if speculation := options.get("speculation"):
        kv_options = kv_options.with_spare(speculation.num_draft_tokens)
    given = {"eos_token_ids": [EOS], "max_model_len": 256, "kv_options": kv_options} | options
    return Engine(model, **given)


def request(
    prompt: Sequence[int],
    request_id: str = "r",
    key: str | None = None,
    bad_words_token_ids: Sequence[Sequence[int]] = (),
    logprobs_start: int = 1,
    prompt_entropy: bool = False,
    adapter: str | None = None,
    pooling: Pooling | None = None,
    **params: Any,
) -> Request:
    """A request whose key is its id, with seed 0, unless said otherwise."""
    return Request(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(**({"seed": 0, "max_tokens": 12} | params)),
        key=key or request_id,
        bad_words_token_ids=bad_words_token_ids,
        logprobs_start=logprobs_start,
        prompt_entropy=prompt_entropy,
        adapter=adapter,
        pooling=pooling,
    )


def run(engine: Engine, requests: Iterable[Request]) -> dict[tuple[str, int], Completion]:
    """Everything that the engine yields, by request and sample."""
    done = list(engine.run(requests))
    assert len({(c.request_id, c.index) for c in done}) == len(done), "a sample came twice"
    return {(c.request_id, c.index): c for c in done}


def assert_same(one: Completion, other: Completion, tolerance: float = 1e-4) -> None:
    """Token for token, and logprob for logprob within float32 rounding."""
    assert one.token_ids == other.token_ids
    assert one.finish_reason == other.finish_reason
    assert one.stop_reason == other.stop_reason
    np.testing.assert_allclose(one.raw_logprobs, other.raw_logprobs, atol=tolerance)
    np.testing.assert_allclose(one.processed_logprobs, other.processed_logprobs, atol=tolerance)


def naive_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities, float64 (V,), that sampling draws from: the definitions, spelled out."""
    scaled = logits.astype(np.float64) / (params.temperature or 1.0)
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if params.temperature == 0:
        return probabilities
    order = np.argsort(-probabilities, kind="stable")
    keep = probabilities >= params.min_p * probabilities.max()
    if params.top_k > 0:
        keep &= np.isin(np.arange(len(keep)), order[: params.top_k])
    mass = np.where(keep, probabilities, 0.0)
    mass /= mass.sum()
    before = np.cumsum(mass[order]) - mass[order]
    keep[order[before >= params.top_p]] = params.top_p == 1.0
    mass = np.where(keep & (mass > 0), mass, 0.0)
    return mass / mass.sum()


def naive_logits(logits: np.ndarray, request: Request, generated: list[int]) -> np.ndarray:
    """The logits, float64 (V,), that a token after `generated` is sampled from, one by one."""
    params = request.params
    changed = [float(logit) for logit in logits]
    for token_id, bias in (params.logit_bias or {}).items():
        changed[token_id] += bias
    for token_id in range(len(changed)):
        if token_id in generated or token_id in request.prompt_token_ids:
            penalty = params.repetition_penalty
            changed[token_id] *= 1 / penalty if changed[token_id] > 0 else penalty
        changed[token_id] -= params.frequency_penalty * generated.count(token_id)
        changed[token_id] -= params.presence_penalty if token_id in generated else 0.0
        if params.allowed_token_ids is not None and token_id not in params.allowed_token_ids:
            changed[token_id] = -np.inf
        if len(generated) < params.min_tokens and token_id in (EOS, *params.stop_token_ids):
            changed[token_id] = -np.inf
    for *before, last in request.bad_words_token_ids:
        if generated[max(0, len(generated) - len(before)) :] == before:
            changed[last] = -np.inf
    return np.array(changed)


def naive_winner(weights: np.ndarray, numbers: np.ndarray) -> int:
    """The token that wins the two races of the sampler, in float64."""
    blocks = [weights[start : start + 256] for start in range(0, len(weights), 256)]
    sums = np.array([block.sum() for block in blocks], np.float64)
    block = int(np.argmax(sums / numbers[256:]))
    inside = blocks[block].astype(np.float64) / numbers[: len(blocks[block])]
    return 256 * block + int(np.argmax(inside))


def naive_sample(model: nn.Module, request: Request, index: int, **kv_options: Any) -> Completion:
    """One sample by a full forward per token: no cache, no batch, the draw in float64."""
    params, ids = request.params, list(request.prompt_token_ids)
    stream = np.array([stream_key(params.seed or 0, request.key, index)], np.uint64)
    done = Completion(
        request_id=request.request_id,
        index=index,
        token_ids=[],
        raw_logprobs=[],
        processed_logprobs=[],
        finish_reason="length",
    )
    assert params.max_tokens is not None
    for position in range(params.max_tokens):
        caches = {"cache": naive_caches(model, **kv_options)} if kv_options else {}
        logits = np.array(model(mx.array([ids]), **caches)[0, -1])
        raw = naive_distribution(logits, SamplingParams(temperature=1.0))
        changed = naive_logits(logits, request, done.token_ids)
        processed = naive_distribution(changed, params)
        numbers = race_numbers(stream, np.array([position], np.uint64), len(processed))
        drawn = naive_winner(processed, numbers[0])
        token_id = drawn if params.temperature > 0 else int(np.argmax(changed))
        ids.append(token_id)
        done.token_ids.append(token_id)
        done.raw_logprobs.append(float(np.log(raw[token_id])))
        done.processed_logprobs.append(float(np.log(processed[token_id])))
        if token_id in params.stop_token_ids or (token_id == EOS and not params.ignore_eos):
            done.finish_reason = "stop"
            done.stop_reason = token_id if token_id in params.stop_token_ids else None
            break
    return done


def naive_prompt_logprobs(model: nn.Module, request: Request) -> TokenLogprobs:
    """What a request asks of its prompt, by one full forward and float64, token by token."""
    ids, num_top = list(request.prompt_token_ids), request.params.prompt_logprobs or 0
    logits = np.array(model(mx.array([ids]))[0].astype(mx.float32)).astype(np.float64)
    scored: dict[str, list[Any]] = {name: [] for name in ("logprobs", "ranks", "ids", "top")}
    entropies = []
    for place in range(request.logprobs_start, len(ids)):
        row = logits[place - 1]
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        order = np.argsort(-logprobs)[:num_top]
        scored["logprobs"].append(float(logprobs[ids[place]]))
        scored["ranks"].append(1 + int((logprobs > logprobs[ids[place]]).sum()))
        scored["ids"].append(order.tolist())
        scored["top"].append(logprobs[order].tolist())
        entropies.append(float(-(np.exp(logprobs) * logprobs).sum()))
    return TokenLogprobs(
        start=request.logprobs_start,
        logprobs=scored["logprobs"],
        ranks=scored["ranks"],
        top_token_ids=scored["ids"],
        top_logprobs=scored["top"],
        entropies=entropies if request.prompt_entropy else None,
    )


def assert_scored(one: TokenLogprobs | None, other: TokenLogprobs) -> None:
    """The same tokens, ranks and alternatives, and numbers within float32 rounding."""
    assert one is not None and (one.start, one.ranks) == (other.start, other.ranks)
    assert one.top_token_ids == other.top_token_ids
    pairs = [(one.logprobs, other.logprobs), (one.entropies, other.entropies)]
    pairs += list(zip(one.top_logprobs, other.top_logprobs, strict=True))
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        np.testing.assert_allclose(ours or [], theirs or [], atol=1e-4)
