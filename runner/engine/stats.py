"""Counters of one engine, for summaries and progress bars."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from runner.engine.sequence import Sequence as Row
from runner.types import Request


def num_prompt_tokens(requests: Iterable[Request]) -> int:
    """Tokens of the prompts of some requests."""
    return sum(len(request.prompt_token_ids) for request in requests)


@dataclass(slots=True)
class EngineStats:
    """What an engine has done since it was built."""

    num_requests: int = 0
    """Requests taken."""
    num_prompt_tokens: int = 0
    """Prompt tokens of the requests prefilled, each prompt counted once."""
    num_prefill_tokens: int = 0
    """Positions forwarded in prefill, pads included."""
    num_cached_tokens: int = 0
    """Positions that the prefix cache, or a beginning that prompts share, saved from being
    forwarded."""
    num_scored_tokens: int = 0
    """Prompt tokens whose logprob was given."""
    num_embedded_tokens: int = 0
    """Tokens of the prompts that an embedding was asked of."""
    num_completion_tokens: int = 0
    """Tokens sampled that belong to a completion: no pads, nothing past an end."""
    num_steps: int = 0
    """Decode forwards."""
    num_row_steps: int = 0
    """Rows forwarded in decode, empty ones included, once for each position of a drafted step."""
    num_halvings: int = 0
    """Times that memory ran out, so that the batch was halved and started over."""

    def count_step(self, num_positions: int) -> None:
        """Counts a decode forward."""
        self.num_steps += 1
        self.num_row_steps += num_positions

    def count_prompts(self, requests: Sequence[Request]) -> None:
        """Counts requests whose prompts are prefilled."""
        self.num_prompt_tokens += num_prompt_tokens(requests)
        self.num_scored_tokens += sum(request.num_scored for request in requests)
        self.num_embedded_tokens += num_prompt_tokens(r for r in requests if r.pooling is not None)

    def start_over(self, rows: Sequence[Row], requests: Sequence[Request]) -> None:
        """Takes back what has to be done again: rows in flight, and prompts that were prefilled."""
        self.num_halvings += 1
        self.num_prompt_tokens -= num_prompt_tokens(requests)
        self.num_completion_tokens -= sum(len(row.token_ids) for row in rows)

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows whose token was used, 0 to 1."""
        return self.num_completion_tokens / max(1, self.num_row_steps)
