"""From a job's configuration to plain values, and to the engine that it describes."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from runner.llm import LLM
from runner.lora_options import LoraOptions
from runner.models.load import Loader


def plain_options(node: DictConfig) -> dict[str, Any]:
    """A configuration, or a group of it, as a dictionary of resolved plain values."""
    content = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict), "a group of options is a mapping"
    return {str(key): value for key, value in content.items()}


def open_llm(config: DictConfig, load_model: Loader | None = None) -> LLM:
    """The `LLM` that a configuration describes, with its adapters.

    Its model is read from files, or given by `load_model`.
    """
    model, engine = plain_options(config.model), plain_options(config.engine)
    lora = LoraOptions.of(plain_options(config.lora))
    engine |= {"seed": config.sampling.seed or 0, "max_adapters": lora.max_adapters}
    engine["speculative"] = plain_options(config.speculative)
    path = model.pop("path")
    if load_model is None:
        llm = LLM(path, **model, **engine)
    else:
        llm = LLM(load_model(path, **model), **engine)
    for name, directory in lora.paths.items():
        llm.load_adapter(name, directory)
    return llm
