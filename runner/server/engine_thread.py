"""The one thread that runs the engine, and the requests that wait for it on an event loop."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Literal, TypeAlias, TypeVar

from runner.errors import ModelError, RunnerError
from runner.llm import LLM
from runner.text_stream import TextDelta
from runner.types import PromptRequest, RequestOutput

Event: TypeAlias = TextDelta | RequestOutput
Status: TypeAlias = Literal["ready", "restarting", "failed", "stopped"]
T = TypeVar("T")

_MOST_RESTARTS = 5
"""Times that making a new engine may fail, one after the other."""
_SECONDS_BETWEEN_RESTARTS = 1.0
"""After the first attempt; one more of them after each further one."""
_log = logging.getLogger(__name__)


class Failure(RunnerError):
    """Why a request has no output."""


class EngineFailure(Failure):
    """The engine failed under a request that was in flight, or cannot take one now."""


class RequestFailure(Failure):
    """A request that nobody has thought of could not be taken; the engine goes on."""


class Ticket:
    """The requests of one client's call, and what comes of them."""

    def __init__(self, requests: Sequence[PromptRequest], *, watched: bool) -> None:
        self.requests = requests
        self.watched = watched
        """Whether it is told what each step adds."""
        self.places = {request.request_id: at for at, request in enumerate(requests)}
        """Of the requests, by name."""
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | Failure] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """What comes, until every request has its output; raises `Failure`."""
        num_left = len(self.requests)
        while num_left:
            event = await self._events.get()
            if isinstance(event, Failure):
                raise event
            num_left -= isinstance(event, RequestOutput)
            yield event

    def put(self, event: Event | Failure) -> None:
        """Adds an event; on the loop's thread."""
        self._events.put_nowait(event)


