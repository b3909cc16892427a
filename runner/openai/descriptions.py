"""What each field of a request body does, and the values that it may have: for people and for
clients that read schemas."""

from collections.abc import Mapping
from typing import Any

from runner.openai.fields import Endpoint, Kind

DESCRIPTIONS: Mapping[str, str] = {
    "add_generation_prompt": "Begins the assistant's turn behind the messages; true unless given.",
    "add_special_tokens": "Adds the tokens that the tokenizer puts around a text.",
    "allowed_token_ids": "The only token ids that a completion may hold.",
    "bad_words": "Words that a completion never holds.",
    "best_of": "The same number as `n`, or nothing.",
    "cache_salt": "Taken and not used: no answer shows what the prefix cache holds.",
    "chat_template_kwargs": "Further variables of the chat template.",
    "continue_final_message": "Goes on with the last message instead of beginning a new one.",
    "dimensions": "Keeps the first so many components, scaled to length 1 again.",
    "documents": "Documents for chat templates that read them.",
    "echo": "Puts the prompt before the completion, with its logprobs where they are asked for.",
    "encoding_format": "`float`, or `base64` for the bytes of little-endian float32.",
    "frequency_penalty": "Subtracted from a token's logit for each time the completion holds it.",
    "ignore_eos": "Goes on past the model's end-of-sequence tokens.",
    "include_stop_str_in_output": "Leaves the stop string at the end of the text.",
    "input": "A text, a list of token ids, or a list of either, 2048 at most.",
    "logit_bias": "What is added to logits, by token id; -100 to 100 each.",
    "logprobs": "For completions the number of alternatives shown for each token, 0 to 100, the "
    "token itself beside them; for chat true or false.",
    "max_completion_tokens": "Another name of `max_tokens`.",
    "max_tokens": "Tokens of a completion at most; 0 with `echo` only scores the prompt. Unless "
    "given 16 for a completion, and what the context holds for a chat completion.",
    "messages": "The conversation: objects with a role and a content, a text or a list of text "
    "parts, and what else the chat template reads.",
    "metadata": "Taken and not used.",
    "min_p": "Drops tokens less likely than this fraction of the most likely one.",
    "min_tokens": "Tokens before the first that may end a completion.",
    "model": "A name of the model or of a loaded adapter; unless given, the model.",
    "n": "Completions of each prompt.",
    "presence_penalty": "Subtracted from the logits of tokens that the completion holds.",
    "priority": "Lower goes first among the requests that wait.",
    "prompt": "A text, a list of token ids, or a list of either.",
    "prompt_cache_key": "Taken and not used: whatever begins alike is shared.",
    "prompt_logprobs": "Alternatives shown for each token of the prompt, 0 to 100.",
    "repetition_penalty": "Makes tokens that the prompt or the completion holds less likely where "
    "above 1.",
    "request_id": "Taken and not used: the header X-Request-Id names a request.",
    "return_token_ids": "Shows the token ids of prompts and completions.",
    "return_token_strs": "Shows the text of each token as well.",
    "return_tokens_as_token_ids": "Writes tokens as `token_id:17` in logprobs.",
    "safety_identifier": "Taken and not used.",
    "seed": "The same request with the same seed gets the same answer.",
    "skip_special_tokens": "Leaves special tokens out of the text; true unless given.",
    "stop": "Strings that end a completion.",
    "stop_token_ids": "Token ids that end a completion, besides the model's own.",
    "stream": "Sends the answer in pieces, as it grows.",
    "stream_options": "`include_usage` counts the tokens in a last piece.",
    "temperature": "Divides the logits; 0 takes the most likely token.",
    "tokens": "The token ids.",
    "top_k": "Keeps the k most likely tokens; 0 or -1 keeps all.",
    "top_logprobs": "Alternatives shown for each token, 0 to 100; needs `logprobs`.",
    "top_p": "Keeps the smallest set of most likely tokens with at least this mass.",
    "user": "Taken and not used.",
}
"""By the name of the field, in the order of the alphabet."""

_COUNT, _ALTERNATIVES = {"minimum": 1}, {"minimum": 0, "maximum": 100}
_PENALTY = {"minimum": -2, "maximum": 2}
_TOKEN_ID = {"type": "integer", "minimum": 0}
_TEXT_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
_FULL_TEXT = {"type": "string", "minLength": 1}


def _full_list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"type": "string"},
        "content": {"anyOf": [{"type": ["string", "null"]}, _full_list(_TEXT_PART)]},
    },
    "anyOf": [
        {"required": ["content"], "properties": {"content": {"type": ["string", "array"]}}},
        {
            "required": ["tool_calls"],
            "properties": {"tool_calls": {"type": "array", "minItems": 1}},
        },
    ],
}
_PROMPT = {
    "anyOf": [
        _FULL_TEXT,
        _full_list(_FULL_TEXT),
        _full_list(_TOKEN_ID),
        _full_list(_full_list(_TOKEN_ID)),
    ]
}

_NARROWED: Mapping[str, Mapping[str, Any]] = {
    "best_of": _COUNT,
    "dimensions": _COUNT,
    "frequency_penalty": _PENALTY,
    "input": _PROMPT,
    "logit_bias": {"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
    "max_completion_tokens": _COUNT,
    "max_tokens": {"minimum": 0},
    "messages": _full_list(_MESSAGE),
    "min_p": {"minimum": 0, "maximum": 1},
    "min_tokens": {"minimum": 0},
    "n": _COUNT,
    "presence_penalty": _PENALTY,
    "prompt": _PROMPT,
    "prompt_logprobs": _ALTERNATIVES,
    "repetition_penalty": {"exclusiveMinimum": 0},
    "stream_options": {
        "properties": {"include_usage": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "temperature": {"minimum": 0},
    "tokens": {"items": _TOKEN_ID},
    "top_k": {"minimum": -1},
    "top_logprobs": _ALTERNATIVES,
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
}
"""What the value of a field is held to beside its kind."""


def body_schema(endpoint: Endpoint) -> dict[str, Any]:
    """The bodies that an endpoint takes, in the words of JSON Schema.

    What hangs together with another field, or with the model, is in the descriptions alone.
    """
    needed = endpoint.prompt_field
    fields = {
        name: _field(name, kind, may_be_null=name != needed)
        for name, kind in endpoint.fields.items()
    }
    neutral = {
        name: {
            "description": "Cannot be followed; taken where it asks for nothing.",
            "enum": [*allowed, None],
        }
        for name, allowed in endpoint.neutral.items()
    }
    return {
        "type": "object",
        "required": [needed] if needed else [],
        "properties": dict(sorted((fields | neutral).items())),
        "additionalProperties": False,
    }


def _field(name: str, kind: Kind, *, may_be_null: bool) -> dict[str, Any]:
    shown = dict(kind.schema)
    if name == "prompt" and shown.get("type") == "string":
        narrowed: Mapping[str, Any] = {}  # A text alone, which may be empty.
    elif name == "logprobs" and shown.get("type") == "integer":
        narrowed = _ALTERNATIVES
    else:
        narrowed = _NARROWED.get(name, {})
    shown |= narrowed
    if may_be_null and "type" in shown:
        shown["type"] = [shown["type"], "null"]
    elif may_be_null and "anyOf" in shown:
        shown["anyOf"] = [*shown["anyOf"], {"type": "null"}]
    return {"description": DESCRIPTIONS[name]} | shown
