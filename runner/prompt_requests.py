"""What a caller gives an `LLM` -> requests, named by their place and keyed by what they hold."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from runner.encoding import in_batches
from runner.errors import ParameterError
from runner.prompts import encode_prompts, prompt_digest
from runner.types import Prompt, PromptRequest, RequestOutput, SamplingParams

PromptLike: TypeAlias = str | Mapping[str, Any]
"""A text, `{"prompt": text}` or `{"prompt_token_ids": [...]}`."""


def as_prompt(prompt: PromptLike | Prompt) -> Prompt:
    """Reads one of the forms that a prompt may have; raises ParameterError for another."""
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(text=prompt)
    if set(prompt) == {"prompt_token_ids"}:
        return Prompt(token_ids=list(prompt["prompt_token_ids"]))
    if set(prompt) == {"prompt"}:
        return Prompt(text=prompt["prompt"])
    raise ParameterError(
        f"a prompt has the keys {sorted(prompt)}: it is a str, "
        "{'prompt': str} or {'prompt_token_ids': [int]}"
    )


def prompt_requests(
    prompts: Sequence[PromptLike | Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    *,
    call: int,
    adapter: str | None | Sequence[str | None] = None,
) -> list[PromptRequest]:
    """Requests named by their place; a repeated prompt is told apart by its occurrence.

    `call` counts the calls of an `LLM`: without a seed each of them draws anew. `adapter` is the
    name for all or a list with one for each. Raises ParameterError for a list of another length,
    and for what is no prompt.
    """
    asked = [as_prompt(prompt) for prompt in prompts]
    adapters = adapter_names(adapter, len(prompts))
    given = sampling_params or SamplingParams()
    params = [given] * len(prompts) if isinstance(given, SamplingParams) else list(given)
    if len(params) != len(prompts):
        raise ParameterError(
            f"sampling_params has {len(params)} entries for {len(prompts)} prompts"
        )
    seen: Counter[str] = Counter()
    requests = []
    for index, (prompt, one, name) in enumerate(zip(asked, params, adapters, strict=True)):
        digest = prompt_digest(prompt)
        drawn = f"call {call}/" if one.seed is None else ""
        key = f"{drawn}{digest}/{seen[digest]}"
        seen[digest] += 1
        requests.append(
            PromptRequest(request_id=str(index), prompt=prompt, params=one, key=key, adapter=name)
        )
    return requests


def encoded_requests(
    requests: Iterable[PromptRequest | RequestOutput], tokenizer: Any
) -> Iterator[PromptRequest | RequestOutput]:
    """Encodes the prompts of requests, many at once and as they are needed; passes outputs on."""
    for batch in in_batches(requests, _length):
        asked = [it for it in batch if isinstance(it, PromptRequest)]
        encoded = iter(encode_prompts([it.prompt for it in asked], tokenizer))
        for it in batch:
            if isinstance(it, PromptRequest):
                yield replace(it, encoded=next(encoded))
            else:
                yield it


def _length(request: PromptRequest | RequestOutput) -> int:
    return request.prompt.length if isinstance(request, PromptRequest) else 0


def adapter_names(given: str | None | Sequence[str | None], count: int) -> list[str | None]:
    """An adapter's name, or None, for each of `count` prompts or texts.

    Raises ParameterError for a list of another length.
    """
    names = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(names) != count:
        raise ParameterError(f"adapter has {len(names)} entries for {count} prompts")
    return names
