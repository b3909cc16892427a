"""Chat messages as clients send them -> messages as a chat template reads them."""

from collections.abc import Mapping
from typing import Any

from runner.openai.errors import ApiError
from runner.openai.fields import shortened
from runner.types import Message, Prompt

_RESERVED_KWARGS = frozenset(
    {"tokenize", "return_dict", "return_tensors", "conversation", "chat_template", "tools"}
)


def chat_prompt(fields: Mapping[str, Any]) -> Prompt:
    """The prompt of a chat completion's checked fields; raises `ApiError`."""
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise _invalid(f"{shortened(messages)} is not a list of messages.")
    checked = [_checked(message, place) for place, message in enumerate(messages)]
    return Prompt(messages=checked, chat_template_kwargs=_template_kwargs(fields))


def _template_kwargs(fields: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = dict(fields.get("chat_template_kwargs", {}))
    for name in sorted(_RESERVED_KWARGS & kwargs.keys()):
        what = f"'chat_template_kwargs' cannot set '{name}'."
        raise ApiError(what, code="invalid_value", param="chat_template_kwargs")
    begins = fields.get("add_generation_prompt")
    goes_on = fields.get("continue_final_message", False)
    if goes_on and begins:
        what = "'continue_final_message' and 'add_generation_prompt' exclude each other."
        raise ApiError(what, code="invalid_value", param="continue_final_message")
    if goes_on:
        kwargs |= {"add_generation_prompt": False, "continue_final_message": True}
    elif begins is not None:
        kwargs["add_generation_prompt"] = begins
    if "documents" in fields:
        kwargs["documents"] = fields["documents"]
    return kwargs


def _checked(message: Any, place: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _invalid(f"message {place} is not a {{role, content}}.")
    # Templates ask whether a key is there; clients send null for one that is not.
    kept = {key: value for key, value in message.items() if value is not None}
    if "content" in kept:
        kept["content"] = _text(kept["content"], place)
    elif not kept.get("tool_calls"):
        raise _invalid(f"message {place} has no content.")
    return kept


def _text(content: Any, place: int) -> str:
    """The text of a content: itself, or its parts, a line each as vLLM joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise _invalid(f"the content of message {place} is neither text nor a list of parts.")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise _invalid(f"message {place} has a part that is not text, and only text is read.")
        if part.get("type") != "text":
            raise _invalid(f"message {place} has a part that is not of the type 'text'.")
    return "\n".join(part["text"] for part in content)


def _invalid(what: str) -> ApiError:
    return ApiError(f"Invalid 'messages': {what}", code="invalid_value", param="messages")
