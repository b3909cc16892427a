"""Every shipped configuration composes, and names things that exist and take its options."""

import inspect
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from runner import composition, help
from runner.config import Config, EngineConfig, ModelConfig, SamplingConfig
from runner.types import SamplingParams

CONF = composition.conf_directories()[0]
CHOICES = [f"{path.parent.name}={path.stem}" for path in sorted(CONF.glob("*/*.yaml"))]
# What the choices leave to the user.
GIVEN = {
    "data=custom": ["data.path=rows.jsonl"],
    "job=embed": ["data.path=rows.jsonl"],
    "job=openai_batch": ["data.path=batch.jsonl"],
    "job=perplexity": ["data.path=rows.jsonl"],
    "job=score": ["data.path=rows.jsonl"],
    "model=custom": ["model.path=model"],
    "reward=regex": ["reward.pattern=x"],
    "reward=custom": ["reward._target_=builtins.len"],
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choices but the shipped ones."""
    monkeypatch.chdir(tmp_path)
    composition.register()


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_module("runner.conf", version_base="1.3"):
        return hydra.compose("config", ["output.dir=results", *overrides])


def composed(choice: str) -> DictConfig:
    return compose(choice, *GIVEN.get(choice, []))


def targets(node: Any) -> Iterator[DictConfig]:
    """Every node with a `_target_`, at any depth."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            if not OmegaConf.is_interpolation(node, key):
                yield from targets(node[key])


def test_there_is_a_configuration_for_every_group() -> None:
    groups = {choice.partition("=")[0] for choice in CHOICES}
    assert groups == set(inspect.signature(Config).parameters)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_is_complete(choice: str) -> None:
    config = composed(choice)
    assert OmegaConf.missing_keys(config) == set()
    assert composition.unknown_keys(config) == []


@pytest.mark.parametrize("choice", CHOICES)
def test_every_target_exists_and_takes_its_options(choice: str) -> None:
    for node in targets(composed(choice)[choice.partition("=")[0]]):
        taken = inspect.signature(get_object(node["_target_"])).parameters
        given = {str(key) for key in node if not str(key).startswith("_")}
        open_ended = any(it.kind is it.VAR_KEYWORD for it in taken.values())
        assert open_ended or given <= set(taken), f"{node['_target_']} has no {given - set(taken)}"


@pytest.mark.parametrize("choice", [it for it in CHOICES if it.startswith("job=")])
def test_what_a_job_heeds_is_there(choice: str) -> None:
    config = composed(choice)
    for name in config.job.get(composition.USES) or ():
        group, _, key = name.lstrip("-").partition(".")
        assert group in config and (not key or key in config[group]), name
        assert not name.startswith("-") or group in config.job[composition.USES], name


def test_comments_of_several_lines_are_whole_in_the_help() -> None:
    shown = " ".join(help.job_help("benchmark", ["job=benchmark"]).split())
    assert "job.rounds=3 Rounds of each side, in turn, after one to warm up." in shown
    assert " Of group (GRPO: few long prompts, many samples), mixed (HumanEval," in shown


@pytest.mark.parametrize("choice", GIVEN)
def test_what_the_user_has_to_give_is_missing_without_it(choice: str) -> None:
    (given,) = GIVEN[choice]
    assert OmegaConf.missing_keys(compose(choice)) == {given.partition("=")[0]}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_starts_with_a_line_about_it(choice: str) -> None:
    group, _, name = choice.partition("=")
    first, second = (CONF / group / f"{name}.yaml").read_text().splitlines()[:2]
    sentence = second if first.startswith("# @") else first
    assert sentence.startswith("# ") and sentence.endswith(".")


@pytest.mark.parametrize("choice", [it for it in CHOICES if it.startswith(("job=", "reward="))])
def test_every_option_outside_the_schemas_has_a_comment(choice: str) -> None:
    group, _, name = choice.partition("=")
    lines = (CONF / group / f"{name}.yaml").read_text().splitlines()
    for above, line in zip(lines, lines[1:], strict=False):
        key = line.strip().partition(":")[0]
        is_option = line.startswith(" ") == ("@package" in lines[0]) and "- " not in line
        if is_option and key.isidentifier() and key[0] != "_" and key not in ("defaults", group):
            assert above.strip().startswith("# "), f"{choice}: {key}"


def test_the_fixed_parts_are_typed() -> None:
    config = compose()
    assert OmegaConf.get_type(config) is Config
    schemas = {"model": ModelConfig, "engine": EngineConfig, "sampling": SamplingConfig}
    for group, schema in schemas.items():
        assert OmegaConf.get_type(config[group]) is schema


def test_a_logit_bias_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    config = compose("sampling.logit_bias={5: 1.5}", "sampling.bad_words=[foo, two words]")
    params = SamplingParams(**OmegaConf.to_container(config.sampling))
    assert params.logit_bias == {5: 1.5}
    assert params.bad_words == ("foo", "two words")
    (tmp_path / "conf" / "sampling").mkdir(parents=True)
    text = 'logit_bias: {"5": 2, 6: -1}\n'
    (tmp_path / "conf" / "sampling" / "mine.yaml").write_text(text)
    mine = SamplingParams(**OmegaConf.to_container(compose("sampling=mine").sampling))
    assert mine.logit_bias == {5: 2.0, 6: -1.0}


def test_the_sampling_options_are_those_of_the_params_with_their_defaults() -> None:
    options = {it.name: it for it in fields(SamplingConfig)}
    assert options.keys() == {it.name for it in fields(SamplingParams)} - {"logprobs"}
    ours = SamplingParams(**asdict(SamplingConfig()))
    assert ours == SamplingParams(max_tokens=256, seed=0)


def test_a_rollout_samples_a_group_and_rewards_it() -> None:
    config = compose("job=rollout")
    assert config.sampling.n == 4
    assert config.sampling.temperature == 1.0
    assert config.reward._target_ == "runner.rewards.last_number"
    assert config.data.path == "pkg://runner/data/arithmetic.jsonl"


def test_a_generation_has_one_completion_and_no_reward() -> None:
    config = compose("job=generate")
    assert config.sampling.n == 1
    assert config.reward is None


def test_the_data_suggest_where_a_completion_ends_and_sampling_decides() -> None:
    assert compose("data=arithmetic").sampling.stop == ["\n"]
    assert compose("data=arithmetic").sampling.max_tokens == 32
    custom = compose("job=rollout", "data=custom", "data.path=rows.jsonl")
    assert custom.sampling.stop == []
    assert custom.sampling.max_tokens == 256
    assert custom.data.prompt_template is None


def test_sampling_of_ones_own_has_the_last_word(tmp_path: Path) -> None:
    (tmp_path / "conf" / "sampling").mkdir(parents=True)
    (tmp_path / "conf" / "sampling" / "mine.yaml").write_text("max_tokens: 100\nstop: []\n")
    sampling = compose("job=rollout", "sampling=mine").sampling
    assert (sampling.max_tokens, sampling.stop, sampling.n) == (100, [], 1)


def test_a_choice_on_the_command_line_beats_what_the_job_chooses() -> None:
    config = compose("job=rollout", "reward=exact_match", "sampling=greedy")
    assert config.reward._target_ == "runner.rewards.exact_match"
    assert config.sampling.n == 1


def test_the_arithmetic_template_shows_four_examples_and_asks() -> None:
    template = compose("data=arithmetic").data.prompt_template
    assert template.count("Question:") == 5
    assert template.endswith("Question: {{ question }}\nAnswer:")
