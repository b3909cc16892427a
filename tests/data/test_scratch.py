"""Scratch memory lies in a file that nobody sees, and is there even where no file can be."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from runner.data import scratch
from runner.data.scratch import scratch_memory

MIB = 1 << 20


def test_it_is_zeros_to_write_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for size in (1, 1000, MIB + 1, 3 * MIB):
        memory = scratch_memory(size)
        assert len(memory) == size and memory[:] == bytes(size)
        memory[size - 1 :] = b"x"
        assert memory[size - 1 :] == b"x"


HELD = """
import resource
from runner.data.scratch import scratch_memory
memory = scratch_memory(64 << 20)
memory[:] = bytes(1 << 20) * 64
anonymous = next(line for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
print(anonymous.split()[1], flush=True)
input()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_one_is_a_file_without_a_name_that_a_killed_process_does_not_leave(
    tmp_path: Path,
) -> None:
    held = subprocess.Popen(
        [sys.executable, "-c", HELD], env=os.environ | {"TMPDIR": str(tmp_path)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with held:
        assert held.stdout is not None
        assert 0 < int(held.stdout.readline()) < 32 * 1024, "KiB that only a swap could take"
        maps = Path(f"/proc/{held.pid}/maps").read_text()
        assert f"{tmp_path}/" in maps, "the file is in TMPDIR"
        assert list(tmp_path.iterdir()) == []
        held.kill()
    assert list(tmp_path.iterdir()) == []


def test_where_the_disk_refuses_it_is_memory_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    with pytest.warns(UserWarning, match="gone: cannot hold a temporary file of 2097152 bytes"):
        memory = scratch_memory(2 * MIB)
    assert memory[:] == bytes(2 * MIB)


def test_a_directory_that_may_itself_be_memory_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(scratch.os, "access", lambda path, mode: True)
    assert scratch._directory() == "/var/tmp"
    monkeypatch.setattr(scratch.os, "access", lambda path, mode: False)
    assert scratch._directory() == tempfile.gettempdir()
