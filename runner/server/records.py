"""What is known of one request once it is answered: for the log, the metrics and the limits."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import HTTPConnection

from runner.server.limits import Allowance
from runner.text_stream import TextDelta
from runner.types import Prompt, PromptRequest, RequestOutput

_NO_LIMITS = Allowance(None, None)
_KEY = "record"
"""Of the record in `scope["state"]`."""


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request of a client; of the event loop's thread alone."""

    request_id: str
    method: str
    path: str
    on_gap: Callable[[float, int], None] = lambda seconds, num_tokens: None
    """Takes the seconds between two pieces of a sample, and the tokens of the second."""
    began: float = field(default_factory=time.perf_counter)
    key: str | None = None
    """The digest of the client's key."""
    allowance: Allowance = _NO_LIMITS
    status: int = 0
    error: str | None = None
    """The code of the error that the client was told, or client_gone."""
    model: str | None = None
    stream: bool | None = None
    prompts: tuple[Prompt, ...] = ()
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    first_token: float | None = None
    """Seconds until the first piece of a streamed answer."""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    _told: dict[tuple[str, int], float] = field(default_factory=dict)
    _num_unanswered: int = 0

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.began

    @property
    def is_cut(self) -> bool:
        """Whether an answer was begun that has not come to its end."""
        return self._num_unanswered > 0

    def admit(self, asked: Sequence[PromptRequest], *, model: str, stream: bool = False) -> None:
        """Takes down what is asked, its prompts encoded already.

        Raises `ApiError` where the client has to wait for that.
        """
        self.model, self.stream = model, stream
        self.prompts = tuple(it.prompt for it in asked)
        num_tokens = sum(len(it.encoded[1]) for it in asked if isinstance(it.encoded, tuple))
        self.allowance.take_prompt(num_tokens)
        self.num_prompt_tokens, self._num_unanswered = num_tokens, len(asked)

    def note(self, event: TextDelta | RequestOutput) -> None:
        """Takes down what the engine tells."""
        if isinstance(event, TextDelta):
            self._note_piece(event)
            return
        self._num_unanswered -= 1
        self.finish_reasons.update(it.finish_reason for it in event.outputs)
        if not self.stream:
            self.num_completion_tokens += sum(len(it.token_ids) for it in event.outputs)

    def settle(self) -> None:
        """Gives the client's allowance what is known at the end."""
        if self.status == 429:  # Nothing was done for it.
            self.allowance.take_tokens(-self.num_prompt_tokens)
            self.num_prompt_tokens = 0
        self.allowance.take_tokens(self.num_completion_tokens)

    def _note_piece(self, piece: TextDelta) -> None:
        now, num_tokens = time.perf_counter(), len(piece.token_ids)
        self.num_completion_tokens += num_tokens
        if self.first_token is None:
            self.first_token = now - self.began
        sample = (piece.output.request_id, piece.index)
        if num_tokens and sample in self._told:
            self.on_gap(now - self._told[sample], num_tokens)
        self._told[sample] = now


def attach(connection: HTTPConnection, record: RequestRecord) -> None:
    """Lets `record_of` find the record of a request."""
    setattr(connection.state, _KEY, record)


def record_of(connection: HTTPConnection) -> RequestRecord:
    """The record of a request."""
    record = getattr(connection.state, _KEY)
    assert isinstance(record, RequestRecord), "the middleware attaches it"
    return record
