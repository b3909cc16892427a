"""Trains a LoRA by GRPO: rollouts, rewards, an update, and the adapter swapped in."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hydra.utils import instantiate
from omegaconf import DictConfig

from runner.data.schemas import RESULT_FIELDS
from runner.errors import ParameterError
from runner.job import RunContext
from runner.models.load import Loader
from runner.rewards import RewardRunner, reward_columns
from runner.rows import NamedRow
from runner.training.checkpoint import METRICS_FILE, Checkpoints
from runner.training.grpo import Experience, GRPOTrainer, LoraShape, Objective, UpdateStats
from runner.training.picture import draw
from runner.types import PromptRequest, RequestOutput, SamplingParams

ADAPTER = "policy"
"""The name under which the adapter in training is loaded."""
_FIELDS = (*RESULT_FIELDS, pa.field("step", pa.int32()))
_OF_THE_MODEL = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How many steps, and what each of them takes."""

    steps: int
    prompts_per_step: int
    updates_per_step: int

    def __post_init__(self) -> None:
        for name, number in asdict(self).items():
            if number < 1:
                raise ParameterError(f"job.{name}={number} is not allowed: at least 1")


def grpo(
    config: DictConfig,
    *,
    steps: int,
    prompts_per_step: int,
    updates_per_step: int,
    learning_rate: float,
    clip_epsilon: float,
    kl_coefficient: float,
    rank: int,
    scale: float,
    num_layers: int,
    keys: Sequence[str] | None,
    micro_batch_size: int,
    normalize_advantage: bool,
    picture: bool,
    load_model: Loader | None = None,
) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    The other options are those of `Schedule`, `Objective`, `LoraShape` and `GRPOTrainer`;
    `load_model` is the sweep's, if it is in one.
    """
    schedule = Schedule(
        steps=steps, prompts_per_step=prompts_per_step, updates_per_step=updates_per_step
    )
    shape = LoraShape(rank=rank, scale=scale, num_layers=num_layers, keys=keys)
    total = steps * prompts_per_step
    context = RunContext(config, fields=_FIELDS, total=total, load_model=load_model)
    check_sampling(context.params, kl_coefficient=kl_coefficient)
    _check_options(config, picture=picture)
    reward = instantiate(config.reward)
    if context.complete:
        return
    objective = Objective(
        temperature=context.params.temperature,
        clip_epsilon=clip_epsilon,
        kl_coefficient=kl_coefficient,
    )
    rows = _prompts(context, prompts_per_step)
    trainers: list[GRPOTrainer] = []
    context.on_loaded = lambda llm: trainers.append(
        GRPOTrainer(
            llm.model,
            shape,
            objective,
            learning_rate=learning_rate,
            micro_batch_size=micro_batch_size,
            seed=context.params.seed or 0,
        )
    )
    with context, RewardRunner(reward) as rewards:
        loop = _Loop(context, rows, rewards, trainers[0], schedule, normalize=normalize_advantage)
        loop.run()
    if picture:
        draw({"": read_metrics(context.directory / METRICS_FILE)}, context.directory)


def _check_options(config: DictConfig, *, picture: bool) -> None:
    """Refuses a run that could not begin or end."""
    if picture and find_spec("matplotlib") is None:
        what = "pip install 'mlx-runner[plots]', or choose job.picture=false"
        raise ParameterError(f"job.picture=true needs matplotlib: {what}")
    if config.reward is None:
        raise ParameterError("grpo needs a reward: reward=word_limit, or runner --help")


def _prompts(context: RunContext, prompts_per_step: int) -> list[NamedRow]:
    """The rows that have a prompt; a step has each of them once at most, but between two rounds."""
    rows = [row for row in context.rows() if row.prompt is not None]
    if len(rows) < prompts_per_step:
        given = f"job.prompts_per_step={prompts_per_step}"
        raise ParameterError(f"{given} is not allowed: the input has {len(rows)} prompts")
    return rows


def check_sampling(params: SamplingParams, *, kl_coefficient: float) -> None:
    """Raises ParameterError where the recorded logprobs are others than the trainer computes."""
    if params.n < 2:
        raise ParameterError(f"sampling.n={params.n} is not allowed: a group has at least 2")
    if params.temperature <= 0:
        given = f"sampling.temperature={params.temperature}"
        raise ParameterError(f"{given} is not allowed: a policy that learns is sampled, above 0")
    for name in ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                 "frequency_penalty", "logit_bias", "min_tokens", "bad_words",
                 "allowed_token_ids"):  # fmt: skip
        value = getattr(params, name)
        if value != getattr(_OF_THE_MODEL, name):
            what = "grpo samples from the model's own distribution at a temperature"
            raise ParameterError(f"sampling.{name}={value} is not allowed: {what}")
    if kl_coefficient > 0 and params.temperature != 1:
        what = "the reference is known at sampling.temperature=1 only"
        raise ParameterError(f"job.kl_coefficient={kl_coefficient} is not allowed: {what}")


@dataclass(frozen=True, slots=True)
class _Group:
    """A prompt's completions, and what each of them earned, by its index."""

    output: RequestOutput
    columns: dict[int, dict[str, Any]]

    @property
    def rewards(self) -> list[float]:
        """Of the completions that have one."""
        found = [given.get("reward") for given in self.columns.values()]
        return [reward for reward in found if reward is not None]

    def experiences(self) -> Iterator[Experience]:
        """Those of its completions that say something: with an advantage."""
        for sample in self.output.outputs:
            if advantage := self.columns[sample.index].get("advantage"):
                yield Experience(
                    prompt_token_ids=self.output.prompt_token_ids,
                    completion_token_ids=sample.token_ids,
                    behaviour_logprobs=sample.processed_logprobs,
                    advantage=advantage,
                )


