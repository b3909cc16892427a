"""GRPO on a LoRA: rollouts in, a better adapter out.

The trainer works on a copy of the model's structure that shares its weights, so that the model that
samples is never touched. What it learns leaves it as plain arrays.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from runner.engine.scoring import log_normalizer
from runner.errors import ParameterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A completion to learn from."""

    prompt_token_ids: Sequence[int]
    completion_token_ids: Sequence[int]
    behaviour_logprobs: Sequence[float]
    """Of each completion token in the distribution that it was sampled from (processed)."""
    advantage: float
    reference_logprobs: Sequence[float] | None = None
    """Of each completion token in the model without adapter, at the same temperature."""

    def with_reference(self, logprobs: Sequence[float]) -> "Experience":
        """The same, with the reference known."""
        return replace(self, reference_logprobs=logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraShape:
    """Which modules get an adapter of which size, as mlx-lm's `lora_parameters` say it."""

    rank: int = 8
    scale: float = 10.0
    num_layers: int = -1
    """The last so many layers; -1 for all."""
    keys: Sequence[str] | None = None
    """Modules by their name in a layer, such as self_attn.q_proj; None for all linear ones."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ParameterError(f"job.rank={self.rank} is not allowed: at least 1")
        if self.num_layers == 0 or self.num_layers < -1:
            what = "1 or more, or -1 for all"
            raise ParameterError(f"job.num_layers={self.num_layers} is not allowed: {what}")

    def parameters(self) -> dict[str, Any]:
        """mlx-lm's `lora_parameters`."""
        keys = {} if self.keys is None else {"keys": list(self.keys)}
        return {"rank": self.rank, "scale": self.scale, "dropout": 0.0} | keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised: the clipped surrogate of PPO with GRPO's advantages.

    PPO: arXiv 1707.06347, eq. 7. GRPO: arXiv 2402.03300, eq. 3, with its estimator of the KL
    divergence to the reference; the mean is over all tokens of an update, not first over those of
    each completion, so that a token weighs the same in a long one (arXiv 2503.14476, section 3.3).
    """

    temperature: float
    clip_epsilon: float = 0.2
    kl_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.clip_epsilon < 1:
            given = f"job.clip_epsilon={self.clip_epsilon}"
            raise ParameterError(f"{given} is not allowed: between 0 and 1")
        if self.kl_coefficient < 0:
            given = f"job.kl_coefficient={self.kl_coefficient}"
            raise ParameterError(f"{given} is not allowed: 0 or more")


@dataclass(frozen=True, slots=True)
class _Batch:
    """Completions side by side, padded on the right; all but `token_ids` (B, L - 1)."""

    token_ids: mx.array
    """(B, L) int32: prompts and completions."""
    is_completion: mx.array
    behaviour: mx.array
    reference: mx.array
    advantages: mx.array


def _batch(experiences: Sequence[Experience]) -> _Batch:
    width = max(len(it.prompt_token_ids) + len(it.completion_token_ids) for it in experiences)
    token_ids = np.zeros((len(experiences), width), np.int32)
    mask, behaviour, reference, advantages = np.zeros((4, len(experiences), width - 1), np.float32)
    for row, it in enumerate(experiences):
        start, end = len(it.prompt_token_ids), len(it.completion_token_ids)
        end += start
        token_ids[row, :end] = [*it.prompt_token_ids, *it.completion_token_ids]
        predicted = slice(start - 1, end - 1)
        mask[row, predicted] = 1.0
        behaviour[row, predicted] = it.behaviour_logprobs
        known = it.reference_logprobs
        reference[row, predicted] = it.behaviour_logprobs if known is None else known
        advantages[row, predicted] = it.advantage
    return _Batch(*map(mx.array, (token_ids, mask, behaviour, reference, advantages)))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """What one update saw, over its completion tokens."""

    loss: float
    num_tokens: int
    ratio_deviation: float
    """The most that an importance ratio differed from 1 before the update."""
    clipped_share: float
    """Tokens whose ratio was outside of what is not clipped."""
    kl: float
    """Mean estimate of the divergence to the reference; 0 without one."""


class GRPOTrainer:
    """An adapter in training, and its optimiser."""

    def __init__(
        self,
        model: nn.Module,
        shape: LoraShape,
        objective: Objective,
        *,
        learning_rate: float,
        micro_batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        """Starts from an adapter that changes nothing.

        Raises:
            ParameterError: `keys` name no module of the model, or a number is not allowed.
        """
        if not learning_rate > 0:
            raise ParameterError(f"job.learning_rate={learning_rate} is not allowed: above 0")
        if micro_batch_size < 1:
            given = f"job.micro_batch_size={micro_batch_size}"
            raise ParameterError(f"{given} is not allowed: at least 1")
        self.shape, self.objective = shape, objective
        self._micro_batch_size = micro_batch_size
        self._model = _with_lora(model, shape, seed)
        self._optimizer = optim.Adam(learning_rate=learning_rate)
        self._optimizer.init(self._model.trainable_parameters())
        self._gradients = nn.value_and_grad(self._model, partial(_loss, self._model, objective))

    @property
    def arrays(self) -> dict[str, mx.array]:
        """The adapter by mlx-lm's names: `lora_a` (in, r) and `lora_b` (r, out), float32."""
        return dict(tree_flatten(self._model.trainable_parameters()))

    def update(self, experiences: Sequence[Experience]) -> UpdateStats:
        """Takes one step on all of `experiences`, a few at a time."""
        total = sum(len(it.completion_token_ids) for it in experiences)
        gradients: Any = None
        numbers = np.zeros(4)
        for part in _parts(experiences, self._micro_batch_size):
            (loss, seen), found = self._gradients(_batch(part), mx.array(float(total)))
            gradients = found if gradients is None else tree_map(mx.add, gradients, found)
            mx.eval(loss, seen, gradients)
            largest = max(numbers[1], float(seen[0]))
            numbers += [float(loss), 0.0, float(seen[1]), float(seen[2])]
            numbers[1] = largest
        self._optimizer.update(self._model, gradients)
        mx.eval(self._model.trainable_parameters(), self._optimizer.state)
        return UpdateStats(
            loss=numbers[0],
            num_tokens=total,
            ratio_deviation=numbers[1],
            clipped_share=numbers[2] / total,
            kl=numbers[3] / total,
        )

    @property
    def state(self) -> dict[str, mx.array]:
        """The optimiser's arrays, for `restore`."""
        return dict(tree_flatten(self._optimizer.state))

    def restore(self, arrays: Mapping[str, mx.array], state: Mapping[str, mx.array]) -> None:
        """Goes on from what `arrays` and `state` were."""
        self._model.update(tree_unflatten(list(arrays.items())))
        self._optimizer.state = tree_unflatten(list(state.items()))

    def save(self, directory: Path) -> None:
        """Writes the adapter as mlx-lm reads it: a safetensors file and its configuration."""
        directory.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(directory / "adapters.safetensors"), self.arrays)
        config = {
            "fine_tune_type": "lora",
            "num_layers": self.shape.num_layers,
            "lora_parameters": self.shape.parameters(),
        }
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _parts(experiences: Sequence[Experience], size: int) -> Iterator[list[Experience]]:
    """Of like length together, so that little is padded."""
    ordered = sorted(
        experiences, key=lambda it: len(it.prompt_token_ids) + len(it.completion_token_ids)
    )
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _loss(
    model: nn.Module, objective: Objective, batch: _Batch, total: mx.array
) -> tuple[mx.array, mx.array]:
    """The part of the loss that these completions make, and sums for `UpdateStats`, (3,)."""
    logits = model(batch.token_ids[:, :-1]).astype(mx.float32) / objective.temperature
    chosen = mx.take_along_axis(logits, batch.token_ids[:, 1:, None], axis=-1)
    logprobs = (chosen - log_normalizer(logits))[..., 0]  # (B, L - 1)
    difference = mx.where(batch.is_completion > 0, logprobs - batch.behaviour, 0.0)
    ratio = mx.exp(difference)
    low, high = 1 - objective.clip_epsilon, 1 + objective.clip_epsilon
    clipped = mx.clip(ratio, low, high)
    gain = mx.minimum(ratio * batch.advantages, clipped * batch.advantages)
    to_reference = mx.where(batch.is_completion > 0, batch.reference - logprobs, 0.0)
    kl = mx.exp(to_reference) - to_reference - 1
    loss = mx.sum(batch.is_completion * (objective.kl_coefficient * kl - gain)) / total
    seen = mx.stack([mx.abs(ratio - 1).max(), mx.sum(ratio != clipped), mx.sum(kl)])
    return loss, mx.stop_gradient(seen)


