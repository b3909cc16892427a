"""What the jobs that only score or embed have in common."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from itertools import islice
from typing import TypeVar

from omegaconf import DictConfig

from runner.errors import ParameterError
from runner.job import RunContext
from runner.scores import ScoredText
from runner.types import PromptRequest, RequestOutput, SamplingParams, Score

AHEAD = 256
"""Texts that are sorted by length together, so that few pads are forwarded."""

_NOTHING_SAMPLED = SamplingParams(max_tokens=0, prompt_logprobs=0, seed=0)

Item = TypeVar("Item")


def check_nothing_sampled(config: DictConfig, params: SamplingParams) -> None:
    """Raises ParameterError for options of sampling and rewards: they would have no effect."""
    for field in fields(params):
        value = getattr(params, field.name)
        if value != getattr(_NOTHING_SAMPLED, field.name):
            what = "this job reads what is there and samples nothing; leave it out"
            raise ParameterError(f"sampling.{field.name}={value} is not allowed: {what}")
    if config.lora.watch is not None:
        what = "all results are to be of one content; give lora.path"
        raise ParameterError(f"lora.watch={config.lora.watch} is not allowed: {what}")
    if config.reward is not None:
        raise ParameterError("reward is not allowed: this job reads texts and rewards nothing")


def in_chunks(items: Iterable[Item], size: int = AHEAD) -> Iterator[list[Item]]:
    """Cuts items into lists of `size`."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


def run_texts(
    context: RunContext,
    texts: Iterable[ScoredText],
    order: Callable[[list[ScoredText]], list[ScoredText]],
) -> Iterator[Score]:
    """Scores texts as they are needed, each stretch of them in `order`; yields scores as they are
    there, `index` and `choice` the text's."""
    in_flight: dict[str, ScoredText] = {}

    def requests() -> Iterator[PromptRequest | RequestOutput]:
        for chunk in in_chunks(texts):
            for text in order(chunk):
                in_flight[text.request_id] = text
                yield text.request(num_top=0, entropy=False)

    for output in context.run(requests()):
        yield in_flight.pop(output.request_id).score(output)
