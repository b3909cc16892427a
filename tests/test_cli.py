"""The command line as a user meets it: words, files of one's own, errors, help."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runner.arguments import parse_arguments
from runner.composition import choices
from runner.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "job": ["generate", "rollout"],
    "reward": ["none", "last_number", "my.reward"],
    "data": ["arithmetic", "custom"],
    "model": ["custom", "smollm2"],
    "sampling": ["default"],
}

MY_JOB = """
from omegaconf import OmegaConf
from runner.errors import DataError

def run(config, *, answer, fail=None):
    if fail == "warning":
        import warnings
        warnings.warn("no optimised BLAS found")
    if fail == "usage":
        raise DataError("no rows in prompts.jsonl")
    if fail == "bug":
        raise RuntimeError("a bug")
    if fail == "interrupt":
        raise KeyboardInterrupt
    with open(f"{config.output.dir}/seen.yaml", "w") as file:
        file.write(OmegaConf.to_yaml(config))
    print("answer", answer, "n", config.sampling.n)
"""

MY_CONF = """\
# A job of my own.
_target_: my_job.run
# What it answers.
answer: 42
fail: null
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A working directory with a job of its own."""
    (tmp_path / "conf" / "job").mkdir(parents=True)
    (tmp_path / "conf" / "job" / "mine.yaml").write_text(MY_CONF)
    (tmp_path / "my_job.py").write_text(MY_JOB)
    return tmp_path


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a new interpreter that finds this checkout's `runner`."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def runner(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `runner` as its console script does: the working directory is not on the path."""
    code = "import sys; sys.path.pop(0); from runner.cli import main; main()"
    return python("-c", code, *words, cwd=cwd)


def refused(*words: str, cwd: Path) -> str:
    """The one line with which a command line is refused."""
    done = runner(*words, cwd=cwd)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.removeprefix("error: ").rstrip()


def overrides(*words: str) -> list[str]:
    return parse_arguments(list(words), GROUPS).overrides


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rollout"], ["job=rollout"]),
        (["job=rollout"], ["job=rollout"]),
        (["rollout", "sampling.n=4"], ["job=rollout", "sampling.n=4"]),
        (["sampling.n=4", "rollout"], ["sampling.n=4", "job=rollout"]),
        (["rollout", "~reward"], ["job=rollout", "~reward"]),
        (["rollout", "-m", "sampling.n=1,2"], ["job=rollout", "sampling.n=1,2", "M"]),
        (["--multirun", "rollout"], ["job=rollout", "M"]),
        (["data.path=a.jsonl"], ["data=custom", "data.path=a.jsonl"]),
        (["data=mine", "data.path=a.jsonl"], ["data=mine", "data.path=a.jsonl"]),
        (["model.path=org/name"], ["model=custom", "model.path=org/name"]),
        (["reward=rules.right"], ["reward=custom", "reward._target_=rules.right"]),
        (["reward=my.reward"], ["reward=my.reward"]),
        (["reward=last_number"], ["reward=last_number"]),
        (["reward=null"], ["reward='null'"]),
        (["sampling=5"], ["sampling='5'"]),
        (["sampling.seed=5"], ["sampling.seed=5"]),
    ],
)
def test_words_become_overrides(words: list[str], expected: list[str]) -> None:
    assert overrides(*words) == ["hydra.mode=MULTIRUN" if x == "M" else x for x in expected]


def test_flags_follow_the_words_wherever_they_stood() -> None:
    arguments = parse_arguments(["--cfg", "job", "rollout", "--resolve", "sampling.n=2"], GROUPS)
    assert arguments.overrides == ["job=rollout", "sampling.n=2"]
    assert arguments.flags == ["--cfg=job", "--resolve"]


@pytest.mark.parametrize("argv", [["--bogus"], ["--cfg", "everything"], ["rollout", "--cfg"]])
def test_an_unknown_flag_is_a_usage_error(argv: list[str]) -> None:
    with pytest.raises(UsageError, match="--bogus|--cfg"):
        parse_arguments(argv, GROUPS)


def test_a_job_of_ones_own_runs(workplace: Path) -> None:
    done = runner("mine", "sampling.n=3", cwd=workplace)
    assert (done.returncode, done.stdout, done.stderr) == (0, "answer 42 n 3\n", "")


def test_a_job_gets_a_complete_configuration(workplace: Path) -> None:
    runner("mine", "output.dir=here", cwd=workplace)
    seen = (workplace / "here" / "seen.yaml").read_text()
    assert f"dir: {workplace.resolve()}/here" in seen
    assert "${" not in seen and "???" not in seen
    assert [path.name for path in (workplace / "here").iterdir()] == ["seen.yaml"]


