"""The real process: what is sent to it, how it is told to end, and its engine's own faults."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from command_line import ROOT
from live_server import wait_until

BODY = {"prompt": "Hello", "max_tokens": 5, "ignore_eos": True}


class Process:
    """`runner serve` as a user starts it, but that it can be made to fail."""

    def __init__(self, place: Path) -> None:
        self.fault = place / "fault"
        options = ["serve", f"model.path={place / 'tiny'}", "server.port=0"]
        options += ["server.shutdown_timeout=20", "engine.max_batch_size=8"]
        script = ROOT / "tests" / "serve_with_faults.py"
        self.said = place / "said"
        with self.said.open("w") as file:
            self.running = subprocess.Popen(
                [sys.executable, str(script), str(self.fault), *options],
                cwd=place, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=file, stderr=file,
            )  # fmt: skip
        listens = "Serving tiny at http://127.0.0.1:"
        assert wait_until(lambda: listens in self.said.read_text(), 60), self.said.read_text()
        self.url = self.said.read_text().partition("Serving")[2].split()[2]
        self.port = int(self.url.rpartition(":")[2])
        self.client = httpx.Client(base_url=self.url, trust_env=False, timeout=30)

    def rest(self) -> str:
        """What it says until its end."""
        self.running.wait(timeout=60)
        return self.said.read_text()

    def post(self, **fields: object) -> httpx.Response:
        """A completion."""
        return self.client.post("/v1/completions", json=BODY | fields)

    def send(self, raw: bytes, *, seconds: float = 5.0) -> bytes:
        """What comes back for some bytes, until it closes or is silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            answer = b""
            with contextlib.suppress(OSError):
                connection.sendall(raw)
                while part := connection.recv(65536):
                    answer += part
            return answer

    def is_well(self) -> bool:
        """Whether it answers a request, as ever."""
        return self.client.get("/health").status_code == self.post().status_code == 200


@pytest.fixture(scope="module")
def process(tmp_path_factory, tiny_directory):
    place = tmp_path_factory.mktemp("served")
    (place / "tiny").symlink_to(tiny_directory)
    made = Process(place)
    yield made
    made.client.close()
    made.running.kill()
    made.rest()


def posted(body: bytes, *, kind: str = "application/json", length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {size}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def status_of(answer: bytes) -> int:
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0


DEEP = b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
BODIES = [
    (posted(b"\xff\xfe\x00garbage"), 400),
    (posted(b"[]"), 400),
    (posted(b'"text"'), 400),
    (posted(b"{"), 400),
    (posted(b""), 400),
    (posted(DEEP), 400),
    (posted(b'{"prompt": "x", "metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 200 + b"}"), 400),
    (posted(b'{"prompt": "\\ud800"}'), 400),
    (posted(b'{"prompt": "x", "user": "\\udfff"}'), 400),
    (posted(b'{"prompt": "x", "temperature": NaN}'), 400),
    (posted(b'{"prompt": "x", "temperature": -Infinity}'), 400),
    (posted(b'{"prompt": "x", "temperature": 1e999}'), 400),
    (posted(b'{"prompt": "x", "logit_bias": {"5": 1e999}}'), 400),
    (posted(b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"), 400),
    (posted(b'{"prompt": "x", "max_tokens": 1, "seed": ' + b"9" * 4000 + b"}"), 200),
    (posted(b'{"prompt": "x"}', kind="text/plain"), 415),
    (posted(b"--x\r\n", kind="multipart/form-data; boundary=x"), 415),
    (posted(b'{"prompt": "x", "max_tokens": 1}', kind="application/json; charset=utf-8"), 200),
    (posted(b'{"prompt": "' + b"x" * 10_000_000 + b'"}'), 413),
    (posted(b'{"prompt": "x"}', length=3), 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 50, 0),
    (b"GET / HTTP/9.9\r\n\r\n", 0),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 0),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
     b"Content-Length: 6\r\n\r\nabcde", 0),
    (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
     b"Connection: close\r\n\r\nzz\r\n", 0),
    (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 0),
    (b"GET /%ff%00/../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0),
]  # fmt: skip


def test_nothing_that_is_sent_is_more_than_a_bad_request(process):
    for raw, status in BODIES:
        answer = process.send(raw)
        found = status_of(answer)
        # What is no HTTP is the concern of the library that reads it, which has its own numbers.
        assert found == status or (not status and 400 <= found < 500), (raw[:200], answer[:300])
        if raw.startswith(b"POST /v1") and status in (400, 413, 415) and b"{" in answer:
            told = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert set(told) == {"message", "type", "param", "code"}
    assert process.is_well()


def test_connections_that_are_half_open_hold_nobody_up(process):
    halves = [
        b"", b"POST", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n",
        posted(b'{"prompt": "x"', length=500), posted(b"", length=10**9),
    ]  # fmt: skip
    with contextlib.ExitStack() as held:
        for raw in halves * 8:
            address = ("127.0.0.1", process.port)
            connection = held.enter_context(socket.create_connection(address, timeout=5))
            connection.sendall(raw)
        assert process.is_well()
    for raw in halves:
        with socket.create_connection(("127.0.0.1", process.port), timeout=5) as connection:
            connection.sendall(raw)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert process.is_well()


def test_an_engine_that_is_killed_starts_over(process):
    answers = process.post(seed=3).json()["choices"]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(process.post, seed=3, max_tokens=240) for _ in range(4)]
        process.fault.touch()
        done = [one.result() for one in asked]
    assert not process.fault.exists()
    failed = [one for one in done if one.status_code != 200]
    assert failed and {one.status_code for one in failed} == {503}
    assert all("the test's own" in one.json()["error"]["message"] for one in failed)
    assert process.is_well()
    assert process.post(seed=3).json()["choices"] == answers


def test_a_process_that_is_told_to_end_lets_its_streams_end(process):
    """The last of this process: its log has the fault that was asked for, and nothing else."""
    body = {"max_tokens": 200, "stream": True, "seed": 1}
    with process.client.stream("POST", "/v1/completions", json=BODY | body) as answer:
        lines = answer.iter_lines()
        pieces = [next(lines)]
        process.running.send_signal(signal.SIGTERM)
        pieces += lines
    told = [json.loads(line[6:]) for line in pieces if line.startswith("data: {")]
    assert told[-1]["choices"][0]["finish_reason"] == "length"
    assert [line for line in pieces if line][-1] == "data: [DONE]"
    said = process.rest()
    assert process.running.returncode == 0, said
    assert said.count("Traceback") == 1 and "the test's own" in said, said
    with pytest.raises(httpx.ConnectError):
        process.client.get("/health")


def test_ctrl_c_twice_does_not_wait(tmp_path, tiny_directory):
    (tmp_path / "tiny").symlink_to(tiny_directory)
    process = Process(tmp_path)
    address = ("127.0.0.1", process.port)
    with contextlib.closing(process.client), socket.create_connection(address) as connection:
        # A body that never comes whole is something to wait for.
        connection.sendall(posted(b"{", length=100))
        assert process.is_well(), "it has heard of that one, too"
        process.running.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.running.poll() is None
        started = time.monotonic()
        process.running.send_signal(signal.SIGINT)
        said = process.rest()
    assert time.monotonic() - started < 10 and process.running.returncode == 0, said
    assert "Traceback" not in said
