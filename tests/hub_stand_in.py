"""A stand-in for the Hugging Face hub on the loopback: repositories, revisions, refusals."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".gguf")
"""Files that git keeps elsewhere, known by their SHA-256."""
REFUSALS = {
    "gated": (403, "GatedRepo"),
    "absent": (404, "RepoNotFound"),
    "private": (401, ""),
    "forbidden": (403, ""),
    "broken": (500, ""),
}
"""Names of models that one cannot have, and how the hub says so."""


class HubStandIn:
    """What it holds and what was asked of it."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, bytes]] = {}
        """Files by their path, by commit; a commit belongs to the model org/name."""
        self.branches: dict[str, str] = {}
        self.fetched: list[tuple[str, str | None]] = []
        """Files that were read, and the range of each that was asked for."""
        self.cut: dict[str, int] = {}
        """Files of which the next answer ends after so many bytes, the connection closed."""
        self.spoiled: dict[str, int] = {}
        """Files of which so many answers have other bytes than were promised."""
        self.url = ""

    def publish(self, directory: Path, branch: str = "main", **more: bytes) -> str:
        """Makes the files of a directory the latest commit of a branch; returns it."""
        files = {it.name: it.read_bytes() for it in directory.iterdir() if it.is_file()} | more
        digest = hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files)))
        commit = digest.hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def names(self) -> list[str]:
        """The files that were read, each as often as it was."""
        return [name for name, _ in self.fetched]

    def entry(self, name: str, content: bytes) -> dict[str, Any]:
        """A file as the hub's listing has it."""
        git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git}
        if name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry


@contextmanager
def serving() -> Iterator[HubStandIn]:
    """A stand-in that answers while inside."""
    hub = HubStandIn()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self.do_GET()

    def do_GET(self) -> None:
        """The description of a model, its listing, or a file."""
        path, _, _ = self.path.partition("?")
        name = re.search(r"/org/([\w.-]+)", path)
        if name and name[1] in REFUSALS:
            return self._refuse(*REFUSALS[name[1]])
        if found := re.fullmatch(r"/api/models/org/name(?:/revision/(.+))?", path):
            return self._describe(found[1] or "main")
        if found := re.fullmatch(r"/api/models/org/name/tree/(\w+)", path):
            listed = self.hub.commits[found[1]].items()
            return self._json([self.hub.entry(name, content) for name, content in listed])
        if found := re.fullmatch(r"/org/name/resolve/(\w+)/(.+)", path):
            return self._file(found[1], found[2])
        return self._refuse(404, "RepoNotFound")

    def _describe(self, revision: str) -> None:
        revision = revision.replace("%2F", "/")
        commit = self.hub.branches.get(revision, revision)
        if commit not in self.hub.commits:
            return self._refuse(404, "RevisionNotFound")
        siblings = [{"rfilename": name} for name in self.hub.commits[commit]]
        return self._json({"id": "org/name", "sha": commit, "siblings": siblings})

    def _file(self, commit: str, name: str) -> None:
        content = self.hub.commits[commit].get(name)
        if content is None:
            return self._refuse(404, "EntryNotFound")
        entry = self.hub.entry(name, content)
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        body = content[start:]
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{entry.get("lfs", entry)["oid"]}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.hub.fetched.append((name, asked))
            self._write(name, body)

    def _write(self, name: str, body: bytes) -> None:
        if self.hub.spoiled.get(name, 0) > 0:
            self.hub.spoiled[name] -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body[: self.hub.cut.pop(name, len(body))])

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Says nothing."""