def test_results_lie_under_the_name_of_the_job(workplace: Path) -> None:
    runner("mine", cwd=workplace)
    (directory,) = (workplace / "outputs" / "mine").iterdir()
    assert (directory / "seen.yaml").is_file()


def test_a_sweep_names_its_runs_by_what_differs(workplace: Path) -> None:
    done = runner("mine", "-m", "job.answer=1,2", "sampling.n=5,6", cwd=workplace)
    assert done.stderr == ""
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    points = [(a, n) for a in (1, 2) for n in (5, 6)]
    assert answers == [f"answer {a} n {n}" for a, n in points]
    (sweep,) = (workplace / "outputs" / "mine").iterdir()
    found = sorted(path.parent.name for path in sweep.glob("*/seen.yaml"))
    assert found == [f"answer={a},n={n}" for a, n in points]


def test_module_and_script_are_the_same(workplace: Path) -> None:
    done = python("-m", "runner", "job=mine", "job.answer=7", cwd=workplace)
    assert done.stdout == runner("mine", "job.answer=7", cwd=workplace).stdout == "answer 7 n 1\n"


def test_a_file_in_the_working_directory_never_shadows_a_library(workplace: Path) -> None:
    (workplace / "json.py").write_text("raise SystemExit('shadowed')")
    (workplace / "mlx_lm.py").write_text("raise SystemExit('shadowed')")
    (workplace / "my_job.py").write_text("import json, sys\n" + MY_JOB)
    done = runner("mine", cwd=workplace)
    assert done.stdout == "answer 42 n 1\n", done.stderr


def test_the_checkout_adds_its_conf_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert "mine" not in choices()["job"]
    done = runner("--info", cwd=ROOT)
    assert "working-directory" not in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sampling.tempratur=1", "sampling.tempratur=1: no option sampling.tempratur; "
         "did you mean temperature? (choose from n, temperature, top_p"),
        ("+sampling.foo=1", "no option sampling.foo"),
        ("samplin=greedy", "samplin=greedy: no option samplin; did you mean sampling?"),
        ("sampling.n=abc", "sampling.n=abc: Value 'abc' of type 'str' could not be converted to I"),
        ("data.limit=3.5", "data.limit=3.5: Value '3.5' of type 'float' could not be converted"),
        ("sampling=gredy", "sampling=gredy: no such sampling; did you mean greedy? (choose from "
         "default, greedy, grpo, rollout, score)"),
        ("job=mein", "job=mein: no such job; did you mean mine? (choose from benchmark, co"),
        ("data=nope", "data=nope: no such data (choose from arithmetic, custom, human_eval, mult"),
        ("model=smolm2", "model=smolm2: no such model; did you mean smollm2?"),
        ("reward=null", "reward=null: no such reward (choose from custom, exact_match, last_numb"),
        ("job.anser=1", "job.anser=1: no option job.anser; did you mean answer?"),
        ("+job.foo=1", "job=mine: got an unexpected keyword argument 'foo'"),
        ("data=custom", "data.path has no value: give data.path=..."),
        ("reward=custom", "reward._target_ has no value: give reward._target_=..."),
        ("reward=regex", "reward.pattern has no value: give reward.pattern=..."),
        ("data.path=${nope}", "data.path: Interpolation key 'nope' not found"),
        ("again", "'again' cannot be read as key=value"),
        ("data.path=a[b", "'data.path=a[b' cannot be read as key=value"),
        ("sampling.n=1,2", "sampling.n=1,2: several values; add -m to run each"),
        ("--bogus", "unrecognized arguments: --bogus; see runner --help"),
        ("job._target_=my_job.rum", "job._target_=my_job.rum cannot be imported: "),
        ("job._target_=nowhere.run", "job._target_=nowhere.run cannot be imported: No module nam"),
        ("job.fail=usage", "no rows in prompts.jsonl"),
    ],
)  # fmt: skip
def test_a_usage_error_is_one_line(words: str, said: str, workplace: Path) -> None:
    assert refused("mine", words, cwd=workplace).startswith(said)
    assert not (workplace / "outputs").exists()


def test_a_usage_error_leaves_a_directory_that_holds_something(workplace: Path) -> None:
    (workplace / "kept").mkdir()
    (workplace / "kept" / "file").touch()
    refused("mine", "job.fail=usage", "output.dir=kept", cwd=workplace)
    assert (workplace / "kept" / "file").exists()


