"""Token ids of a finished request as text: completions, alternatives, the prompt's own tokens."""

from dataclasses import replace
from typing import Any

from runner.engine.stop import TextStream
from runner.models.token_bytes import TokenBytes
from runner.text_offsets import text_of, text_offsets
from runner.types import (
    Completion,
    Logprob,
    RequestOutput,
    SamplingParams,
    TextTokens,
    TokenLogprobs,
)


class Texts:
    """Turns token ids into text with one tokenizer (of mlx-lm's wrapper)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._token_texts: dict[int, str] = {}
        self._token_bytes = TokenBytes(tokenizer)

    def prompt_logprobs(
        self, scored: TokenLogprobs, prompt_token_ids: list[int]
    ) -> list[dict[int, Logprob] | None]:
        """Each prompt token and its alternatives, in vLLM's shape."""
        steps: list[dict[int, Logprob] | None] = [None] * scored.start
        for place, token_id in enumerate(prompt_token_ids[scored.start :]):
            step = {token_id: Logprob(scored.logprobs[place], scored.ranks[place])}
            top = zip(scored.top_token_ids[place], scored.top_logprobs[place], strict=True)
            for rank, (other, logprob) in enumerate(top, 1):
                step.setdefault(other, Logprob(logprob, rank))
            steps.append(self.with_text(step))
        return steps

    def completion(self, completion: Completion, params: SamplingParams) -> str:
        """The text of a sample, without what ended it unless that is asked for."""
        token_ids, stop = completion.token_ids, completion.stop_reason
        drop = completion.finish_reason == "stop" and not params.include_stop_str_in_output
        if drop and not isinstance(stop, str):
            token_ids = token_ids[:-1]
        text = self.decode(token_ids, skip_special_tokens=params.skip_special_tokens)
        # -1 where a tokenizer tidies spaces, and so decodes a whole text unlike its parts.
        first = self._first_place(stop, completion, params) if isinstance(stop, str) else 0
        if isinstance(stop, str) and (end := text.find(stop, first)) >= 0:
            text = text[: end if drop else end + len(stop)]
        return text

    def echo(self, output: RequestOutput) -> None:
        """Puts the prompt before each of its completions, whose texts are there."""
        prompt, given = output.prompt, output.prompt_token_ids
        if prompt is None:
            prompt = text_of(given, self._token_bytes)
        scored = output.prompt_token_logprobs
        logprobs = [None] * len(given) if scored is None else scored.with_nulls()
        offsets = [*text_offsets(prompt, given, self._token_bytes)]
        for sample in output.outputs:
            own = text_offsets(sample.text, sample.token_ids, self._token_bytes)
            sample.echoed = TextTokens(
                token_ids=[*given, *sample.token_ids],
                logprobs=[*logprobs, *sample.raw_logprobs],
                text_offsets=[*offsets, *(len(prompt) + offset for offset in own)],
            )
            sample.text = prompt + sample.text

    def _first_place(self, stop: str, completion: Completion, params: SamplingParams) -> int:
        """Where in the text its stop string can begin: `min_tokens` passes over earlier ones."""
        stream = TextStream(self.decode, skip_special_tokens=params.skip_special_tokens)
        passed = "".join(stream.push(i) for i in completion.token_ids[: params.min_tokens])
        return max(0, len(passed) - len(stop) + 1)

    def with_text(self, step: dict[int, Logprob]) -> dict[int, Logprob]:
        """A step's logprobs, each with its token's text."""
        return {
            token_id: replace(logprob, decoded_token=self._token_text(token_id))
            for token_id, logprob in step.items()
        }

    def _token_text(self, token_id: int) -> str:
        if token_id not in self._token_texts:
            text = self.decode([token_id], skip_special_tokens=False)
            self._token_texts[token_id] = text
        return self._token_texts[token_id]

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Token ids as text."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text
