"""A request body -> prompts and sampling parameters."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from runner.errors import ParameterError
from runner.openai.errors import ApiError
from runner.openai.fields import (
    CHAT,
    COMPLETIONS,
    SAMPLING,
    Endpoint,
    checked_fields,
    is_int,
    is_list_of,
    shortened,
)
from runner.openai.messages import chat_prompt
from runner.prompts import prompt_digest
from runner.types import Prompt, PromptRequest, SamplingParams

ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/completions": COMPLETIONS,
    "/v1/chat/completions": CHAT,
}
EMBEDDINGS_URL = "/v1/embeddings"
KNOWN_URLS = (*ENDPOINTS, EMBEDDINGS_URL)
"""What a line of a batch file may ask; `openai.embeddings` understands the last."""

MOST_SAMPLES = 16384
"""Completions that one request may ask for; vLLM's limit."""

MOST_WATCHED = 4096
"""Characters of stop strings, or of bad words, that a client who waits may ask for."""

_COMPLETION_MAX_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """A request body, understood: what to sample, and what the response has to show of it."""

    endpoint: Endpoint
    model: str | None
    """The name that the client gave; None where it gave none."""
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    has_seed: bool
    """Whether the body names a seed; otherwise `params` has the seed of the defaults."""
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    stream: bool = False
    """Whether the answer comes in pieces, as it grows."""
    include_usage: bool = False
    """Whether the last piece counts the tokens."""
    priority: int = 0

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat completion."""
        return self.endpoint.prompt_field == CHAT.prompt_field

    def prompt_requests(
        self, request_id: str, *, key: str, adapter: str | None = None
    ) -> list[PromptRequest]:
        """One request per prompt, named `request_id/0`, …, all with one adapter.

        Draws follow the body's seed and the prompt alone, so that the same request gives the same
        answer wherever it stands, as `LLM.generate` does; without a seed they follow `key`.
        """
        seen: Counter[str] = Counter()
        requests = []
        for place, prompt in enumerate(self.prompts):
            digest = prompt_digest(prompt)
            own_key = f"{digest}/{seen[digest]}" if self.has_seed else f"{key}/{place}"
            seen[digest] += 1
            requests.append(
                PromptRequest(
                    request_id=f"{request_id}/{place}",
                    prompt=prompt,
                    params=self.params,
                    key=own_key,
                    adapter=adapter,
                    priority=self.priority,
                )
            )
        return requests


def parse_request(
    url: str, body: Mapping[str, Any], defaults: SamplingParams, *, is_online: bool = False
) -> ApiRequest:
    """Understands the body of a request to `url`, one of `ENDPOINTS`; raises `ApiError`.

    `defaults` are the values of the fields that the body leaves out. A `max_tokens` of None there
    is OpenAI's default: 16 for a completion, what the context holds for a chat completion.
    `is_online` takes the fields for a client that waits, too.
    """
    endpoint = ENDPOINTS[url].online if is_online else ENDPOINTS[url]
    fields = checked_fields(body, endpoint)
    is_chat = ENDPOINTS[url] is CHAT
    prompts = (chat_prompt(fields),) if is_chat else as_prompts("prompt", fields["prompt"])
    params = _chat_params(fields, defaults) if is_chat else _completion_params(fields, defaults)
    if is_online:
        _check_watched(params)
    if params.n * len(prompts) > MOST_SAMPLES:
        what = f"'n' is too large: {MOST_SAMPLES} completions of a request are allowed."
        raise ApiError(what, code="invalid_value", param="n")
    return ApiRequest(
        endpoint=endpoint,
        model=fields.get("model"),
        prompts=prompts,
        params=params,
        has_seed="seed" in fields,
        return_token_ids=fields.get("return_token_ids", False),
        return_tokens_as_token_ids=fields.get("return_tokens_as_token_ids", False),
        stream=fields.get("stream", False),
        include_usage=_include_usage(fields),
        priority=fields.get("priority", 0),
    )


def _check_watched(params: SamplingParams) -> None:
    """What is looked for after each token of one client holds up the tokens of all others."""
    for name in ("stop", "bad_words"):
        if sum(map(len, getattr(params, name))) > MOST_WATCHED:
            what = f"'{name}' is too long: {MOST_WATCHED} characters in all are allowed."
            raise ApiError(what, code="invalid_value", param=name)


def _include_usage(fields: Mapping[str, Any]) -> bool:
    """What `stream_options` says, which may say no more than that."""
    options = fields.get("stream_options", {})
    if options and not fields.get("stream", False):
        what = "'stream_options' needs 'stream' to be true."
        raise ApiError(what, code="invalid_value", param="stream_options")
    for name, value in options.items():
        if name != "include_usage" or not isinstance(value, bool):
            what = f"Invalid 'stream_options': {shortened({name: value})}; include_usage is known."
            raise ApiError(what, code="invalid_value", param="stream_options")
    return bool(options.get("include_usage", False))


def parameter_error(error: ParameterError, names: Mapping[str, str]) -> ApiError:
    """What a client is told of sampling parameters that cannot be; `names` has those that its
    body spells otherwise."""
    found = re.match(r"\w+", str(error))
    name = found[0] if found else ""
    if name not in {*SAMPLING, "logprobs", "prompt_logprobs"}:
        return ApiError(str(error), code="invalid_value")
    param = names.get(name, name)
    return ApiError(param + str(error)[len(name) :], code="invalid_value", param=param)


def _completion_params(fields: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    if defaults.max_tokens is None:
        # A default of min_tokens may go beyond OpenAI's 16, and is none of the client's doing.
        least = max(_COMPLETION_MAX_TOKENS, fields.get("min_tokens", defaults.min_tokens))
        fields = {"max_tokens": least} | dict(fields)
    logprobs, echo = fields.get("logprobs"), fields.get("echo", False)
    if fields.get("max_tokens") == 0 and not echo:
        what = "'max_tokens' can be 0 only with 'echo'."
        raise ApiError(what, code="invalid_value", param="max_tokens")
    shown = {"logprobs": logprobs, "echo": echo}
    params = _params(fields, defaults, shown=shown, names={})
    if fields.get("best_of", params.n) != params.n:
        what = "Unsupported parameter: 'best_of' can only be 'n' here."
        raise ApiError(what, code="unsupported_parameter", param="best_of")
    return params


def _chat_params(fields: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    names = {"logprobs": "top_logprobs"}
    if "max_completion_tokens" in fields:
        if "max_tokens" in fields:
            what = "'max_tokens' and 'max_completion_tokens' cannot both be set."
            raise ApiError(what, code="invalid_value", param="max_tokens")
        fields = dict(fields) | {"max_tokens": fields["max_completion_tokens"]}
        names["max_tokens"] = "max_completion_tokens"
    if "top_logprobs" in fields and not fields.get("logprobs", False):
        what = "'top_logprobs' needs 'logprobs' to be true."
        raise ApiError(what, code="invalid_value", param="top_logprobs")
    logprobs = fields.get("top_logprobs", 0) if fields.get("logprobs", False) else None
    return _params(fields, defaults, shown={"logprobs": logprobs}, names=names)


def _params(
    fields: Mapping[str, Any],
    defaults: SamplingParams,
    *,
    shown: Mapping[str, Any],
    names: Mapping[str, str],
) -> SamplingParams:
    taken = {*SAMPLING, "prompt_logprobs"}
    given = {name: value for name, value in fields.items() if name in taken}
    try:
        return replace(defaults, **given, **shown)
    except ParameterError as error:
        raise parameter_error(error, names) from error


def as_prompts(name: str, value: Any) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of either, as OpenAI has it, of the field `name`."""
    if isinstance(value, str) and value:
        return (Prompt(text=value),)
    if isinstance(value, list) and value:
        if _is_token_ids(value):
            return (Prompt(token_ids=value),)
        if all(isinstance(item, str) and item for item in value):
            return tuple(Prompt(text=item) for item in value)
        if all(map(_is_token_ids, value)):
            return tuple(Prompt(token_ids=item) for item in value)
    what = "is not a text, a list of token ids, or a list of one of these, none of them empty."
    message = f"Invalid '{name}': {shortened(value)} {what}"
    raise ApiError(message, code="invalid_value", param=name)


def _is_token_ids(value: Any) -> bool:
    return value != [] and is_list_of(is_int)(value)
