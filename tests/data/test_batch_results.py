"""The directory of a batch: every answer once, under the same options, whatever was torn."""

import json
from pathlib import Path
from typing import Any

import pytest

from runner.data.batch_results import BATCH_FILE, ERROR_FILE, OUTPUT_FILE, BatchResults
from runner.data.openai_batch import BadLine, BatchFile, BatchLine, answer_line
from runner.errors import DataError, OutputError

IDENTITY = {"sampling.temperature": 1.0, "sampling.stop": ("x",), "job.check_model": True}


def batch(place: Path, *names: str, prompt: str = "hi") -> BatchFile:
    """A batch file of one request per name, `!` for a line that is none."""
    lines = [
        "bad"
        if name == "!"
        else json.dumps(
            {
                "custom_id": name,
                "method": "POST",
                "url": "/v1/completions",
                "body": {"prompt": prompt},
            }
        )
        for name in names
    ]
    (place / "in.jsonl").write_text("\n".join(lines))
    return BatchFile(str(place / "in.jsonl"), urls=("/v1/completions",))


def answer(line: BatchLine | BadLine, *, status: int = 200) -> dict[str, Any]:
    if isinstance(line, BadLine):
        return line.answer
    response = {"status_code": status, "request_id": "r", "body": {"text": "é\u2028"}}
    error = {"code": "invalid_value", "message": "no", "param": None} if status >= 400 else None
    return answer_line(line.id, line.custom_id, response=response, error=error)


def results(place: Path, **changes: Any) -> BatchResults:
    (place / "out").mkdir(exist_ok=True)
    return BatchResults(place / "out", IDENTITY | changes)


def answered(place: Path, lines: BatchFile, *, failing: str = "") -> list[str]:
    """Answers what is not answered; the custom_ids of that."""
    run = results(place)
    todo = [line for line in lines if not run.is_done(line)]
    run.start()
    for line in todo:
        run.write(answer(line, status=400 if line.custom_id == failing else 200))
    run.close()
    return [str(line.custom_id) for line in todo]


def rows(place: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "out" / name).read_text().splitlines()]


def test_answers_and_errors_go_to_their_files(tmp_path: Path) -> None:
    answered(tmp_path, batch(tmp_path, "a", "!", "b", "c"), failing="b")
    assert [row["custom_id"] for row in rows(tmp_path, OUTPUT_FILE)] == ["a", "c"]
    assert [row["custom_id"] for row in rows(tmp_path, ERROR_FILE)] == [None, "b"]
    assert rows(tmp_path, OUTPUT_FILE)[0]["response"]["body"]["text"] == "é\u2028"
    again = results(tmp_path)
    assert again.num_answers == 2
    assert again.errors == {"invalid_json_line": 1, "invalid_value": 1}
    assert again.count(batch(tmp_path, "a", "!", "b", "c")) == (4, 4)


def test_every_line_is_one_line_to_every_reader(tmp_path: Path) -> None:
    answered(tmp_path, batch(tmp_path, "a", "b"))
    assert len((tmp_path / "out" / OUTPUT_FILE).read_text().splitlines()) == 2


def test_lines_may_come_go_and_move_between_runs(tmp_path: Path) -> None:
    assert answered(tmp_path, batch(tmp_path, "a", "!", "b")) == ["a", "None", "b"]
    assert answered(tmp_path, batch(tmp_path, "c", "b", "!", "a", "!")) == ["c", "None"]
    assert answered(tmp_path, batch(tmp_path, "a")) == []
    names = [row["custom_id"] for row in rows(tmp_path, OUTPUT_FILE)]
    assert sorted(names) == ["a", "b", "c"]


def test_a_malformed_line_that_is_mended_is_another_line(tmp_path: Path) -> None:
    lines = batch(tmp_path, "a", "b")
    whole = lines.path.read_text()
    lines.path.write_text(whole.replace("POST", "GET", 1))
    assert answered(tmp_path, lines) == ["a", "b"]
    assert answered(tmp_path, lines) == [], "its error is final"
    lines.path.write_text(whole)
    assert answered(tmp_path, lines) == ["a"]
    assert [row["custom_id"] for row in rows(tmp_path, OUTPUT_FILE)] == ["b", "a"]
    assert [row["error"]["code"] for row in rows(tmp_path, ERROR_FILE)] == ["invalid_method"]


