"""Options from the environment: below the command line, above the files, refused where unknown."""

from pathlib import Path

import pytest
from command_line import refused, run_cli
from omegaconf import OmegaConf

from runner.composition import choices
from runner.environment import beneath, blaming, read_environment
from runner.errors import ParameterError

GROUPS = choices()
SERVE = GROUPS["job"]["serve"]


def overrides(*words: str, **environment: str) -> list[str]:
    """What Hydra gets of a command line and an environment."""
    return beneath(read_environment(environment, SERVE), ["job=serve", *words], GROUPS)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RUNNER_SERVER_PORT", "80", "server.port=80"),
        ("RUNNER_SERVER_HOST", "::1", "server.host='::1'"),
        ("RUNNER_SERVER_SERVED_MODEL_NAME", "[a,b]", "server.served_model_name=[a,b]"),
        ("RUNNER_SERVER_ADAPTER_ROOT", "null", "server.adapter_root=null"),
        ("RUNNER_ENGINE_MAX_BATCH_SIZE", "auto", "engine.max_batch_size=auto"),
        ("RUNNER_SAMPLING_TEMPERATURE", "0.5", "sampling.temperature=0.5"),
        ("RUNNER_LORA_ADAPTERS", "{a: x}", "lora.adapters={a: x}"),
        ("RUNNER_SPECULATIVE_PROPOSERS", "[ngram]", "speculative.proposers=[ngram]"),
        ("RUNNER_MODEL_REVISION", "it's, {odd}", "model.revision='it\\'s, {odd}'"),
    ],
)
def test_a_variable_is_an_override(name: str, value: str, expected: str) -> None:
    assert overrides(**{name: value}) == [expected, "job=serve"]


def test_a_path_chooses_a_model_of_ones_own_unless_the_command_line_has_a_choice() -> None:
    given = {"RUNNER_MODEL_PATH": "a,b", "RUNNER_MODEL_DTYPE": "float32"}
    own = ["model.dtype='float32'", "model.path='a,b'", "job=serve"]
    assert overrides(**given) == ["model=custom", *own]
    assert overrides("model=custom", **given) == [*own, "model=custom"]
    # What the file of the choice says is said on the command line; the rest is not.
    assert overrides("model=smollm2", **given) == [own[0], "job=serve", "model=smollm2"]


def test_what_is_no_option_is_passed_by() -> None:
    given = {"RUNNER_API_KEYS": "a", "RUNNER_BLAS": "b", "RUNNER_OS": "Linux", "PATH": "/bin"}
    assert overrides(**given) == ["job=serve"]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("RUNNER_SERVER_PROT", "80", "RUNNER_SERVER_PROT.*did you mean RUNNER_SERVER_PORT"),
        ("RUNNER_PORT", "80", "RUNNER_PORT: serve has no option of this name"),
        ("RUNNER_OUTPUT_DIR", "x", "RUNNER_OUTPUT_DIR: serve has no option"),
        ("RUNNER_LORA_COLUMN", "x", "RUNNER_LORA_COLUMN: serve has no option"),
        ("RUNNER_SERVER_PORT", "http", "RUNNER_SERVER_PORT=http is not allowed: .*Integer"),
        ("RUNNER_SERVER_PORT", "", "RUNNER_SERVER_PORT is empty"),
        ("RUNNER_SERVER_PORT", "1,2", "RUNNER_SERVER_PORT=1,2: several values"),
        ("RUNNER_SERVER_PORT", "[", r"RUNNER_SERVER_PORT=\[ is not allowed"),
        ("RUNNER_ENGINE_BATCH_INVARIANT", "perhaps", "RUNNER_ENGINE_BATCH_INVARIANT=perhaps"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(name: str, value: str, told: str) -> None:
    with pytest.raises(ParameterError, match=told) as refusal:
        overrides(**{name: value})
    assert "\n" not in str(refusal.value)


def test_a_mistake_that_shows_later_is_blamed_on_its_variable() -> None:
    given = {
        "RUNNER_SERVER_PORT": "99999",
        "RUNNER_MODEL_PATH": "/no/such",
        "RUNNER_SAMPLING_N": "2",
    }
    variables = read_environment(given, SERVE)
    told = "server.port=99999 is not allowed: 0 to 65535"
    assert blaming(told, variables, []) == f"RUNNER_SERVER_PORT: {told}"
    assert blaming(told, variables, ["server.port=99999"]) == told
    missing = "/no/such: no such directory"
    assert blaming(missing, variables, []) == f"RUNNER_MODEL_PATH: {missing}"
    assert blaming("n is odd, and port too", variables, []) == "n is odd, and port too"


def test_the_command_line_wins_over_the_environment_over_the_files(tmp_path: Path) -> None:
    given = {
        "RUNNER_SERVER_PORT": "81",
        "RUNNER_SERVER_MAX_N": "3",
        "RUNNER_SAMPLING_TEMPERATURE": "0.5",
        "RUNNER_SAMPLING_TOP_P": "0.25",
        "RUNNER_MODEL_PATH": "pkg://none/{odd}, 'it''s'",
    }
    words = ("serve", "server.port=82", "sampling=greedy", "--cfg", "job")
    done = run_cli(*words, cwd=tmp_path, **given)
    assert done.returncode == 0, done.stderr
    config = OmegaConf.create(done.stdout)
    assert (config.server.port, config.server.max_n, config.server.max_waiting) == (82, 3, 256)
    assert (config.sampling.temperature, config.sampling.top_p) == (0.0, 0.25)
    assert config.model.path == given["RUNNER_MODEL_PATH"]


def test_the_program_refuses_in_one_line_and_leaves_the_directory(tmp_path: Path) -> None:
    told = refused("serve", cwd=tmp_path, RUNNER_SERVER_PORT="99999")
    assert told.startswith("error: RUNNER_SERVER_PORT: server.port=99999 is not allowed")
    assert tmp_path.is_dir()
