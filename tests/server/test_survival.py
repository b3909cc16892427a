"""Engines that fail, clients that go, queues that are full: the rest of the clients live on."""

import contextlib
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import mlx.core as mx
import openai
import pytest
from live_server import NAME, live_server, wait_until
from tiny_adapters import ATTENTION, MLP, save_mlx, with_lora_layers
from tiny_files import save_tiny_model

from runner import LLM
from runner.errors import ParameterError
from runner.server.engine_thread import EngineThread

LONG = {"model": NAME, "max_tokens": 200, "extra_body": {"ignore_eos": True}, "seed": 1}


class Killed(BaseException):
    """Ends a thread that only minds exceptions."""


@pytest.fixture
def live(tiny_directory):
    with live_server(tiny_directory, max_waiting=2, engine={"max_batch_size": 4}) as served:
        yield served


@pytest.fixture
def client(live):
    with live.client() as made:
        yield made


def fail_once(live, error, *, after=0):
    """Lets a later step of the engine raise."""
    engine, count = live.llm.text_engine.engine, 0
    step = engine.step

    def failing():
        nonlocal count
        count += 1
        if count > after:
            engine.step = step
            raise error
        return step()

    engine.step = failing


def slowed(live, seconds):
    """Lets each step of the engine take a while."""
    engine = live.llm.text_engine.engine
    step = engine.step

    def slow():
        time.sleep(seconds)
        return step()

    engine.step = slow


def stream(client, **fields):
    """A stream whose first piece is there."""
    events = client.completions.create(prompt="Hello", stream=True, **LONG | fields)
    next(events)
    return events


@pytest.mark.parametrize("error", [RuntimeError("a fault"), Killed("a fault")], ids=repr)
@pytest.mark.filterwarnings("ignore")
def test_an_engine_that_fails_tells_why_and_starts_over(live, client, error):
    before = client.completions.create(prompt="Hello", **LONG).choices[0].text
    slowed(live, 0.01)
    running = stream(client)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(client.completions.create, prompt="Hello", **LONG)
        assert wait_until(lambda: live.service.engine.num_open == 2)
        fail_once(live, error, after=3)
        with pytest.raises(openai.InternalServerError) as failed:
            waits.result()
    assert failed.value.status_code == 503 and failed.value.code == "engine_failure"
    assert "a fault" in failed.value.message
    with pytest.raises(openai.APIError, match="a fault"):
        list(running)
    assert wait_until(lambda: live.get("/ready").status_code == 200)
    assert live.service.engine.num_restarts == 1
    assert client.completions.create(prompt="Hello", **LONG).choices[0].text == before
    assert live.becomes_idle()


@pytest.mark.filterwarnings("ignore")
def test_a_request_that_nobody_has_thought_of_fails_alone(live, client, monkeypatch):
    engine = live.llm.text_engine
    add = engine.add

    def picky(request, on_delta=None):
        if request.prompt.text == "poison":
            raise KeyError("poison")
        return add(request, on_delta)

    monkeypatch.setattr(engine, "add", picky)
    running = stream(client)
    for prompt in ("poison", ["fine", "poison", "fine"]):
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(prompt=prompt, **LONG)
        assert failed.value.status_code == 500 and failed.value.code == "bug"
        assert "could not take this request: KeyError: 'poison'" in failed.value.message
    assert list(running)[-1].choices[0].finish_reason == "length"
    assert live.service.engine.num_restarts == 0 and live.becomes_idle()


@pytest.mark.filterwarnings("ignore")
def test_an_engine_that_is_gone_for_good_keeps_nobody_waiting(live, client, monkeypatch):
    def broken():
        raise RuntimeError("no memory")

    monkeypatch.setattr("runner.server.engine_thread._SECONDS_BETWEEN_RESTARTS", 0.02)
    monkeypatch.setattr(live.llm, "restart", broken)
    slowed(live, 0.01)
    running = stream(client)
    fail_once(live, Killed("a fault"), after=2)
    with ThreadPoolExecutor(6) as pool:
        waiting = [pool.submit(client.completions.create, prompt="Hi", **LONG) for _ in range(3)]
        with pytest.raises(openai.APIError):
            list(running)
        for one in waiting:
            with pytest.raises(openai.InternalServerError) as failed:
                one.result(timeout=10)
            assert failed.value.status_code == 503
    assert wait_until(lambda: live.service.engine.status == "failed")
    for path in ("/health", "/ready"):
        assert live.get(path).status_code == 503
    for ask in (lambda: client.completions.create(prompt="Hi", **LONG), lambda: stream(client)):
        with pytest.raises(openai.InternalServerError, match="failed") as failed:
            ask()
        assert failed.value.status_code == 503
    loaded = live.post("/v1/unload_lora_adapter", {"lora_name": "x"})
    assert loaded.status_code == 503 and live.service.engine.num_open == 0


