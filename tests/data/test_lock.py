"""One process writes to a directory; its lock ends with it."""

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from command_line import ROOT

from runner.data.lock import LOCK_FILE, DirectoryLock
from runner.errors import OutputError

HOLDER = """
import sys, time
from pathlib import Path
from runner.data.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""

HEIR = """
import os, signal, sys, time
from pathlib import Path
from runner.data.lock import DirectoryLock
lock = DirectoryLock(Path(sys.argv[1]))
lock.acquire()
heir = os.fork()
if not heir:
    os.close(1)
    time.sleep(60)
print(heir, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_second_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    with DirectoryLock(tmp_path):
        for second in (DirectoryLock(tmp_path).acquire, DirectoryLock(tmp_path).check):
            with pytest.raises(
                OutputError, match=rf"another process writes there \(pid {os.getpid()}"
            ):
                second()
    with DirectoryLock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_asking_who_holds_it_makes_no_file_and_keeps_no_lock(tmp_path: Path) -> None:
    assert not DirectoryLock(tmp_path).is_held and list(tmp_path.iterdir()) == []
    with DirectoryLock(tmp_path):
        assert DirectoryLock(tmp_path).is_held
        assert DirectoryLock(tmp_path).is_held
    assert not DirectoryLock(tmp_path).is_held


def test_a_disk_without_room_for_the_process_id_is_locked_all_the_same(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with DirectoryLock(tmp_path), pytest.raises(OutputError, match=r"\(pid unknown\)"):
            DirectoryLock(tmp_path).acquire()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_looking_makes_no_file_and_takes_nothing(tmp_path: Path) -> None:
    DirectoryLock(tmp_path).check()
    DirectoryLock(tmp_path / "nowhere").check()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK_FILE).write_text("123\n")
    DirectoryLock(tmp_path).check()
    with DirectoryLock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text() == f"{os.getpid()}\n"


def test_a_dead_process_leaves_no_lock(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"pid {process.pid}"):
            DirectoryLock(tmp_path).acquire()
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK_FILE).exists()
    with DirectoryLock(tmp_path):
        pass


def test_what_a_killed_process_was_starting_is_waited_for(tmp_path: Path) -> None:
    """MLX starts compilers; one that its parent had forked when it was killed keeps the lock until
    it runs."""
    ended = subprocess.run(
        [sys.executable, "-c", HEIR, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    heir = int(ended.stdout)
    with pytest.raises(OutputError, match=r"another process writes there"):
        DirectoryLock(tmp_path).acquire()
    assert DirectoryLock(tmp_path).is_held
    later = threading.Timer(0.2, os.kill, (heir, signal.SIGKILL))
    later.start()
    with DirectoryLock(tmp_path):
        later.join()


def test_a_file_that_was_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, opened = DirectoryLock(tmp_path), []
    take = lock._lock

    def slow(file, kind):
        opened.append(file)
        if len(opened) == 1:  # Its last holder goes between opening and locking.
            (tmp_path / LOCK_FILE).unlink()
        take(file, kind)

    monkeypatch.setattr(lock, "_lock", slow)
    lock.acquire()
    assert len(opened) == 2
    with pytest.raises(OutputError):
        DirectoryLock(tmp_path).acquire()
    lock.release()


def test_a_file_system_without_locks_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import fcntl

    def refuse(*given: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="No locks available"), DirectoryLock(tmp_path):
        pass
