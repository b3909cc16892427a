"""The log file: what happened, never what was asked or what is secret."""

import re
from pathlib import Path

import pytest

from runner.run_log import LOG_FILE, RunLog, public_options

CONFIG = {
    "job": {"_target_": "x", "fail": None},
    "data": {"path": "in.jsonl", "prompt_template": "a secret plan", "system_prompt": "be kind"},
    "sampling": {"temperature": 0.5, "stop": [], "stop_token_ids": [1, 2], "max_tokens": 7},
    "reward": {"api_key": "k-1", "auth_token": "t-1", "password": "p-1", "url": "u"},
    "tracker": None,
}


def test_options_without_prompts_secrets_and_what_is_not_set() -> None:
    assert public_options(CONFIG) == {
        "data.path": "in.jsonl",
        "sampling.temperature": 0.5,
        "sampling.stop_token_ids": [1, 2],
        "sampling.max_tokens": 7,
        "reward.url": "u",
    }


def test_a_line_has_time_level_event_and_values(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.info("commit", {"rows": 3, "speed": 1.23456789, "where": "two words", "none": ""})
    log.warning("two\n  lines")
    first, second = (tmp_path / LOG_FILE).read_text().splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(
        time + r" INFO commit rows=3 speed=1.23457 where='two words' none=''", first
    )
    assert re.fullmatch(time + " WARNING two lines", second)


def test_it_goes_on_after_what_is_there(tmp_path: Path) -> None:
    for _ in range(2):
        RunLog(tmp_path).info("start")
    assert (tmp_path / LOG_FILE).read_text().count(" INFO start\n") == 2


@pytest.mark.parametrize("where", ["missing", "file"])
def test_a_log_that_cannot_be_written_ends_nothing(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    RunLog(tmp_path / where).info("start")