@pytest.mark.parametrize("is_stream", [True, False])
def test_who_goes_frees_the_rows_within_a_step(live, is_stream):
    slowed(live, 0.02)
    body = {"prompt": "Hello", "n": 3, "max_tokens": 200, "ignore_eos": True, "stream": is_stream}
    timeout = httpx.Timeout(10, read=10 if is_stream else 0.3)
    with httpx.Client(trust_env=False, timeout=timeout) as client:
        posted = client.stream("POST", f"{live.url}/v1/completions", json=body)
        with contextlib.suppress(httpx.ReadTimeout), posted as answer:
            next(answer.iter_bytes())
        stats = live.llm.engine.stats
        count = stats.num_completion_tokens
    assert 0 < count < 100
    assert live.becomes_idle(2)
    assert live.llm.engine.sequences == []
    # One step that runs, and one until the event loop has heard of it.
    assert stats.num_completion_tokens - count <= 3 * 3


def test_who_goes_while_waiting_never_gets_a_row(live, client):
    slowed(live, 0.02)
    running = client.completions.create(prompt="Hello", n=4, stream=True, **LONG)
    next(running)
    before = live.llm.engine.stats.num_prompt_tokens
    with live.client(timeout=0.2) as hasty, pytest.raises(openai.APITimeoutError):
        hasty.completions.create(prompt="Another", **LONG)
    assert wait_until(lambda: live.service.engine.num_open == 1, 2)
    running.close()
    assert live.becomes_idle(2) and live.llm.engine.stats.num_prompt_tokens == before


def test_a_full_queue_says_so_and_takes_more_later(live, client):
    engine, gate = live.llm.text_engine.engine, threading.Event()
    step = engine.step
    engine.step = lambda: gate.wait(30) and step()
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(client.completions.create, prompt="Hi", **LONG) for _ in range(6)]
        assert wait_until(lambda: live.service.engine.num_open == 6)
        for fields in ({}, {"stream": True}):
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(prompt="Hello", **LONG | fields)
            assert refused.value.code == "server_busy"
        assert live.get("/health").status_code == 200
        gate.set()
        assert {one.result().choices[0].finish_reason for one in asked} == {"length"}
    assert live.becomes_idle()
    client.completions.create(prompt="Hello", **LONG)


def test_a_long_prompt_delays_no_stream_by_more_than_a_chunk(tmp_path):
    save_tiny_model(tmp_path / "tiny", max_position_embeddings=8192)
    with live_server(tmp_path / "tiny") as live, live.client() as client:
        engine, steps = live.llm.text_engine.engine, []
        step, stats = engine.step, engine.stats

        def counted():
            before = stats.num_prefill_tokens, stats.num_completion_tokens
            done = step()
            now = stats.num_prefill_tokens, stats.num_completion_tokens
            steps.append((now[0] - before[0], now[1] - before[1]))
            return done

        engine.step = counted
        running = [stream(client, max_tokens=300, seed=seed) for seed in range(2)]
        del steps[:]
        done = client.completions.create(prompt="x" * 4000, **LONG | {"max_tokens": 1})
        beside = [num_tokens for prefilled, num_tokens in steps if prefilled]
        assert done.usage.prompt_tokens == 4000 and len(beside) >= 4000 // 64
        assert all(prefilled <= 64 for prefilled, _ in steps)
        assert all(num_tokens == 2 for num_tokens in beside), "both streams get one with each chunk"
        for events in running:
            assert list(events)[-1].choices[0].finish_reason == "length"


def test_first_come_is_first_served_unless_it_has_a_priority(tiny_directory):
    options = {"max_batch_size": 1}
    with live_server(tiny_directory, engine=options) as live, live.client() as client:
        slowed(live, 0.02)
        running, order = stream(client), []

        def ask(name, priority):
            extra = {"ignore_eos": True, "priority": priority}
            client.completions.create(prompt=name, model=NAME, max_tokens=3, extra_body=extra)
            order.append(name)

        asked = []
        for count, (name, priority) in enumerate(
            [("first", 0), ("second", 0), ("last", 5), ("urgent", -1)], 2
        ):
            asked.append(threading.Thread(target=ask, args=(name, priority)))
            asked[-1].start()
            assert wait_until(lambda count=count: live.service.engine.num_open == count)
        assert order == []
        running.close()
        for thread in asked:
            thread.join()
        assert order == ["urgent", "first", "second", "last"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, llm):
    """Two adapters below a directory, and one beside it."""
    place = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("root/one", "root/two", "outside"), 1):
        adapted = with_lora_layers(llm.model, rank=2, dora=False, keys=ATTENTION + MLP, seed=seed)
        save_mlx(place / name, adapted, rank=2, keys=ATTENTION + MLP)
    (place / "root" / "link").symlink_to(place / "outside")
    (place / "root" / "empty").mkdir()
    return place


