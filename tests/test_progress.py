import io
import sys

import pytest

from runner.progress import Progress
from runner.types import Completion, ErrorInfo, RequestOutput


def output(num_tokens: int, error: ErrorInfo | None = None) -> RequestOutput:
    sample = Completion(
        request_id="r",
        index=0,
        token_ids=[1] * num_tokens,
        raw_logprobs=[-1.0] * num_tokens,
        processed_logprobs=[-1.0] * num_tokens,
        finish_reason="length",
    )
    outputs = [] if error else [sample]
    return RequestOutput(
        request_id="r", prompt=None, prompt_token_ids=[], outputs=outputs, error=error
    )


def test_shows_rows_speed_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, initial=1) as progress:
        progress.update(output(50))
        progress.update(output(0, ErrorInfo("PromptError", "no tokens")))
    shown = capsys.readouterr().err
    assert "3/3" in shown and "tok/s" in shown and "1 error" in shown


def test_an_unknown_number_of_rows_is_counted_up(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(None) as progress:
        progress.update(output(5))
    assert "1 rows" in capsys.readouterr().err


def test_off_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, enabled=False) as progress:
        progress.update(output(5))
    assert capsys.readouterr().err == ""


def test_where_nobody_can_redraw_it_the_bar_is_lines_of_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress(9_999_999, initial=1_234_566) as progress:
        for _ in range(1234):
            progress.advance(10**6, failed=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(0 < len(line) <= 80 for line in lines)
    assert "1235800/9999999 rows" in lines[-1] and "1234 errors" in lines[-1]
    assert "\r" not in "".join(lines) and lines[-1].endswith(" left")


def test_on_a_terminal_it_is_redrawn_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    with Progress(200, initial=3) as progress:
        for _ in range(197):
            progress.advance(10, failed=False)
    shown = [state for state in terminal.getvalue().split("\r") if state.strip()]
    assert len(shown) >= 2 and max(len(state.rstrip("\n")) for state in shown) <= 80
    assert "200/200 rows" in shown[-1] and "tok/s" in shown[-1]
