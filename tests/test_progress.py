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
