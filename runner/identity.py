"""The options that decide results: a directory goes on under the same ones alone."""

from collections.abc import Collection, Mapping
from typing import Any

from runner.models.digest import model_digest
from runner.models.hub import resolve_model

_ENGINE_OPTIONS = (
    "kv_bits", "kv_group_size", "quantized_kv_start", "max_kv_size", "batch_invariant"
)  # fmt: skip
"""What of `engine` decides results, the last one their last bits; of `output` and `tracker`,
nothing does."""

_NOT_DECIDING = (
    "model.path", "model.revision", "job.retry_errors", "job.certify", "job._uses_"
)  # fmt: skip
"""Where the weights lie decides nothing: `model.weights`, their digest, stands for them. Nor does
which rows are done again, or scored again when all are done, or what the command line takes."""


def identity(config: Mapping[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """The deciding options of a composed configuration, flat: `sampling.temperature` and so on.

    `groups` are those that decide as a whole. Downloads the model where it is not here yet.
    """
    deciding = {name: config[name] for name in groups if config[name] is not None}
    deciding["engine"] = {name: config["engine"][name] for name in _ENGINE_OPTIONS}
    options = {
        f"{group}.{key}": value
        for group, values in deciding.items()
        for key, value in values.items()
    }
    model = config["model"]
    trusts = model["trust_remote_code"]
    found = resolve_model(model["path"], revision=model["revision"], trust_remote_code=trusts)
    weights = {"model.weights": model_digest(found)}
    return {key: options[key] for key in options if key not in _NOT_DECIDING} | weights
