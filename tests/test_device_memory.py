from functools import partial

import mlx.core as mx
import pytest

from runner import device_memory
from runner.device_memory import available_memory, default_memory_budget, parse_bytes
from runner.errors import ParameterError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (8589934592, 2**33),
        ("8589934592", 2**33),
        ("8GiB", 2**33),
        ("8 gib", 2**33),
        ("1.5KiB", 1536),
        ("500MB", 5 * 10**8),
        ("2TB", 2 * 10**12),
        ("7b", 7),
    ],
)
def test_reads_bytes(text, num_bytes):
    assert parse_bytes("memory_budget", text) == num_bytes


@pytest.mark.parametrize("text", ["", "lots", "8 G i B", "-1", "0", "0GiB", "8PiB", "GiB", "1e9"])
def test_refuses_what_is_no_number_of_bytes(text):
    with pytest.raises(ParameterError, match=f"memory_budget='{text}' is not allowed: .*8GiB"):
        parse_bytes("memory_budget", text)


def machine(root, files):
    """A made-up machine of 8000 kB, 6000 kB of them available."""
    files = {"proc/meminfo": "MemTotal: 8000 kB\nMemAvailable:    6000 kB\n"} | files
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(names: tuple[str, str, str], path: str, *contents: str) -> dict[str, str]:
    """The files of a control group."""
    pairs = zip(names, contents, strict=True)
    return {f"sys/fs/cgroup/{path}/memory.{name}": f"{content}\n" for name, content in pairs}


second_version = partial(group, ("max", "current", "stat"))
first_version = partial(group, ("limit_in_bytes", "usage_in_bytes", "stat"))


def test_without_a_limit_it_is_what_the_host_has(tmp_path):
    assert available_memory(machine(tmp_path, {})) == 6000 * 1024
    none = {"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}
    assert available_memory(machine(tmp_path, none)) == 6000 * 1024


def test_a_control_group_and_each_above_it_limit_it(tmp_path):
    job = ("4000000", "1500000", "anon 7\ninactive_file 500000")
    files = {"proc/self/cgroup": "0::/outer/job\n"} | second_version("outer/job", *job)
    assert available_memory(machine(tmp_path, files)) == 3_000_000
    outer = second_version("outer", "2000000", "1900000", "inactive_file 0")
    assert available_memory(machine(tmp_path, outer)) == 100_000


def test_the_first_version_of_control_groups_counts_too(tmp_path):
    files = {"proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n"}
    files |= first_version("memory/job", "1000000", "700000", "total_inactive_file 200000")
    files |= first_version("memory", "9223372036854771712", "5", "total_inactive_file 0")
    assert available_memory(machine(tmp_path, files)) == 500_000


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "10\n",
        "sys/fs/cgroup/memory.current": "20\n",
        "sys/fs/cgroup/memory.stat": "",
    }
    assert available_memory(machine(tmp_path, files)) == 0


def test_where_linux_says_nothing_it_is_what_is_built_in(tmp_path):
    assert available_memory(tmp_path) >= 2**28


def test_this_machine_has_some_memory_and_a_share_of_it_is_the_default():
    assert 0 < available_memory() < 2**50
    assert mx.get_active_memory() < default_memory_budget() < 2**50


@pytest.mark.parametrize(
    ("info", "held", "budget"),
    [
        ({"max_recommended_working_set_size": 1000, "memory_size": 5000}, 70, 900),
        ({"free_memory": 1000, "total_memory": 5000}, 70, 970),
    ],
    ids=["metal", "cuda"],
)
def test_an_accelerator_says_itself_what_it_has(monkeypatch, info, held, budget):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "get_active_memory", lambda: held - 20)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 20)
    assert default_memory_budget() == budget


def test_a_cpu_gives_what_mlx_holds_and_a_share_of_the_rest(monkeypatch):
    monkeypatch.setattr(device_memory, "available_memory", lambda: 1000)
    monkeypatch.setattr(mx, "get_active_memory", lambda: 30)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: 0)
    if mx.default_device() == mx.cpu:
        assert default_memory_budget() == 830
