"""What is sent, in the words of JSON Schema."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Schema: TypeAlias = dict[str, Any]

TEXT: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_MAY_BE_TEXT: Schema = {"type": ["string", "null"]}


def listed(items: Mapping[str, Any], **more: Any) -> Schema:
    """A list of something."""
    return {"type": "array", "items": items} | more


def whole(properties: Mapping[str, Any], optional: Iterable[str] = ()) -> Schema:
    """An object with these properties and no others."""
    required = [name for name in properties if name not in set(optional)]
    return {
        "type": "object",
        "required": required,
        "properties": dict(properties),
        "additionalProperties": False,
    }


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


ERROR = whole(
    {
        "error": whole(
            {
                "message": TEXT,
                "type": {"enum": ["invalid_request_error", "server_error"]},
                "param": _MAY_BE_TEXT,
                "code": TEXT,
            }
        )
    }
)
"""Every failure."""

USAGE = whole(dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), _COUNT))

_PROMPT_LOGPROBS = listed(
    _or_null(
        {
            "type": "object",
            "additionalProperties": whole(
                {"logprob": _NUMBER, "rank": _or_null(_WHOLE), "decoded_token": _MAY_BE_TEXT}
            ),
        }
    )
)
_PROMPT_FIELDS: Schema = {
    "prompt_token_ids": listed(_COUNT),
    "prompt_logprobs": _PROMPT_LOGPROBS,
}
_ENDING: Schema = {
    "finish_reason": {"enum": ["stop", "length", "abort"]},
    "stop_reason": {"type": ["string", "integer", "null"]},
}
_COMPLETION_LOGPROBS = whole(
    {
        "text_offset": listed(_COUNT),
        "token_logprobs": listed({"type": ["number", "null"]}),
        "tokens": listed(TEXT),
        "top_logprobs": listed(
            _or_null({"type": "object", "additionalProperties": _NUMBER}),
        ),
    }
)
_CHAT_TOKEN: Schema = {
    "token": TEXT,
    "bytes": listed({"type": "integer", "minimum": 0, "maximum": 255}),
    "logprob": _NUMBER,
}
_CHAT_LOGPROBS = whole(
    {
        "content": listed(whole(_CHAT_TOKEN | {"top_logprobs": listed(whole(_CHAT_TOKEN))})),
        "refusal": {"type": "null"},
    }
)


def _answer(kind: str, choices: Schema, more: Schema | None = None) -> Schema:
    return whole(
        {
            "id": TEXT,
            "object": {"const": kind},
            "created": _WHOLE,
            "model": TEXT,
            "choices": listed(choices, minItems=1),
            "usage": USAGE,
        }
        | (more or {}),
        optional=more or (),
    )


COMPLETION = _answer(
    "text_completion",
    whole(
        {"index": _COUNT, "text": TEXT, "logprobs": _or_null(_COMPLETION_LOGPROBS)}
        | _ENDING
        | {"token_ids": listed(_COUNT)}
        | _PROMPT_FIELDS,
        optional=("token_ids", *_PROMPT_FIELDS),
    ),
)
CHAT_COMPLETION = _answer(
    "chat.completion",
    whole(
        {
            "index": _COUNT,
            "message": whole(
                {"role": {"const": "assistant"}, "content": TEXT, "refusal": {"type": "null"}}
            ),
            "logprobs": _or_null(_CHAT_LOGPROBS),
        }
        | _ENDING
        | {"token_ids": listed(_COUNT)},
        optional=("token_ids",),
    ),
    _PROMPT_FIELDS,
)
MODEL = whole(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "created": _WHOLE,
        "owned_by": TEXT,
        "root": _MAY_BE_TEXT,
        "parent": _MAY_BE_TEXT,
        "max_model_len": _or_null(_WHOLE),
    }
)
MODELS = whole({"object": {"const": "list"}, "data": listed(MODEL, minItems=1)})
TOKENS = whole(
    {
        "tokens": listed(_COUNT),
        "count": _COUNT,
        "max_model_len": _or_null(_WHOLE),
        "token_strs": listed(TEXT),
    },
    optional=("token_strs",),
)
DETOKENIZED = whole({"prompt": TEXT})
TOKENIZER_INFO = whole(
    dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), _MAY_BE_TEXT)
    | {
        # Some tokenizers have several templates by name.
        "chat_template": {"type": ["string", "object", "null"]},
        "vocab_size": _COUNT,
        "model_max_length": _or_null(_WHOLE),
    }
)
STATUS = whole({"status": {"enum": ["ready", "restarting", "failed", "stopped"]}})
VERSION = whole({"version": TEXT})

EMBEDDINGS = whole(
    {
        "object": {"const": "list"},
        "data": listed(
            whole(
                {
                    "object": {"const": "embedding"},
                    "index": _COUNT,
                    "embedding": {"anyOf": [listed(_NUMBER), TEXT]},
                }
            )
        ),
        "model": TEXT,
        "usage": whole(dict.fromkeys(("prompt_tokens", "total_tokens"), _COUNT)),
    }
)
