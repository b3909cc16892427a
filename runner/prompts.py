"""Row -> prompt -> tokens: columns and templates on one side, the chat template on the other."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from runner.encoding import Text, encode_texts
from runner.errors import ParameterError, PromptError
from runner.types import Encoded, Message, Prompt

_RESERVED_KWARGS = frozenset({"tokenize", "return_dict", "return_tensors"})

_environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)


class PromptBuilder:
    """Makes the prompt of a row from one of its columns, or from a Jinja template over them all.

    `chat` sends text as a user message; a prompt column that holds a list is taken as messages.
    `tools_column` has the tools of a chat, a list of JSON schemas or its text.
    Raises `ParameterError` for options that cannot work together.
    """

    def __init__(
        self,
        *,
        prompt_column: str | None = None,
        messages_column: str | None = None,
        token_ids_column: str | None = None,
        template: str | None = None,
        chat: bool = False,
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools_column: str | None = None,
    ) -> None:
        self._tools_column = tools_column
        self._prompt_column = prompt_column
        self._messages_column = messages_column
        self._token_ids_column = token_ids_column
        self._chat = chat
        self._system_prompt = system_prompt
        self._chat_template_kwargs = dict(chat_template_kwargs or {})
        _check_sources(
            prompt_column=prompt_column,
            messages_column=messages_column,
            token_ids_column=token_ids_column,
            prompt_template=template,
        )
        self._check_chat_options()
        self._template = None if template is None else _compiled(template)

    def __call__(self, row: Mapping[str, Any]) -> Prompt:
        """Returns the prompt of one row; raises `PromptError` where it has none."""
        prompt = self._prompt(row)
        if self._tools_column is None:
            return prompt
        tools = _checked_tools(row.get(self._tools_column), self._tools_column)
        return replace(prompt, chat_template_kwargs={**prompt.chat_template_kwargs, **tools})

    def _prompt(self, row: Mapping[str, Any]) -> Prompt:
        if self._template is not None:
            return self._from_text(_rendered(self._template, row), "prompt_template")
        if self._messages_column is not None:
            return self._from_messages(_value(row, self._messages_column), self._messages_column)
        if self._token_ids_column is not None:
            column = self._token_ids_column
            return Prompt(token_ids=_checked_token_ids(_value(row, column), column))
        assert self._prompt_column is not None, "there is exactly one source"
        value = _value(row, self._prompt_column)
        if _is_list(value):
            return self._from_messages(value, self._prompt_column)
        return self._from_text(value, self._prompt_column)

    def _check_chat_options(self) -> None:
        if self._chat and self._token_ids_column is not None:
            raise ParameterError("chat=True cannot be used with token_ids_column")
        is_chat = self._chat or self._messages_column is not None
        for option in ("system_prompt", "chat_template_kwargs", "tools_column"):
            value = getattr(self, f"_{option}")
            if value and not is_chat:
                raise ParameterError(f"{option}={value!r} needs chat=True or a messages_column")
        reserved = _RESERVED_KWARGS.intersection(self._chat_template_kwargs)
        if reserved:
            raise ParameterError(f"chat_template_kwargs cannot set {', '.join(sorted(reserved))}")

    def _from_text(self, text: Any, source: str) -> Prompt:
        if not isinstance(text, str):
            raise PromptError(f"{source}: the prompt is {type(text).__name__}, not text")
        if not text:
            raise PromptError(f"{source}: the prompt is empty")
        if self._chat:
            return self._from_messages([{"role": "user", "content": text}], source)
        return Prompt(text=text)

    def _from_messages(self, value: Any, source: str) -> Prompt:
        messages = _checked_messages(value, source)
        if self._system_prompt:
            messages = [{"role": "system", "content": self._system_prompt}, *messages]
        return Prompt(messages=messages, chat_template_kwargs=self._chat_template_kwargs)


def _check_sources(**sources: str | None) -> None:
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ParameterError(
            f"a prompt needs one of {', '.join(sources)}; given: {', '.join(given) or 'none'}"
        )


def _compiled(template: str) -> jinja2.Template:
    try:
        return _environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ParameterError(f"prompt_template, line {error.lineno}: {error.message}") from error


def _rendered(template: jinja2.Template, row: Mapping[str, Any]) -> str:
    try:
        return template.render(row)
    # A template is a program of the user's: a filter of it may raise anything on some row.
    except Exception as error:
        raise PromptError(f"prompt_template: {error} (columns: {', '.join(row)})") from error


def _value(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise PromptError(f"the row has no column {column!r}, only {', '.join(row)}")
    if row[column] is None:
        raise PromptError(f"{column}: the prompt is null")
    return row[column]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _checked_token_ids(value: Any, source: str) -> list[int]:
    if not _is_list(value) or not value:
        raise PromptError(f"{source}: {value!r} is not a list of token ids")
    for token_id in value:
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise PromptError(f"{source}: {token_id!r} is not a token id")
    return list(value)


def _checked_messages(value: Any, source: str) -> list[Message]:
    if not _is_list(value) or not value:
        raise PromptError(f"{source}: {value!r} is not a list of messages")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(f"{source}: message {index} is not a {{role, content}}: {message!r}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise PromptError(f"{source}: message {index} has no content: {message!r}")
        messages.append(_without_nulls(message))
    return messages


def _checked_tools(value: Any, source: str) -> dict[str, Any]:
    """The tools of a row as a variable of the chat template; none where the column is null."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise PromptError(f"{source}: the tools are not JSON: {error}") from error
    if tools is None:
        return {}
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise PromptError(f"{source}: {tools!r} is not a list of tools")
    return {"tools": _without_nulls(tools)} if tools else {}


