"""EleutherAI's lm-evaluation-harness itself, offline, on the weights that the jobs read.

Run where its packages are: `uv run --with "lm-eval[hf,api]" --with torch pytest -m harness`.
They are in no dependency group: resolving PyTorch would pin what the CUDA backends may install.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import write_jsonl
from in_process import by_text, run_job
from tiny_files import save_tiny_model

# PyTorch and the harness warn of much that is none of ours.
pytestmark = [pytest.mark.harness, pytest.mark.filterwarnings("ignore")]
REASON = (
    "lm-eval and torch are not installed: "
    "uv run --with 'lm-eval[hf,api]' --with torch pytest -m harness"
)

TEXTS = [
    "A first text, which is longer than most of the windows that are tried here. " * 5,
    "Grüße, 世界! 🙂",
    " = A page with a headline = \n\n And its  text , as wikitext has it .\n",
    "x",
]
ROWS = [
    {"prompt": "A question?", "choices": [" one", " another", " the third"], "answer": 1},
    {"prompt": "A question with a space. ", "choices": ["yes", "no"], "answer": 0},
    {"prompt": "Grüße", "choices": [" 世界", """ "an", he said"""], "answer": 0},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    save_tiny_model(folder / "tiny")
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(folder / "choices.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def harness(place: Path, monkeypatch_module: pytest.MonkeyPatch) -> Any:
    """Makes the harness's model with a context: the same safetensors, in PyTorch and float32."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch_module.setenv(name, "1")
    torch = pytest.importorskip("torch", reason=REASON)
    pytest.importorskip("lm_eval", reason=REASON)
    import transformers
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(place / "tiny")

    def made(max_length: int) -> Any:
        return HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1, device="cpu"
        )

    return made


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def instances(kind: str, arguments: list[tuple[str, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.mark.parametrize("max_length", [9, 63, 255])
def test_rolling_loglikelihoods_are_those_of_the_preset(place, harness, max_length):
    """The window of the preset counts the context too: it is the harness's max_length and one."""
    asked = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    theirs = harness(max_length).loglikelihood_rolling(asked, disable_tqdm=True)
    rows = run_job(
        "perplexity", place, f"data.path={place / 'texts.jsonl'}", "job.preset=lm_eval",
        f"job.window={max_length + 1}", out=f"rolling-{max_length}",
    )  # fmt: skip
    ours = [by_text(rows)[text]["sum_logprob"] for text in TEXTS]
    np.testing.assert_allclose(ours, np.array(theirs).reshape(-1), rtol=1e-5, atol=1e-3)


def test_a_task_has_the_numbers_of_the_preset(place, harness):
    """Through `simple_evaluate`: perplexities per word and byte, and bits per byte."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    task = {
        "task": "local_texts",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(place / "texts.jsonl")}, "cache_dir": str(place / "cache")
        },
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in metrics],
    }  # fmt: skip
    done = lm_eval.simple_evaluate(
        harness(63),
        tasks=[task],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert done is not None
    theirs = {name: done["results"]["local_texts"][f"{name},none"] for name in metrics}
    run_job(
        "perplexity", place, f"data.path={place / 'texts.jsonl'}", "job.preset=lm_eval",
        "job.window=64", out="task",
    )  # fmt: skip
    found = json.loads((place / "task" / "summary.json").read_text())["perplexity"]
    assert {name: found[name] for name in metrics} == pytest.approx(theirs, rel=1e-5)


def test_choices_are_scored_and_greedy_as_in_the_harness(place, harness):
    pairs = [(row["prompt"], choice) for row in ROWS for choice in row["choices"]]
    theirs = harness(255).loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    rows = run_job(
        "score", place, f"data.path={place / 'choices.jsonl'}",
        "job.choices_column=choices", "job.answer_column=answer", out="score",
    )  # fmt: skip
    ours = {(row["prompt"], row["text"]): row for row in rows.to_dicts()}
    for pair, (loglikelihood, is_greedy) in zip(pairs, theirs, strict=True):
        assert ours[pair]["sum_logprob"] == pytest.approx(loglikelihood, abs=1e-3)
        assert ours[pair]["is_greedy"] == bool(is_greedy)


def test_a_continuation_that_the_model_itself_gives_is_greedy_in_both(place, harness):
    from runner import LLM, SamplingParams

    llm = LLM(place / "tiny")
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for text in ("count with me", "yes"):
        (sample,) = llm.generate(text, params, use_tqdm=False)[0].outputs
        ids = llm.tokenizer.encode(text), sample.token_ids
        ((_, is_greedy),) = harness(255)._loglikelihood_tokens(
            [(("", ""), *ids)], disable_tqdm=True
        )
        (score,) = llm.score([ids], use_tqdm=False)
        assert is_greedy and score.is_greedy
