"""Samples a group of completions per row, rewards each, and writes group-relative advantages."""

from collections import deque
from concurrent.futures import Future

from hydra.utils import instantiate
from omegaconf import DictConfig

from runner.certificate import Certificate
from runner.errors import ParameterError, RewardError
from runner.job import RunContext
from runner.models.load import Loader
from runner.rewards import RewardRunner, reward_columns
from runner.rows import Row
from runner.types import RequestOutput

Rewards = list[float | RewardError]


def rollout(
    config: DictConfig,
    *,
    normalize_advantage: bool = True,
    retry_errors: bool = False,
    certify: int = 64,
    load_model: Loader | None = None,
) -> None:
    """Runs the job that `config` (a composed `runner.config.Config`) describes.

    `normalize_advantage` divides a group's advantages by the standard deviation of its rewards,
    `retry_errors` does the rows with an error again, and `certify` result rows are scored again at
    the end; `load_model` is the sweep's, if it is in one.
    """
    certificate = Certificate(certify)
    context = RunContext(config, retry_errors=retry_errors, load_model=load_model)
    if context.params.echo:
        what = "rewards read the completion by itself; leave it out, or use generate"
        raise ParameterError(f"sampling.echo=True is not allowed: {what}")
    _check_reward(config, context)
    reward = instantiate(config.reward)
    if context.complete:
        return
    with context, RewardRunner(reward) as rewards:
        groups = _Groups(context, normalize_advantage=normalize_advantage)
        for row, output in context.outputs():
            if output.error is not None:
                context.write(row, output)
                continue
            texts = [sample.text for sample in output.outputs]
            groups.add(row, output, rewards.submit(texts, row))
            groups.write_finished()
        groups.write_rest()
        context.certify(certificate)


def _check_reward(config: DictConfig, context: RunContext) -> None:
    """Refuses a run whose every row would fail for want of a reward or its column."""
    if config.reward is None:
        raise ParameterError("a rollout needs a reward: reward=last_number, or runner --help")
    column = config.reward.get("answer_column")
    if column is not None and column not in context.dataset.columns:
        raise ParameterError(
            f"reward.answer_column={column} is not a column of {context.dataset.path}: "
            f"it has {', '.join(context.dataset.columns)}"
        )


class _Groups:
    """Groups whose completions are there and whose rewards are on their way."""

    def __init__(self, context: RunContext, *, normalize_advantage: bool) -> None:
        self._context = context
        self._normalize = normalize_advantage
        self._waiting: deque[tuple[Row, RequestOutput, Future[Rewards]]] = deque()

    def add(self, row: Row, output: RequestOutput, rewards: "Future[Rewards]") -> None:
        self._waiting.append((row, output, rewards))

    def write_finished(self) -> None:
        """Writes the groups that have their rewards, in whatever order they got them."""
        finished = [group for group in self._waiting if group[2].done()]
        self._waiting = deque(group for group in self._waiting if not group[2].done())
        for group in finished:
            self._write(*group)

    def write_rest(self) -> None:
        """Waits for the rewards that are missing."""
        while self._waiting:
            self._write(*self._waiting.popleft())

    def _write(self, row: Row, output: RequestOutput, future: "Future[Rewards]") -> None:
        columns = reward_columns(output.outputs, future.result(), normalize=self._normalize)
        self._context.write(row, output, columns)
