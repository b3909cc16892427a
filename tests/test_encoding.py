"""Many texts encoded at once are what each of them is by itself."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from runner import LLM
from runner.encoding import MOST_CHARACTERS, Text, encode_texts, in_batches
from runner.errors import PromptError
from runner.prompts import encode_prompt, encode_prompts
from runner.types import Prompt

HALF = "half a pair: \ud83d"
TEXTS = [
    "", "a", "hello world", HALF, "</s> and <s> in a text", "<|im_start|>user\n<|im_end|>", " ",
    "\n\n\t  spaces ", "🤷🏽‍♀️ emoji 👍", "日本語と中文", "e\u0301 é", "\x00\x7f",
    "long " * 3000, "a",
]  # fmt: skip
PROMPTS = [
    *(Prompt(text=text) for text in TEXTS),
    Prompt(messages=[{"role": "user", "content": "hi 👍 </s>"}]),
    Prompt(messages=[{"role": "boom", "content": "refused by the tiny template"}]),
    Prompt(messages=[{"role": "user", "content": HALF}]),
    Prompt(token_ids=(5, 3)),
    Prompt(text="the last"),
]


def alone(text: Text, tokenizer: Any) -> list[int] | None:
    """What the tokenizer gives; None where it refuses."""
    try:
        return list(tokenizer.encode(text.text, add_special_tokens=text.special))
    except (TypeError, ValueError):
        assert text.text == HALF
        return None


def check_texts(tokenizer: Any) -> None:
    texts = [Text(text, special) for text in TEXTS for special in (True, False)]
    found = encode_texts(texts, tokenizer)
    for text, ids in zip(texts, found, strict=True):
        assert (None if isinstance(ids, PromptError) else ids) == alone(text, tokenizer), text
    assert sum(isinstance(ids, PromptError) for ids in found) == 2, "the text that is none"


def check_prompts(tokenizer: Any) -> None:
    found = encode_prompts(PROMPTS, tokenizer)
    for prompt, encoded in zip(PROMPTS, found, strict=True):
        try:
            assert encode_prompt(prompt, tokenizer) == encoded
            if prompt.text is not None:
                assert encoded == (prompt.text, list(tokenizer.encode(prompt.text)))
        except PromptError as error:
            assert isinstance(encoded, PromptError) and str(encoded) == str(error)


def test_a_batch_gives_what_each_gives_alone(llm: LLM) -> None:
    check_texts(llm.tokenizer)
    check_prompts(llm.tokenizer)
    failed = [it for it in encode_prompts(PROMPTS, llm.tokenizer) if isinstance(it, PromptError)]
    reasons = ("has no tokens", "is not Unicode", "no booms", "is not Unicode")
    assert len(failed) == 4
    assert all(reason in str(it) for reason, it in zip(reasons, failed, strict=True))
    (empty,) = encode_prompts([Prompt(text="")], llm.tokenizer, special=False)
    assert str(empty) == "the text has no tokens"


@pytest.mark.real_model
def test_a_batch_of_a_real_tokenizer_too(smollm2: LLM) -> None:
    check_texts(smollm2.tokenizer)
    check_prompts(smollm2.tokenizer)


def test_texts_go_to_the_tokenizer_in_batches(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one only where a text of the batch cannot be encoded, or nothing encodes many."""
    one_by_one: list[str] = []
    plain = PreTrainedTokenizerBase.encode

    def encode(self: Any, text: str, **options: Any) -> list[int]:
        one_by_one.append(text)
        return plain(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "encode", encode)
    texts = [Text(f"text {number}") for number in range(300)]
    whole = encode_texts(texts, llm.tokenizer)
    assert not one_by_one and len(whole) == 300
    assert encode_texts([*texts[:9], Text(HALF), *texts[9:]], llm.tokenizer)[10:] == whole[9:]
    assert len(one_by_one) == 128, "the others are encoded at once all the same"


def test_a_tokenizer_that_encodes_in_its_own_way_is_asked_for_each_text(llm: LLM) -> None:
    inner = copy.deepcopy(llm.tokenizer.encode.__self__)

    class Own(type(inner)):  # type: ignore[misc]
        def encode(self, text: str, **options: Any) -> list[int]:
            return [len(text)]

    inner.__class__ = Own
    assert encode_texts([Text("abc"), Text("ab")], inner) == [[3], [2]]


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError])
def test_a_tokenizer_that_fails_on_a_text_is_no_fault_of_the_text(error: type) -> None:
    class Broken:
        def encode(self, text: str, **options: Any) -> list[int]:
            raise error("a bug")

    with pytest.raises(error, match="a bug"):
        encode_texts([Text("a"), Text("b")], Broken())


def test_a_batch_has_no_more_than_fits_and_is_read_when_it_is_needed() -> None:
    read: list[int] = []

    def lengths() -> Any:
        for length in [1] * 200 + [MOST_CHARACTERS] * 2 + [MOST_CHARACTERS // 2 + 1] * 3:
            read.append(length)
            yield length

    batches = in_batches(lengths(), lambda length: length)
    assert len(next(batches)) == 128 == len(read)
    assert [len(batch) for batch in batches] == [73, 1, 2, 1]
    assert list(in_batches([], len)) == []


FORKED = """
import os, sys
from runner.models.blas import load_blas
load_blas()
from transformers import AutoTokenizer
from runner.encoding import Text, encode_texts
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = [Text(f"text {number}") for number in range(500)]
whole = encode_texts(texts, tokenizer)
child = os.fork()
if not child:
    os._exit(encode_texts(texts, tokenizer) != whole)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.environ["TOKENIZERS_PARALLELISM"])
print(sum(number * id for number, ids in enumerate(whole) for id in ids))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_warns_of_nothing_and_encodes_the_same(llm: LLM, tiny_directory: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tiny_directory)],
        env=environment | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "fork" not in done.stderr, done.stderr
    whole = encode_texts([Text(f"text {number}") for number in range(500)], llm.tokenizer)
    total = sum(number * id for number, ids in enumerate(whole) for id in ids)
    assert done.stdout.split() == ["0", "true", str(total)]


@pytest.mark.parametrize("given", ["false", "true"])
def test_what_the_user_says_of_parallelism_stands(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
    check_texts(llm.tokenizer)
    assert os.environ["TOKENIZERS_PARALLELISM"] == given