@pytest.mark.parametrize("directory", ["taken", "taken/below", "taken/below/further"])
@pytest.mark.parametrize("flags", [(), ("-m",)], ids=["alone", "sweep"])
def test_a_directory_that_cannot_be_made_is_one_line(
    directory: str, flags: tuple[str, ...], workplace: Path
) -> None:
    (workplace / "taken").write_text("mine")
    said = refused("mine", *flags, f"output.dir={directory}", cwd=workplace)
    assert said.startswith("output.dir: taken") and " cannot be made: " in said
    assert (workplace / "taken").read_text() == "mine"


def test_a_file_that_the_job_itself_does_not_find_is_a_bug_of_it(workplace: Path) -> None:
    job = (workplace / "my_job.py").read_text().replace('RuntimeError("a bug")', 'OSError("mine")')
    (workplace / "my_job.py").write_text(job)
    done = runner("mine", "job.fail=bug", cwd=workplace)
    assert done.returncode == 1 and "my_job.py" in done.stderr
    assert done.stderr.endswith("OSError: mine\n")


def test_a_sweep_is_checked_before_its_first_run(workplace: Path) -> None:
    said = refused("mine", "-m", "sampling.n=1,x", cwd=workplace)
    assert said.startswith("sampling.n=x: Value 'x'")
    assert not list(workplace.rglob("seen.yaml"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n: abc", "conf/sampling/bad.yaml: sampling.n: Value 'abc'"),
        ("temp: 1", "conf/sampling/bad.yaml: sampling.temp: no option sampling.temp; did you mean"),
        ("n: [1", "while parsing a flow sequence"),
        ("defaults: [nope]", "In 'sampling/bad': Could not load 'sampling/nope'"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(text: str, said: str, workplace: Path) -> None:
    (workplace / "conf" / "sampling").mkdir()
    (workplace / "conf" / "sampling" / "bad.yaml").write_text(text)
    assert refused("mine", "sampling=bad", cwd=workplace).startswith(said)


@pytest.mark.parametrize("words", [["job.fail=bug"], ["-m", "job.fail=bug"]])
def test_a_bug_keeps_its_traceback(words: list[str], workplace: Path) -> None:
    done = runner("mine", *words, cwd=workplace)
    assert done.returncode == 1
    assert "my_job.py" in done.stderr and done.stderr.endswith("RuntimeError: a bug\n")


def test_a_bug_in_the_users_module_is_no_usage_error(workplace: Path) -> None:
    (workplace / "my_job.py").write_text("1 / 0")
    assert "ZeroDivisionError" in runner("mine", cwd=workplace).stderr


def test_an_interrupt_exits_with_130(workplace: Path) -> None:
    done = runner("mine", "job.fail=interrupt", cwd=workplace)
    assert (done.returncode, done.stderr) == (130, "")


def test_version(tmp_path: Path) -> None:
    assert runner("--version", cwd=tmp_path).stdout == "runner 0.1.0\n"


def test_a_warning_is_one_line(workplace: Path) -> None:
    done = runner("mine", "job.fail=warning", cwd=workplace)
    assert done.stderr == "warning: no optimised BLAS found\n" and done.returncode == 0


def test_help_lists_every_job_and_choice(workplace: Path) -> None:
    text = runner("--help", cwd=workplace).stdout
    assert re.search(r"\bmine +A job of my own\.", text)
    assert all(name in text for group in choices().values() for name in group)
    assert max(map(len, text.splitlines())) <= 80
    assert text == runner("-h", cwd=workplace).stdout


def test_the_help_of_a_job_documents_every_option(workplace: Path) -> None:
    text = runner("mine", "--help", "sampling.n=3", cwd=workplace).stdout
    assert text.startswith("runner mine: A job of my own.\n\njob=mine\n  job.answer=42\n")
    assert "  sampling.n=3\n      Completions per prompt" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_help_of_a_job_has_the_options_that_it_heeds_and_others_are_refused(
    workplace: Path,
) -> None:
    uses = "_uses_: [engine, -engine.kv_bits, sampling.n, output.dir]\n"
    text = "# Two lines say\n# what it is for.\nlong: 1\n"
    job = workplace / "conf" / "job" / "mine.yaml"
    job.write_text(MY_CONF + uses)
    assert "answer 42 n 3" in runner("mine", "sampling.n=3", cwd=workplace).stdout
    line = "sampling.top_k means nothing to mine; it takes engine, sampling.n, output.dir and job"
    assert refused("mine", "sampling.top_k=3", cwd=workplace) == line
    assert refused("mine", "tracker=wandb", cwd=workplace).startswith("tracker means nothing")
    line = "engine.kv_bits means nothing to mine; it takes"
    assert refused("mine", "engine.kv_bits=4", cwd=workplace).startswith(line)
    job.write_text(MY_CONF + text + uses)
    shown = runner("mine", "--help", cwd=workplace).stdout.splitlines()
    options = [line.partition("=")[0].strip() for line in shown if re.match(r" {2}\w", line)]
    others = {it for it in options if not it.startswith("engine.")}
    assert others == {"job.answer", "job.fail", "job.long", "sampling.n", "output.dir"}
    assert "engine.max_batch_size" in options and "engine.kv_bits" not in options
    assert not any(line.startswith(("model=", "data=", "tracker=")) for line in shown)
    assert shown[shown.index("  job.long=1") + 1].strip() == "Two lines say what it is for."


@pytest.mark.parametrize("words", [["--help"], ["rollout", "--help"], ["rollout", "--cfg", "job"]])
def test_nothing_heavy_is_imported_without_a_run(words: list[str], tmp_path: Path) -> None:
    code = f"""
import sys, contextlib
sys.argv[1:] = {words!r}
from runner.cli import main
with contextlib.suppress(SystemExit):
    main()
heavy = {{"mlx", "mlx_lm", "datasets", "pyarrow", "polars", "numpy", "transformers"}}
print(*heavy & set(sys.modules), file=sys.stderr)
"""
    done = python("-c", code, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert done.stdout


@pytest.mark.parametrize("key", ["data.prompt_template", "data.system_prompt", "reward.pattern"])
@pytest.mark.parametrize(
    "text",
    ["Q {{ q }}, [x]: A=", "it's", r"\d+\'", "back\\", "two\nlines", 'a "b" c', "", "(?i)yes"],
)
def test_free_text_needs_no_quotes_of_hydras(key: str, text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (word,) = parse_arguments([f"{key}={text}"], GROUPS).overrides
    assert OverridesParser.create().parse_override(word).value() == text


def test_texts_in_quotes_and_null_are_left_to_hydra() -> None:
    words = ["data.system_prompt='a','b'", "data.prompt_template=null"]
    assert parse_arguments(words, GROUPS).overrides == words


def test_a_bare_word_after_the_job_is_the_option_that_its_file_names(workplace: Path) -> None:
    text = MY_CONF + "_positional_: output.dir\n"
    (workplace / "conf" / "job" / "mine.yaml").write_text(text)
    place = workplace / "it's [here], {now}"
    place.mkdir()
    for words in (["mine", place.name], [place.name], [f"output.dir={place.name}"]):
        given = words if words[0] == "mine" else ["mine", *words, "sampling.n=3"]
        assert "answer 42" in runner(*given, cwd=workplace).stdout
        assert (place / "seen.yaml").exists()
        (place / "seen.yaml").unlink()


def test_a_bare_word_after_any_other_job_is_refused(workplace: Path) -> None:
    done = runner("mine", "there", cwd=workplace)
    assert done.returncode == 2 and "'there' cannot be read as key=value" in done.stderr


@pytest.mark.parametrize(
    ("words", "overrides", "place"),
    [
        (["status", "out"], ["job=status", "output.dir='out'"], "out"),
        (["job.json=true", "status", "a b"], ["job.json=true", "job=status", "output.dir='a b'"],
         "a b"),
        (["status", "output.dir=x=y"], ["job=status", "output.dir='x=y'"], "x=y"),
        (["status", "sweep/n=8"], ["job=status", "output.dir='sweep/n=8'"], "sweep/n=8"),
        (["./n=8", "status"], ["output.dir='./n=8'", "job=status"], "./n=8"),
        (["status", "/out/n=8/x=y", "job.json=true"],
         ["job=status", "output.dir='/out/n=8/x=y'", "job.json=true"], "/out/n=8/x=y"),
        (["status", "out", "hydra/help=x"], ["job=status", "output.dir='out'", "hydra/help=x"],
         "out"),
        (["status", "n=8"], ["job=status", "n=8"], ""),
        (["generate", "mine/group=x"], ["job=generate", "mine/group=x"], None),
        (["status"], ["job=status"], ""),
        (["generate", "output.dir=out"], ["job=generate", "output.dir=out"], None),
    ],
)  # fmt: skip
def test_a_jobs_place_is_known_before_hydra_makes_it(
    words: list[str], overrides: list[str], place: str | None
) -> None:
    arguments = parse_arguments(words, GROUPS, {"status": "output.dir"})
    assert (arguments.overrides, arguments.place) == (overrides, place)


def test_a_run_that_stopped_is_one_line_and_exit_code_1(workplace: Path) -> None:
    code = MY_JOB.replace('raise DataError("no rows in prompts.jsonl")', "raise StoppedError('x')")
    (workplace / "my_job.py").write_text(code.replace("DataError", "StoppedError"))
    done = runner("mine", "job.fail=usage", cwd=workplace)
    assert (done.returncode, done.stderr) == (1, "error: x\n")