def _without_nulls(value: Any) -> Any:
    """Drops null keys: columnar files give every message the keys of all the others."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if _is_list(value) else value


def encode_prompt(prompt: Prompt, tokenizer: Any) -> Encoded:
    """Returns what `encode_prompts` does of one prompt; raises its `PromptError`."""
    (encoded,) = encode_prompts([prompt], tokenizer)
    if isinstance(encoded, PromptError):
        raise encoded
    return encoded


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, *, special: bool = True
) -> list[Encoded | PromptError]:
    """Returns for each prompt the text that is tokenised, None for token ids, and the token ids.

    Text gets the special tokens that the tokenizer adds, unless `special` is false; a chat
    template writes its own. Where the chat template fails, or no token comes out, there is the
    `PromptError` that says so; the other prompts are what they are without it.
    """
    written = [_written(prompt, tokenizer, special=special) for prompt in prompts]
    token_ids = iter(encode_texts([it for it in written if isinstance(it, Text)], tokenizer))
    what = "prompt" if special else "text"
    found: list[Encoded | PromptError] = []
    for it in written:
        encoded = _with_text(it, next(token_ids)) if isinstance(it, Text) else it
        is_empty = not isinstance(encoded, PromptError) and not encoded[1]
        found.append(PromptError(f"the {what} has no tokens") if is_empty else encoded)
    return found


def _written(prompt: Prompt, tokenizer: Any, *, special: bool) -> Text | Encoded | PromptError:
    """The text of a prompt; the token ids of one that has no text."""
    if prompt.token_ids is not None:
        return None, list(prompt.token_ids)
    if prompt.messages is None:
        return Text(prompt.text or "", special)
    try:
        return Text(_templated(prompt, tokenizer), special=False)
    except PromptError as error:
        return error


def _with_text(text: Text, token_ids: list[int] | PromptError) -> Encoded | PromptError:
    return token_ids if isinstance(token_ids, PromptError) else (text.text, token_ids)


def _templated(prompt: Prompt, tokenizer: Any) -> str:
    options = {"add_generation_prompt": True, **prompt.chat_template_kwargs, "tokenize": False}
    if options.get("tools") and "tools" not in str(tokenizer.chat_template):
        raise PromptError("the model's chat template takes no tools")
    try:
        return str(tokenizer.apply_chat_template(_known(prompt.messages, tokenizer), **options))
    # A chat template is a program of the model's: it refuses messages with any kind of error.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise PromptError(f"the model's chat template: {reason}") from error


def _known(messages: Sequence[Message] | None, tokenizer: Any) -> list[Message]:
    """Messages whose roles a chat template knows: `developer` is `system` to most of them."""
    given = list(messages or ())
    if "developer" in str(getattr(tokenizer, "chat_template", "")):
        return given
    return [
        {**message, "role": "system"} if message.get("role") == "developer" else message
        for message in given
    ]


def encode_bad_words(words: Sequence[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids of each word, as vLLM tokenises `bad_words`.

    A word is taken as at the start of a text, and as after a space where that gives as many tokens
    with another first one.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        start, inside = (
            tuple(tokenizer.encode(space + word.lstrip(), add_special_tokens=False))
            for space in ("", " ")
        )
        found.append(start)
        if len(inside) == len(start) and inside[:1] != start[:1]:
            found.append(inside)
    return tuple(found)


def prompt_digest(prompt: Prompt) -> str:
    """Returns 16 hex digits that name the content of a prompt (BLAKE2b of canonical JSON)."""
    content: dict[str, Any]
    if prompt.messages is not None:
        options = dict(prompt.chat_template_kwargs)
        content = {"messages": list(prompt.messages), "chat_template_kwargs": options}
    elif prompt.token_ids is not None:
        content = {"token_ids": list(prompt.token_ids)}
    else:
        content = {"text": prompt.text}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()