@pytest.mark.parametrize("name", [OUTPUT_FILE, ERROR_FILE])
def test_cut_anywhere_the_next_run_makes_it_whole(name: str, tmp_path: Path) -> None:
    lines = batch(tmp_path, "a", "!", "b", "c")
    answered(tmp_path, lines, failing="c")
    whole = {file: (tmp_path / "out" / file).read_bytes() for file in (OUTPUT_FILE, ERROR_FILE)}
    for cut in range(0, len(whole[name]), 7):
        (tmp_path / "out" / name).write_bytes(whole[name][:cut])
        answered(tmp_path, lines, failing="c")
        assert (tmp_path / "out" / name).read_bytes() == whole[name]


def test_another_body_under_an_answered_custom_id_is_refused(tmp_path: Path) -> None:
    answered(tmp_path, batch(tmp_path, "a", "b"), failing="b")
    for name in ("a", "b"):
        with pytest.raises(DataError, match=f"'{name}'.* another body"):
            results(tmp_path).count(batch(tmp_path, name, prompt="other"))


def test_the_custom_id_of_a_duplicate_stays_that_of_the_first(tmp_path: Path) -> None:
    assert answered(tmp_path, batch(tmp_path, "a", "a")) == ["a", "a"]
    assert answered(tmp_path, batch(tmp_path, "a", "a")) == []
    (first,), (second,) = rows(tmp_path, OUTPUT_FILE), rows(tmp_path, ERROR_FILE)
    assert first["custom_id"] == second["custom_id"] == "a" and first["id"] != second["id"]


def test_a_duplicate_that_alone_was_written_does_not_take_the_custom_id(tmp_path: Path) -> None:
    first, second = batch(tmp_path, "a", "a")
    run = results(tmp_path)
    run.start()
    run.write(answer(second))
    run.close()
    assert results(tmp_path).is_done(second) and not results(tmp_path).is_done(first)


def test_other_options_are_refused_by_name_once_there_are_answers(tmp_path: Path) -> None:
    for temperature in (1.0, 0.5):
        claimed = results(tmp_path, **{"sampling.temperature": temperature})
        claimed.start()
        claimed.close()
    (tmp_path / "out" / BATCH_FILE).unlink()
    answered(tmp_path, batch(tmp_path, "a"))
    with pytest.raises(OutputError, match=r"sampling.temperature: 1.0 -> 0.5; x: not set -> 2\)"):
        results(tmp_path, **{"sampling.temperature": 0.5, "x": 2})
    assert results(tmp_path).num_answers == 1


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("manifest.json", "{}", "another job"),
        ("part-00000.arrow", "", "another job"),
        (BATCH_FILE, "{", "not a batch"),
        (BATCH_FILE, '{"format_version": 9, "identity": {}}', "format_version 9"),
        (OUTPUT_FILE, '{"my": "file"}\n', "without batch.json"),
    ],
)
def test_somebody_elses_files_are_left_alone(
    file: str, content: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text(content)
    with pytest.raises(OutputError, match=words):
        results(tmp_path)
    assert (tmp_path / "out" / file).read_text() == content


def test_a_line_that_this_program_did_not_write_is_named(tmp_path: Path) -> None:
    answered(tmp_path, batch(tmp_path, "a"))
    with open(tmp_path / "out" / OUTPUT_FILE, "a") as file:
        file.write("mine\n")
    with pytest.raises(OutputError, match=r"output.jsonl, line 2: not a line of this job"):
        results(tmp_path)


def test_custom_ids_of_any_text_come_back(tmp_path: Path) -> None:
    names = ['quo"te', "back\\slash\\", "é\u2028", '", "response": null', "line\nbreak"]
    assert answered(tmp_path, batch(tmp_path, *names)) == names
    assert answered(tmp_path, batch(tmp_path, *names)) == []
    with pytest.raises(DataError):
        results(tmp_path).count(batch(tmp_path, names[0], prompt="other"))


def test_it_is_time_to_commit_after_so_many_lines(tmp_path: Path) -> None:
    run = results(tmp_path)
    lines = list(batch(tmp_path, *map(str, range(64))))
    run.start()
    assert [run.write(answer(line)) for line in lines].index(True) == 63
    assert len(rows(tmp_path, OUTPUT_FILE)) == 64
    run.close()


def test_a_second_process_is_refused_before_it_reads_and_when_it_starts(tmp_path: Path) -> None:
    late, run = results(tmp_path), results(tmp_path)
    run.start()
    for refused in (lambda: results(tmp_path), late.start):
        with pytest.raises(OutputError, match=r"another process writes there \(pid \d+\)"):
            refused()
    run.write(answer(next(iter(batch(tmp_path, "a")))))
    run.close()
    with pytest.raises(OutputError, match="another process has written it; start again"):
        late.start()
    late.close()
    assert results(tmp_path).num_answers == 1


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no lines"):
        results(tmp_path).count(batch(tmp_path))
