"""Writes a model of any form as a directory of safetensors: quantised, fused, or as it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runner import __version__
from runner.conversion.convert import Conversion
from runner.conversion.packing import PackingOptions
from runner.conversion.save import save_card
from runner.errors import ParameterError
from runner.fresh_directory import check_fresh, fresh_directory
from runner.models.adapters import read_adapter
from runner.models.hub import resolve_model
from runner.models.load import DTYPES, short_name
from runner.models.provenance import commit_of
from runner.models.reference import parse_reference
from runner.models.upload import check_upload, upload


def convert(
    config: DictConfig,
    *,
    bits: int | None = None,
    group_size: int | None = None,
    mode: str | None = None,
    recipe: str | None = None,
    layers: Any = None,
    dequantize: bool = False,
    upload_to: str | None = None,
    private: bool = False,
) -> None:
    """Converts the model of `config.model` into `output.dir`, with `lora.path` fused into it.

    The options are those of `conf/job/convert.yaml`. An interrupted conversion leaves nothing that
    loads, and the same command does it again. Raises UsageError.
    """
    target, model = Path(config.output.dir), config.model
    check_fresh(target)
    for name, value in (("dequantize", dequantize), ("private", private)):
        if not isinstance(value, bool):
            raise ParameterError(f"job.{name}={value} is not allowed: true or false")
    if model.dtype not in DTYPES:
        raise ParameterError(f"model.dtype={model.dtype} is not allowed: {', '.join(DTYPES)}")
    if model.max_model_len is not None:
        given = f"model.max_model_len={model.max_model_len}"
        raise ParameterError(f"{given} is not allowed: a model is converted with its own")
    if private and upload_to is None:
        raise ParameterError("job.private=true is not allowed without job.upload_to")
    plain = OmegaConf.to_container(layers) if isinstance(layers, DictConfig) else layers
    conversion = Conversion(
        dtype=model.dtype,
        dequantize=dequantize,
        adapter=None if config.lora.path is None else read_adapter(config.lora.path),
        packing=PackingOptions.of(
            bits=bits, group_size=group_size, mode=mode, recipe=recipe, layers=plain
        ),
        trust_remote_code=model.trust_remote_code,
    )
    if upload_to is not None:
        check_upload(upload_to)
    _convert(conversion, model, target, upload_to)
    if upload_to is not None:
        print(f"Uploaded to {upload(target, upload_to, private=private)}.")


def _convert(
    conversion: Conversion, model: Mapping[str, Any], target: Path, upload_to: str | None
) -> None:
    path, revision = model["path"], model["revision"]
    trusts = model["trust_remote_code"]
    found = resolve_model(path, revision=revision, trust_remote_code=trusts)
    name = short_name(path, found)
    with fresh_directory(target) as directory:
        done = ", ".join(conversion.run(found, directory))
        base, commit = _base_model(path), commit_of(found)
        text = f"Converted by mlx-runner {__version__} from {base or name}"
        text += f" at commit {commit}: {done}." if commit else f": {done}."
        save_card(directory, name=upload_to or target.name, text=text, base_model=base)
    print(f"Converted {name} to {target}: {done}.")


def _base_model(path: str) -> str | None:
    """The repository of a model on the hub; None for any other."""
    if path.startswith("pkg://") or Path(path).expanduser().exists():
        return None
    return parse_reference(path).repository