class _Loop:
    """Step after step, from the last checkpoint on."""

    def __init__(
        self,
        context: RunContext,
        rows: Sequence[NamedRow],
        rewards: RewardRunner,
        trainer: GRPOTrainer,
        schedule: Schedule,
        *,
        normalize: bool,
    ) -> None:
        self._context, self._rewards, self._trainer = context, rewards, trainer
        self._schedule, self._normalize = schedule, normalize
        self._rows = rows
        self._checkpoints = Checkpoints(context.directory, trainer)

    def run(self) -> None:
        """Does the steps that are left; an interrupt ends them after the last whole one."""
        num_whole = self._context.writer.totals.rows // self._schedule.prompts_per_step
        first = self._checkpoints.restore(num_whole)
        self._swap()
        for step in range(first, self._schedule.steps):
            started = time.monotonic()
            groups = self._sampled(step)
            if groups is None:
                return
            sampled = time.monotonic()
            stats = self._learn(groups)
            learned = time.monotonic()
            digest = self._swap()
            metrics = _metrics(groups, stats) | {
                "adapter_digest": digest,
                "rollout_seconds": sampled - started,
                "update_seconds": learned - sampled,
                "swap_seconds": time.monotonic() - learned,
            }
            self._context.commit()
            self._checkpoints.save(step + 1, {"step": step} | metrics)

    def _swap(self) -> str:
        """Hands the adapter to the engine, as arrays in memory; the digest of its content."""
        llm, trainer = self._context.llm, self._trainer
        llm.load_adapter(ADAPTER, arrays=trainer.arrays, scale=trainer.shape.scale)
        return llm.adapters[ADAPTER]

    def _sampled(self, step: int) -> list[_Group] | None:
        """The groups of a step, written; None where an interrupt came first."""
        # A prompt that ends one round through the input may begin the next in the same step.
        chosen = {f"{step}.{i}-{row.row_id}": row for i, row in enumerate(self._chosen(step))}
        requests = [
            PromptRequest(
                request_id=request_id,
                prompt=row.prompt,
                params=self._context.params,
                key=f"{request_id.partition('-')[0]}/{row.key}",
                adapter=ADAPTER,
            )
            for request_id, row in chosen.items()
            if row.prompt is not None
        ]
        outputs = list(self._context.run(requests))
        if self._context.is_interrupted:
            return None
        # In the order of the prompts: sums over an update are then the same however rows finish.
        outputs.sort(key=lambda output: list(chosen).index(output.request_id))
        return [self._rewarded(step, chosen[it.request_id], it) for it in outputs]

    def _chosen(self, step: int) -> list[NamedRow]:
        """The prompts of a step: all of them in a random order, then again in another."""
        size, count = self._schedule.prompts_per_step, len(self._rows)
        seed = self._context.params.seed or 0
        places = range(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng([seed, epoch]).permutation(count)
            for epoch in {place // count for place in places}
        }
        return [self._rows[orders[place // count][place % count]] for place in places]

    def _rewarded(self, step: int, row: NamedRow, output: RequestOutput) -> _Group:
        found = self._rewards.submit([sample.text for sample in output.outputs], row.row).result()
        columns = reward_columns(output.outputs, found, normalize=self._normalize)
        self._context.count(output)
        if output.request_id not in self._context.writer.done_rows:
            at = {index: {"step": step} | given for index, given in columns.items()}
            self._context.write(row.row, output, at)
        return _Group(output, columns)

    def _learn(self, groups: Sequence[_Group]) -> list[UpdateStats]:
        """Updates on what the groups show; nothing where all of a group earned the same."""
        experiences = [it for group in groups for it in group.experiences()]
        if self._trainer.objective.kl_coefficient > 0:
            experiences = self._with_reference(experiences)
        times = self._schedule.updates_per_step if experiences else 0
        return [self._trainer.update(experiences) for _ in range(times)]

    def _with_reference(self, experiences: Sequence[Experience]) -> list[Experience]:
        """Adds the logprobs of the model without adapter, by the same engine."""
        inputs: list[Any] = [
            (list(it.prompt_token_ids), list(it.completion_token_ids)) for it in experiences
        ]
        scores = self._context.llm.score(inputs, use_tqdm=False)
        return [
            it.with_reference([logprob or 0.0 for logprob in score.logprobs])
            for it, score in zip(experiences, scores, strict=True)
        ]


def _metrics(groups: Sequence[_Group], stats: Sequence[UpdateStats]) -> dict[str, Any]:
    rewards = [it for group in groups for it in group.rewards]
    lengths = [len(it.token_ids) for group in groups for it in group.output.outputs]
    first = stats[0] if stats else None
    return {
        "reward_mean": float(np.mean(rewards)) if rewards else None,
        "reward_stderr": float(np.std(rewards) / len(rewards) ** 0.5) if rewards else None,
        "completion_tokens_mean": float(np.mean(lengths)) if lengths else None,
        "first_ratio_deviation": first.ratio_deviation if first else None,
        "updates": [asdict(it) for it in stats],
    }


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The metrics of every step, in order."""
    return [json.loads(line) for line in file.read_text().splitlines()]
