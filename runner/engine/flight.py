"""What is under way in an engine: the prompts in prefill, those that are ready, the rows."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from runner.engine.batch import Batch, InFlight
from runner.engine.lora import Adapter
from runner.engine.model_runner import ModelRunner, Prefill, ReadyPrompt
from runner.engine.recovery import Unfinished
from runner.engine.sequence import Sequence
from runner.engine.speculation import Launched
from runner.types import Completion, Request


@dataclass(slots=True, eq=False)
class Flight:
    """The requests between the scheduler and their end."""

    batch: Batch
    prefill: Prefill | None = None
    ready: list[ReadyPrompt] = field(default_factory=list)
    """Prefilled, with samples that have not started."""
    scored: list[ReadyPrompt] = field(default_factory=list)
    """Prefilled, with nothing to sample; to be read with the next step."""
    launched: InFlight | Launched | None = None
    """The step that is not read yet."""
    ended: list[Completion] = field(default_factory=list)
    """What never started, to be handed out with the next step."""

    @classmethod
    def of(cls, runner: ModelRunner) -> "Flight":
        """Nothing under way yet, with a batch for what `runner` forwards."""
        return cls(Batch(vocab_size=runner.vocab_size, num_spare=runner.num_spare))

    def emptied(self) -> "Flight":
        """The same with nothing under way; what has ended is still to be handed out."""
        vocab_size, num_spare = self.batch.vocab_size, self.batch.num_spare
        return Flight(Batch(vocab_size=vocab_size, num_spare=num_spare), ended=self.ended)

    @property
    def fills(self) -> bool:
        """Whether prompts are on their way into slots."""
        return self.prefill is not None or bool(self.ready)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is under way."""
        waiting = self.prefill or self.ready or self.scored or self.ended
        return not (waiting or self.batch.sequences)

    @property
    def prefilling(self) -> list[Request]:
        """The requests in prefill."""
        return self.prefill.requests if self.prefill is not None else []

    @property
    def adapters(self) -> set[Adapter]:
        """Those that samples use which have started or may start any time."""
        users: list[Sequence | ReadyPrompt] = [*self.batch.sequences, *self.ready]
        return {it.adapter for it in users if it.adapter is not None}

    def go_on(
        self,
        is_changed: Callable[[Adapter | None], bool],
        now: Callable[[Adapter | None], tuple[Adapter | None, int]],
    ) -> list[Request]:
        """Lets what uses certain adapters go on under the weights of `now`.

        Returns the requests whose prefill has to start over: it is dropped.
        """
        users: list[Sequence | ReadyPrompt] = [*self.batch.sequences, *self.ready]
        for it in users:
            if is_changed(it.adapter):
                it.go_on_under(*now(it.adapter))
        if self.prefill is None or not is_changed(self.prefill.adapter):
            return []
        dropped, self.prefill = self.prefill.requests, None
        return dropped

    def give_up(self, names: Collection[str], indices: Callable[[Request], list[int]]) -> None:
        """Drops a prefill whose requests, by name, are all to be ended; they count as ready.

        `indices` gives the samples of a request that are to be started.
        """
        if all(request.request_id in names for request in self.prefilling):
            self.ready += [ReadyPrompt(it, [], 0, indices=indices(it)) for it in self.prefilling]
            self.prefill = None

    def end(
        self, names: Collection[str], new_sequence: Callable[[ReadyPrompt, int], Sequence]
    ) -> list[Sequence]:
        """Takes requests out by name, but for those in prefill; their unfinished samples."""
        ended = [s for s in self.batch.sequences if s.request.request_id in names]
        for sequence in ended:
            self.batch.release(sequence)
        for queue in (self.ready, self.scored):
            for prompt in [p for p in queue if p.request.request_id in names]:
                ended += [new_sequence(prompt, i) for i in prompt.indices]
                queue.remove(prompt)
        return ended

    @property
    def prefilled(self) -> list[Unfinished]:
        """Prompts that are prefilled, with their samples that have not started."""
        return [(prompt.request, prompt.indices) for prompt in (*self.ready, *self.scored)]