class EngineThread:
    """Runs an `LLM` on a thread of its own and starts it over where it fails.

    Its methods are for the event loop's thread; the engine is touched by its own thread alone.
    """

    def __init__(self, open_llm: Callable[[], LLM]) -> None:
        """Opens an `LLM` on the new thread, where all of its arrays are to be made.

        Raises what `open_llm` raises.
        """
        self.status: Status = "ready"
        self.num_restarts = 0
        """Times that the engine has failed."""
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._by_request: dict[str, Ticket] = {}
        """The tickets of the requests that the engine has; of its thread alone."""
        self._told: list[tuple[Ticket, Event | Failure]] = []
        self._open: set[Ticket] = set()
        self._is_stopping = False
        opened: Future[LLM] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(open_llm, opened), name="engine", daemon=True
        )
        self._thread.start()
        self.llm = opened.result()

    @property
    def num_open(self) -> int:
        """Prompts of clients that wait, or whose answer is on its way."""
        return sum(len(ticket.requests) for ticket in self._open)

    def stop(self) -> None:
        """Ends the thread after the step that runs; who still waits is told so."""
        self._is_stopping = True
        self._inbox.put(lambda: None)
        self._thread.join()

    def submit(self, requests: Sequence[PromptRequest], *, watched: bool) -> Ticket:
        """Hands requests to the engine. `close` the ticket whatever comes of it.

        Raises EngineFailure where the engine is gone for good.
        """
        ticket = Ticket(requests, watched=watched)
        self._open.add(ticket)
        try:
            self._hand_in(partial(self._add, ticket))
        except EngineFailure:
            self._open.discard(ticket)
            raise
        return ticket

    def close(self, ticket: Ticket) -> None:
        """Ends what is left of a ticket's requests: their rows are free with the next step."""
        if ticket in self._open:
            self._open.remove(ticket)
            self._inbox.put(partial(self._drop, ticket))

    async def call(self, action: Callable[[LLM], T]) -> T:
        """Does something with the `LLM` between two steps; raises what it raises."""
        done: Future[T] = Future()

        def act() -> None:
            try:
                done.set_result(action(self.llm))
            except Exception as error:
                done.set_exception(error)
            except BaseException as error:
                done.set_exception(EngineFailure(f"{type(error).__name__}: {error}"))
                raise

        self._hand_in(act)
        return await asyncio.wrap_future(done)

    def _hand_in(self, action: Callable[[], None]) -> None:
        self._inbox.put(action)
        # Asked only now: a thread that ends says so before it looks into its inbox for the last
        # time.
        if self.status in ("failed", "stopped"):
            raise EngineFailure(f"the engine has {self.status}")

    def _run(self, open_llm: Callable[[], LLM], opened: Future[LLM]) -> None:
        try:
            self.llm = open_llm()
            self._look_for_the_head()
        except BaseException as error:
            _let_go()
            opened.set_exception(error)
            return
        opened.set_result(self.llm)
        while not self._is_stopping and self.status != "failed":
            try:
                self._serve()
            except BaseException as error:  # Whatever it is, there are clients who wait.
                _log.exception("the engine failed")
                self._start_over(f"{type(error).__name__}: {error}".partition("\n")[0])
        if self.status != "failed":
            self.status = "stopped"
        while not self._inbox.empty():
            # What the engine cannot do any more must not keep the others from being told.
            with suppress(BaseException):
                self._inbox.get()()
        for ticket in self._open.copy():
            self._tell(ticket, EngineFailure(f"the engine has {self.status}"))
        self._deliver()
        with suppress(BaseException):
            self.llm.text_engine.abort_all()
        _let_go()

    def _look_for_the_head(self) -> None:
        """Finds what embeddings are read from, which takes a forward, before anyone asks."""
        with suppress(ModelError):
            _ = self.llm.engine.admission.embedding_size

    def _serve(self) -> None:
        while not self._is_stopping:
            engine = self.llm.text_engine
            self._take(waits=not engine.engine.has_unfinished)
            if engine.engine.has_unfinished:
                for output in engine.step():
                    self._tell(self._by_request.pop(output.request_id), output)
            self._deliver()

    def _take(self, *, waits: bool) -> None:
        """Does what the event loop has asked for; waits for it where there is nothing else."""
        if waits:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _add(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            on_delta = partial(self._tell, ticket) if ticket.watched else None
            self._by_request[request.request_id] = ticket
            try:
                refused = self.llm.text_engine.add(request, on_delta)
            except Exception as error:  # A request that nobody has thought of fails alone.
                _log.exception("a request could not be taken")
                self._drop(ticket)
                self._tell(ticket, RequestFailure(f"{type(error).__name__}: {error}"))
                return
            if refused is not None:
                del self._by_request[request.request_id]
                self._tell(ticket, refused)

    def _drop(self, ticket: Ticket) -> None:
        for request in ticket.requests:
            if self._by_request.pop(request.request_id, None) is not None:
                self.llm.text_engine.abort(request.request_id)

    def _tell(self, ticket: Ticket, event: Event | Failure) -> None:
        self._told.append((ticket, event))

    def _deliver(self) -> None:
        """Gives what a step has brought to the event loops, at one go."""
        told, self._told = self._told, []
        for loop in {ticket.loop for ticket, _ in told}:
            # A loop that is closed has nobody left who waits.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_put, [it for it in told if it[0].loop is loop])

    def _fail_all(self, reason: str) -> None:
        for ticket in set(self._by_request.values()):
            self._tell(ticket, EngineFailure(reason))
        self._by_request.clear()
        self._deliver()

    def _start_over(self, reason: str) -> None:
        self.status = "restarting"
        self._fail_all(reason)
        self.num_restarts += 1
        for attempt in range(_MOST_RESTARTS):
            try:
                self.llm.restart()
                self._look_for_the_head()
            except BaseException:
                _log.exception("a new engine could not be made")
                time.sleep(attempt * _SECONDS_BETWEEN_RESTARTS)
            else:
                self.status = "ready"
                return
        self.status = "failed"


def _put(told: Sequence[tuple[Ticket, Event | Failure]]) -> None:
    for ticket, event in told:
        ticket.put(event)


def _let_go() -> None:
    """Leaves nothing of MLX to do, or to destroy, to a process that may be ending.

    A thread that has called a compiled function destroys its cache after it has been joined,
    and takes the interpreter for that; one that ends meanwhile aborts. MLX asks for
    `clear_streams` at the end of each thread
    (https://github.com/ml-explore/mlx/pull/4373).
    """
    import mlx.core as mx  # Not before runner.llm, which brings the BLAS.

    with suppress(BaseException):
        mx.synchronize()
        mx.clear_streams()
