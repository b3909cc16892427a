"""Opens a model, changes it as asked, in one order: unpack, fuse, cast, quantise; and saves it."""

from dataclasses import dataclass
from pathlib import Path

from mlx_lm.utils import compute_bits_per_weight

from runner.adapter_weights import AdapterWeights
from runner.conversion.fuse import fuse
from runner.conversion.packing import PackingOptions
from runner.conversion.quantize import quantize
from runner.conversion.save import save
from runner.errors import ParameterError
from runner.models.weights import ModelFiles, cast, open_model, packed_layers, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What is to be done to a model."""

    dtype: str = "auto"
    """Of weights that are not packed; auto is the file's own."""
    dequantize: bool = False
    adapter: AdapterWeights | None = None
    packing: PackingOptions | None = None
    trust_remote_code: bool = False

    def run(self, found: Path, directory: Path) -> list[str]:
        """Writes the changed model into a directory; returns what was done, in words.

        Raises ModelError, AdapterError, and ParameterError where the options do not suit the model.
        """
        files = open_model(found, trust_remote_code=self.trust_remote_code)
        done = self._change(files, found)
        per_weight = compute_bits_per_weight(files.model)
        num_bytes = save(directory, files, source=found)
        return [*done, f"{per_weight:.2f} bits per weight, {num_bytes / 1e6:.1f} MB in all"]

    def _change(self, files: ModelFiles, found: Path) -> list[str]:
        self._check(files)
        model, config = files.model, files.config
        dtype = files.dtype if self.dtype == "auto" else self.dtype
        changes_dtype = self.dtype != "auto" or files.narrows_to is not None
        done = [dtype]
        if self.dequantize:
            unpack(model, found)  # In float32, and everything with it.
            changes_dtype = True
            done.append("unpacked")
        if self.adapter is not None:
            done.append(f"{fuse(model, self.adapter)} modules fused with {self.adapter.source}")
        if changes_dtype:
            cast(model, dtype)
        if not packed_layers(model):
            config.pop("quantization", None)
            config.pop("quantization_config", None)
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
        if self.packing is not None:
            misfits = quantize(model, config, self.packing).misfits
            done += [_described(it) for it in packed_layers(model)]
            if misfits:
                done.append(f"{len(misfits)} layers too narrow for a group kept dense")
        model.eval()
        return done

    def _check(self, files: ModelFiles) -> None:
        """Refuses what would round weights twice unasked, or does nothing."""
        if self.dequantize and not files.quantization:
            raise ParameterError("job.dequantize=true is not allowed: the model is not quantised")
        if self.dequantize or not files.quantization:
            return
        how = _described(files.quantization[0])
        for option, asked in (
            ("quantising it", self.packing is not None),
            ("lora.path", self.adapter is not None),
        ):
            if asked:
                raise ParameterError(
                    f"{option} is not allowed: the model has {how} already; job.dequantize=true "
                    "makes it dense first"
                )


def _described(packed: dict[str, object]) -> str:
    return (
        f"{packed['layers']} layers of {packed['bits']} bits ({packed['mode']}, groups of "
        f"{packed['group_size']})"
    )