def load(live, name, path, **more):
    return live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)} | more)


@pytest.fixture(scope="module")
def rooted(tiny_directory, adapters):
    with live_server(tiny_directory, adapter_root=str(adapters / "root")) as served:
        yield served


@pytest.fixture
def tuned(tiny_directory, adapters):
    with live_server(tiny_directory, adapter_root=str(adapters / "root")) as served:
        yield served


def test_adapters_come_and_go_while_streams_run(tuned, adapters, llm):
    ask = {**LONG, "prompt": "Hello", "max_tokens": 40}
    with tuned.client() as client:
        plain = client.completions.create(**ask).choices[0].text
        slowed(tuned, 0.003)
        running = client.completions.create(**ask, stream=True)
        pieces = [next(running).choices[0].text]
        done = load(tuned, "tuned", "one")
        assert (done.status_code, done.text) == (
            200, "Success: LoRA adapter 'tuned' added successfully."
        )  # fmt: skip
        one = client.completions.create(**ask | {"model": "tuned"})
        assert one.model == "tuned" and one.choices[0].text != plain
        listed = {it.id: it for it in client.models.list().data}
        assert (listed["tuned"].root, listed["tuned"].parent) == ("one", NAME)
        swapped = client.completions.create(**ask | {"model": "tuned"}, stream=True)
        kept = [next(swapped).choices[0].text]
        assert load(tuned, "tuned", "two").status_code == 400, "the name is taken"
        assert load(tuned, "tuned", "two", load_inplace=True).status_code == 200
        two = client.completions.create(**ask | {"model": "tuned"}).choices[0].text
        assert two not in (plain, one.choices[0].text)
        kept += [chunk.choices[0].text for chunk in swapped]
        assert "".join(kept) == one.choices[0].text, "a row ends with what it began with"
        gone = tuned.post("/v1/unload_lora_adapter", {"lora_name": "tuned"})
        assert gone.text == "Success: LoRA adapter 'tuned' removed successfully."
        with pytest.raises(openai.NotFoundError):
            client.completions.create(**ask | {"model": "tuned"})
        pieces += [chunk.choices[0].text for chunk in running]
        assert "".join(pieces) == plain, "the model itself is as it was"
    assert tuned.post("/v1/unload_lora_adapter", {"lora_name": "tuned"}).status_code == 404
    assert tuned.becomes_idle()


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("../outside", 403), ("one/../../outside", 403), ("link", 403), ("/etc", 403),
        ("outside", 404), ("one/adapter_config.json", 404), ("empty", 400), ("\0", 400),
        ("a" * 5000, 404), (".", 400), ("", 400),
    ],
)  # fmt: skip
def test_an_adapter_is_read_below_its_root_alone(rooted, path, status):
    answer = load(rooted, "x", path)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "lora_path"
    assert rooted.llm.adapters == {}


@pytest.mark.filterwarnings("ignore")
def test_an_engine_that_starts_over_has_its_adapters(tuned):
    load(tuned, "tuned", "one")
    ask = {**LONG, "prompt": "Hello", "max_tokens": 20, "model": "tuned"}
    with tuned.client() as client:
        before = client.completions.create(**ask).choices[0].text
        fail_once(tuned, RuntimeError("a fault"))
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**ask)
        assert wait_until(lambda: tuned.service.engine.status == "ready")
        assert client.completions.create(**ask).choices[0].text == before


def test_without_a_root_no_adapter_is_read(live, adapters):
    answer = load(live, "x", adapters / "root" / "one")
    assert answer.status_code == 403 and "server.adapter_root" in answer.text
    told = live.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y", "z": 1})
    assert json.loads(told.text)["error"]["code"] in ("unknown_parameter", "forbidden")


@pytest.mark.parametrize("opens", [True, False])
def test_the_engines_thread_leaves_mlx_nothing_to_destroy(tiny_directory, opens, monkeypatch):
    # What it left, MLX would destroy after the thread was joined, with the interpreter, which may
    # be ending by then: one server in eighty aborted at its end.
    cleared = []
    clear = mx.clear_streams
    monkeypatch.setattr(
        mx, "clear_streams", lambda: (cleared.append(threading.current_thread().name), clear())
    )
    if opens:
        EngineThread(lambda: LLM(tiny_directory)).stop()
    else:
        with pytest.raises(ParameterError):
            EngineThread(lambda: LLM(tiny_directory, max_batch_size=0))
    assert cleared == ["engine"]