def _with_lora(model: nn.Module, shape: LoraShape, seed: int) -> nn.Module:
    """A copy of the model's structure on the same weights, frozen, with an adapter to train."""
    shared = {id(array): array for _, array in tree_flatten(model.parameters())}
    twin: nn.Module = copy.deepcopy(model, shared)
    twin.freeze()
    count = len(twin.layers)
    if shape.num_layers > count:
        given = f"job.num_layers={shape.num_layers}"
        raise ParameterError(f"{given} is not allowed: the model has {count} layers")
    num_layers = count if shape.num_layers == -1 else shape.num_layers
    linear_to_lora_layers(twin, num_layers, shape.parameters())
    started = _started(dict(tree_flatten(twin.trainable_parameters())), seed)
    if not started:
        raise ParameterError(f"job.keys={shape.keys} is not allowed: no module has such a name")
    twin.update(tree_unflatten(list(started.items())))
    mx.eval(twin.trainable_parameters())
    return twin


def _started(parameters: Mapping[str, mx.array], seed: int) -> dict[str, mx.array]:
    """An adapter that changes nothing, drawn from `seed` alone: as in mlx-lm, but for its key."""
    keys = mx.random.split(mx.random.key(seed), max(1, len(parameters)))
    started = {}
    for key, (name, array) in zip(keys, sorted(parameters.items()), strict=False):
        bound = 1 / math.sqrt(array.shape[0]) if name.endswith("lora_a") else 0.0
        started[name] = mx.random.uniform(-bound, bound, array.shape, mx.float32, key=key)
    return started
