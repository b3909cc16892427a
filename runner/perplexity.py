"""Perplexity: which tokens are scored in which context, and the numbers that come of the sums.

Pure policy over counts. A *stream* is what is cut into windows: the tokens of a document, or of all
of them, each document behind the prefix. No perplexity is ever averaged: sums are divided once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from runner.data.summary import Moments
from runner.errors import ParameterError

Mode = Literal["document", "concat"]
LastWindow = Literal["full", "short", "dropped"]
DEFAULT_WINDOW = 2048
"""Where a model states no context of its own."""

_LLAMA_WINDOW = 512


@dataclass(frozen=True, kw_only=True)
class _Preset:
    """What another tool's definition fixes; the rest may be chosen."""

    mode: Mode
    prefix: str | None
    last_window: LastWindow = "full"
    words: str = "whitespace"
    fixes_stride: bool = True


_PRESETS = {
    # lm_eval.utils.get_rolling_token_windows with context_len=1, then make_disjoint_window.
    "lm_eval": _Preset(mode="document", prefix=None, words="lm_eval"),
    # tools/perplexity/perplexity.cpp: disjoint chunks, of which the second half is scored.
    "llama_cpp": _Preset(mode="concat", prefix="if_added", last_window="dropped"),
    # The Transformers documentation, "Perplexity of fixed-length models".
    "hf_stride": _Preset(mode="concat", prefix="none", last_window="short", fixes_stride=False),
}


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the definition needs to know of a model and its tokenizer."""

    bos: int | None
    eos: int | None
    adds_bos: bool
    """Whether the tokenizer puts a bos before any text."""
    max_model_len: int | None


@dataclass(frozen=True, kw_only=True)
class Definition:
    """Everything that decides which number is meant; it is written beside the numbers."""

    preset: str | None
    mode: Mode
    prefix: str
    """bos, eos or none: what comes before a document. It is context, and never scored."""
    prefix_token_id: int | None
    window: int
    """Tokens of a window: context, prefix and scored ones."""
    stride: int
    """Tokens that a window scores; the first window scores all but its first token."""
    last_window: LastWindow
    """full: reaches back as far as the others do; short: starts a stride after the one before."""
    words: str
    """How words are counted: whitespace, or as lm_eval does, which counts empty ends too."""

    @property
    def is_llama_cpp(self) -> bool:
        """Whether only the second halves of whole windows are scored."""
        return self.last_window == "dropped"

    def count_words(self, text: str) -> int:
        """The words of a text."""
        return len(re.split(r"\s+", text)) if self.words == "lm_eval" else len(text.split())

    def as_json(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """What was asked for, checked as far as that goes without a model."""

    preset: str | None = None
    mode: str | None = None
    prefix: str | None = None
    window: int | None = None
    stride: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("preset", tuple(_PRESETS)),
            ("mode", ("document", "concat")),
            ("prefix", ("bos", "eos", "none")),
        ):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise _refusal(name, value, f"{', '.join(allowed)}, or null")
        self._check_preset()
        for name in ("window", "stride"):
            value, least = getattr(self, name), 2 if name == "window" else 1
            if value is not None and (type(value) is not int or value < least):
                raise _refusal(name, value, f"a number of tokens, at least {least}, or null")
        if self.window is not None:
            self._check_stride(self.window)

    def definition(self, tokens: Tokens) -> Definition:
        """Fills in what the model decides; raises ParameterError where it cannot be done."""
        preset, limit = _PRESETS.get(self.preset or ""), tokens.max_model_len
        window = self.window or limit or DEFAULT_WINDOW
        if self.preset == "llama_cpp":
            window = self.window or min(_LLAMA_WINDOW, limit or _LLAMA_WINDOW)
        if limit is not None and window > limit:
            raise _refusal("window", window, f"at most {limit}, the context of the model")
        if window < 2:
            raise _refusal("window", window, "at least 2, which the context of the model is not")
        self._check_stride(window)
        last_window = preset.last_window if preset else "full"
        stride = self.stride or {"short": max(1, window // 2), "dropped": window}.get(
            last_window, window - 1
        )
        prefix, prefix_token_id = _prefix(preset.prefix if preset else self.prefix, tokens)
        return Definition(
            preset=self.preset,
            mode=preset.mode if preset else "concat" if self.mode == "concat" else "document",
            prefix=prefix,
            prefix_token_id=prefix_token_id,
            window=window,
            stride=stride,
            last_window=last_window,
            words=preset.words if preset else "whitespace",
        )

    def _check_preset(self) -> None:
        preset = _PRESETS.get(self.preset or "")
        fixed = ["mode", "prefix"] + ["stride"] * (preset is not None and preset.fixes_stride)
        for name in fixed if preset else []:
            if getattr(self, name) is not None:
                raise _refusal(name, getattr(self, name), f"null, as preset={self.preset} sets it")

    def _check_stride(self, window: int) -> None:
        if self.stride is not None and self.stride >= window:
            what = f"at most {window - 1}: the first token of a window of {window} is context"
            raise _refusal("stride", self.stride, what)


def _refusal(name: str, value: object, allowed: str) -> ParameterError:
    return ParameterError(f"job.{name}={value} is not allowed: {allowed}")


def _prefix(name: str | None, tokens: Tokens) -> tuple[str, int | None]:
    """The name and id of the prefix; without a name bos, or else eos, as lm_eval takes it."""
    if name == "if_added":
        name = "bos" if tokens.adds_bos else "none"
    if name is None:
        name = "bos" if tokens.bos is not None else "eos" if tokens.eos is not None else "none"
    if name == "none":
        return name, None
    token_id = tokens.bos if name == "bos" else tokens.eos
    if token_id is None:
        raise _refusal("prefix", name, "the tokenizer has no such token; choose another or none")
    return name, token_id


@dataclass(frozen=True, slots=True)
class Window:
    """The part of a stream that is forwarded at once; what lies before `first` is context."""

    start: int
    first: int
    end: int


def windows(length: int, definition: Definition) -> Iterator[Window]:
    """Cuts a stream of `length` tokens; every token but the first is scored once.

    With llama.cpp's definition only whole windows count, and their second halves.
    """
    size, stride = definition.window, definition.stride
    if definition.is_llama_cpp:
        for start in range(0, length - size + 1, size):
            if start + size // 2 + 1 < start + size:
                yield Window(start, start + size // 2 + 1, start + size)
        return
    start, first, end = 0, 1, min(size, length)
    while first < end:
        yield Window(start, first, end)
        first, end = end, min(end + stride, length)
        start = start + stride if definition.last_window == "short" else max(0, end - size)


def perplexity_numbers(columns: Mapping[str, Moments], definition: Definition) -> dict[str, Any]:
    """The numbers over a corpus, from the moments of the columns of its result rows.

    The standard errors take the tokens to be independent; that of the perplexity is by the delta
    method. Words and bytes are counted where every document has a text and is scored whole.
    """
    none = Moments()
    scored = columns.get("logprobs", none)
    documents, counts = columns.get("num_tokens", none), {}
    for unit in ("words", "bytes"):
        moments = columns.get(f"num_{unit}", none)
        is_counted = moments.count == documents.count > 0 and not definition.is_llama_cpp
        counts[unit] = round(moments.total) if is_counted else None
    mean, error = scored.mean, scored.standard_error
    token = _exp(-mean) if scored.count else None
    per_byte = _ratio(-scored.total, counts["bytes"])
    return {
        "documents": documents.count,
        "tokens": round(documents.total),
        "scored_tokens": scored.count,
        "words": counts["words"],
        "bytes": counts["bytes"],
        "sum_logprob": _finite(scored.total),
        "mean_logprob": _finite(mean) if scored.count else None,
        "mean_logprob_stderr": _finite(error),
        "token_perplexity": token,
        "token_perplexity_stderr": _finite(token * error) if token and error else None,
        "word_perplexity": _exp(_ratio(-scored.total, counts["words"])),
        "byte_perplexity": _exp(per_byte),
        "bits_per_byte": _finite(None if per_byte is None else per_byte / math.log(2)),
    }


def _ratio(total: float, count: int | None) -> float | None:
    return total / count if count else None


def _exp(exponent: float | None) -> float | None:
    try:
        return None if exponent is None else _finite(math.exp(exponent))
    except OverflowError:
        return None


def _finite(number: float | None) -> float | None:
    """The number, or None for one that JSON cannot hold."""
    return number if number is not None and math.isfinite(number) else None
