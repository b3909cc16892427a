"""The fields of a request body: what each may hold, and which of them this program can follow.

The fields are OpenAI's and vLLM's. One that cannot be followed is refused unless its value asks for
nothing; a field with null is a field left out.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from runner.openai.errors import ApiError


@dataclass(frozen=True)
class Kind:
    """A kind of JSON value."""

    what: str
    allows: Callable[[Any], bool]
    schema: Mapping[str, Any] = field(default_factory=dict)
    """The same in the words of JSON Schema; empty for anything."""


def is_int(value: Any) -> bool:
    """Whether a JSON value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list_of(is_item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a JSON value is a list of nothing but what `is_item` accepts."""
    return lambda value: isinstance(value, list) and all(map(is_item, value))


def is_text(value: Any) -> bool:
    """Whether a JSON value is a string."""
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or is_int(value)


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_number(bias) for bias in value.values())


def _listed(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


_STRING, _WHOLE, _FLOAT = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_TEXT = Kind("a string", is_text, _STRING)
_INT = Kind("an integer", is_int, _WHOLE)
_NUMBER = Kind("a number", _is_number, _FLOAT)
_BOOL = Kind("true or false", lambda value: isinstance(value, bool), {"type": "boolean"})
_OBJECT = Kind("an object", _is_object, {"type": "object"})
_OBJECTS = Kind("a list of objects", is_list_of(_is_object), _listed({"type": "object"}))
_INTS = Kind("a list of integers", is_list_of(is_int), _listed(_WHOLE))
_TEXTS = Kind(
    "a string or a list of strings",
    lambda it: is_text(it) or is_list_of(is_text)(it),
    {"anyOf": [_STRING, _listed(_STRING)]},
)
_BIAS = Kind(
    "an object of numbers by token id",
    _is_bias,
    {"type": "object", "additionalProperties": _FLOAT},
)
_PROMPT = Kind(
    "anything",
    lambda value: True,
    {"anyOf": [_STRING, *map(_listed, (_STRING, _WHOLE, _listed(_WHOLE)))]},
)
_MESSAGES = Kind(
    "anything",
    lambda value: True,
    _listed(
        {"type": "object", "required": ["role"], "properties": {"role": _STRING, "content": {}}}
    ),
)

SAMPLING: Mapping[str, Kind] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _NUMBER),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), _NUMBER),
    **dict.fromkeys(("n", "seed", "max_tokens", "min_tokens", "top_k"), _INT),
    **dict.fromkeys(("stop", "bad_words"), _TEXTS),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids"), _INTS),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"), _BOOL),
    "logit_bias": _BIAS,
}
"""Fields that `SamplingParams` has under the same name."""

_SHARED: Mapping[str, Kind] = {
    **SAMPLING,
    **dict.fromkeys(("model", "user", "safety_identifier", "prompt_cache_key"), _TEXT),
    **dict.fromkeys(("request_id", "cache_salt"), _TEXT),
    **dict.fromkeys(("return_token_ids", "return_tokens_as_token_ids"), _BOOL),
    "prompt_logprobs": _INT,
    "metadata": _OBJECT,
}

ONLINE: Mapping[str, Kind] = {"stream": _BOOL, "stream_options": _OBJECT, "priority": _INT}
"""Fields that mean something to a server alone."""

_TEXT_ONLY = {"type": "text"}
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "priority": (0,),
    "response_format": (_TEXT_ONLY,),
    "spaces_between_special_tokens": (True,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "logprob_token_ids": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "thinking_token_budget": (),
    "repetition_detection": (),
    "stream_options": (),
}
"""Fields that cannot be followed, each with the values that ask for nothing."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What one URL takes."""

    prompt_field: str
    """The one field that a body has to have; empty for none."""
    fields: Mapping[str, Kind]
    neutral: Mapping[str, tuple[Any, ...]]

    @property
    def online(self) -> "Endpoint":
        """The same where a client waits for the answer."""
        neutral = {name: allowed for name, allowed in self.neutral.items() if name not in ONLINE}
        return replace(self, fields={**self.fields, **ONLINE}, neutral=neutral)


COMPLETIONS = Endpoint(
    prompt_field="prompt",
    fields={**_SHARED, "prompt": _PROMPT, "logprobs": _INT, "best_of": _INT, "echo": _BOOL},
    neutral={**_NEUTRAL, "suffix": ("",), "add_special_tokens": (True,)},
)
CHAT = Endpoint(
    prompt_field="messages",
    fields={
        **_SHARED,
        "messages": _MESSAGES,
        "logprobs": _BOOL,
        "top_logprobs": _INT,
        "max_completion_tokens": _INT,
        "chat_template_kwargs": _OBJECT,
        "add_generation_prompt": _BOOL,
        "continue_final_message": _BOOL,
        "documents": _OBJECTS,
    },
    neutral={
        **_NEUTRAL,
        "echo": (False,),
        "add_special_tokens": (False,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": ("medium",),
        "web_search_options": (),
        "store": (False,),
        "service_tier": ("auto", "default"),
    },
)

_ENCODINGS = ("float", "base64")
EMBEDDINGS = Endpoint(
    prompt_field="input",
    fields={
        **dict.fromkeys(("model", "user"), _TEXT),
        "input": _PROMPT,
        "encoding_format": Kind(
            "'float' or 'base64'",
            _ENCODINGS.__contains__,
            {"type": "string", "enum": [*_ENCODINGS, None]},
        ),
        "dimensions": _INT,
    },
    neutral={"truncate_prompt_tokens": (), "add_special_tokens": (True,), "priority": (0,)},
)


TOKENIZE = Endpoint(
    prompt_field="",
    fields={
        **dict.fromkeys(("model", "prompt"), _TEXT),
        **dict.fromkeys(("add_special_tokens", "return_token_strs"), _BOOL),
        **dict.fromkeys(("add_generation_prompt", "continue_final_message"), _BOOL),
        "messages": _MESSAGES,
        "chat_template_kwargs": _OBJECT,
    },
    neutral={"tools": ([],)},
)
DETOKENIZE = Endpoint(prompt_field="tokens", fields={"model": _TEXT, "tokens": _INTS}, neutral={})


def checked_fields(body: Mapping[str, Any], endpoint: Endpoint) -> dict[str, Any]:
    """The fields of a body that can be followed and are not null; raises `ApiError`."""
    checked = {}
    for name, value in body.items():
        if name not in endpoint.fields and name not in endpoint.neutral:
            raise _unknown(name, endpoint)
        if value is None:
            continue
        if name in endpoint.neutral:
            _check_neutral(name, value, endpoint.neutral[name])
            continue
        kind = endpoint.fields[name]
        if not kind.allows(value):
            what = f"Invalid type for '{name}': {shortened(value)} is not {kind.what}."
            raise ApiError(what, code="invalid_type", param=name)
        # What JSON writes as 1e999 is no number that anything could be done with.
        if isinstance(value, float) and not math.isfinite(value):
            raise ApiError(f"'{name}' is not finite.", code="invalid_value", param=name)
        checked[name] = value
    if endpoint.prompt_field and endpoint.prompt_field not in checked:
        name = endpoint.prompt_field
        what = f"Missing required parameter: '{name}'."
        raise ApiError(what, code="missing_required_parameter", param=name)
    return checked


def _check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    if value not in neutral:
        what = f"Unsupported parameter: '{name}' cannot be {shortened(value)} here."
        raise ApiError(what, code="unsupported_parameter", param=name)


def _unknown(name: str, endpoint: Endpoint) -> ApiError:
    close = difflib.get_close_matches(name, [*endpoint.fields, *endpoint.neutral], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    what = f"Unknown parameter: {shortened(name)}.{hint}"
    return ApiError(what, code="unknown_parameter", param=name)


def shortened(value: Any) -> str:
    """A value as it may stand in a message: not all of a long one."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
