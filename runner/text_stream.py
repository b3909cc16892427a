"""The text of a sample while it grows: what may be shown of it after each step."""

from collections.abc import Sequence
from dataclasses import dataclass

from runner.engine.sequence import Sequence as Row
from runner.engine.stop import Decode, TextStream
from runner.types import Completion, Logprob, RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """What a sample has got since it was last told of."""

    output: RequestOutput
    """Of its request; the prompt is whole, its logprobs too, the samples are not."""
    index: int
    """Which of the request's samples."""
    text: str
    """Without the part that is no whole character, or may be the beginning of a stop string."""
    token_ids: list[int]
    """They come with the last of the text that they make."""
    raw_logprobs: list[float]
    logprobs: list[dict[int, Logprob]]
    """An entry for each token where `SamplingParams.logprobs` asks, else empty."""
    completion: Completion | None = None
    """The whole sample, once it has finished."""


class SampleStream:
    """One sample's text, cut where it may be shown; all pieces are the finished sample's text."""

    def __init__(self, output: RequestOutput, decode: Decode, params: SamplingParams) -> None:
        self._output = output
        self._stream = TextStream(decode, skip_special_tokens=params.skip_special_tokens)
        self._stop = params.stop
        self._num_read = self._num_told = 0
        self._shown = self._held = ""
        self._whole: list[tuple[int, int]] = []
        """Where text and tokens that are not told yet end together: in characters, in tokens."""

    def advance(self, row: Row) -> TextDelta | None:
        """What is new of a sample in flight; None where nothing is.

        A row that has started over, for want of memory, has told some of its tokens before.
        """
        for token_id in row.token_ids[self._num_read :]:
            self._num_read += 1
            if piece := self._stream.push(token_id):
                self._held += piece
                self._whole.append((len(self._shown) + len(self._held), self._num_read))
        shown = len(self._held) - _num_held(self._held, self._stop)
        text, self._held = self._held[:shown], self._held[shown:]
        self._shown += text
        start = end = self._num_told
        while self._whole and self._whole[0][0] <= len(self._shown):
            end = self._whole.pop(0)[1]
        self._num_told = end
        if not text and start == end:
            return None
        return TextDelta(
            output=self._output,
            index=row.index,
            text=text,
            token_ids=row.token_ids[start:end],
            raw_logprobs=row.raw_logprobs[start:end],
            logprobs=row.logprobs[start:end],
        )

    def finish(self, completion: Completion) -> TextDelta:
        """The rest of a sample, whose text is there."""
        start = self._num_told
        # What is shown cannot be taken back where a tokenizer tidies up the text as a whole.
        return TextDelta(
            output=self._output,
            index=completion.index,
            text=completion.text[len(self._shown) :],
            token_ids=completion.token_ids[start:],
            raw_logprobs=completion.raw_logprobs[start:],
            logprobs=(completion.logprobs or [])[start:],
            completion=completion,
        )


def _num_held(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of a text that a stop string begins with."""
    sizes = (size for it in stop for size in range(1, len(it)) if text.endswith(it[:size]))
    return max(sizes, default=0)
