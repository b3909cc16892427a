"""Counters of one engine, for summaries and progress bars."""

from collections.abc import Iterable
from dataclasses import dataclass

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
    num_completion_tokens: int = 0
    """Tokens sampled that belong to a completion: no pads, nothing past an end."""
    num_steps: int = 0
    """Decode forwards."""
    num_row_steps: int = 0
    """Rows forwarded in decode, empty ones included."""
    num_halvings: int = 0
    """Times that memory ran out, so that the batch was halved and started over."""

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows whose token was used, 0 to 1."""
        return self.num_completion_tokens / max(1, self.num_row_steps)
