"""The shipped word problems: what the script writes, and what a reward can check."""

import json
from collections import Counter

from runner.data.arithmetic import NUM_PROBLEMS, PATH, as_jsonl, problems


def test_the_file_is_what_the_script_writes() -> None:
    assert PATH.read_text() == as_jsonl(problems())


def test_problems_differ_and_have_whole_answers() -> None:
    rows = [json.loads(line) for line in PATH.read_text().splitlines()]
    assert len(rows) == len({row["question"] for row in rows}) == NUM_PROBLEMS == 200
    assert all(row.keys() == {"question", "answer", "kind"} for row in rows)
    assert all(row["answer"] == str(int(row["answer"])) for row in rows)
    assert all(1 <= int(row["answer"]) <= 60 for row in rows)
    assert not any("{" in row["question"] for row in rows)


def test_every_kind_is_there_and_easy_ones_most() -> None:
    kinds = Counter(row["kind"] for row in problems())
    assert kinds.keys() == {"addition", "subtraction", "multiplication", "division", "two_steps"}
    assert kinds["addition"] + kinds["subtraction"] > NUM_PROBLEMS / 2


def test_fewer_problems_are_the_first_of_them() -> None:
    assert problems(5) == problems()[:5]
