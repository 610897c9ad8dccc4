from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lasagna.bench.machine import (
    CpuTicks,
    noise_between,
    read_commit,
    read_machine,
    read_ticks,
    read_versions,
)


def plant(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_machine_of_x86(tmp_path: Path) -> None:
    plant(
        tmp_path,
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: AMD EPYC: test\nflags\t\t: fpu aes avx2 vaes hypervisor\n\n"
        "processor\t: 1\nmodel name\t: another\nflags\t\t: sgx\n\n",
    )
    plant(tmp_path, "proc/meminfo", "MemTotal:       24000 kB\nMemFree:  1 kB\n")
    plant(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "performance\n")

    machine = read_machine(tmp_path)

    assert machine.cpu == "AMD EPYC: test"
    assert machine.flags == ("avx2", "aes", "vaes")
    assert machine.hypervisor
    assert machine.memory_bytes == 24000 * 1024
    assert machine.governor == "performance"


def test_machine_of_arm_has_features_for_flags(tmp_path: Path) -> None:
    plant(tmp_path, "proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd aes pmull\n\n")

    assert read_machine(tmp_path).flags == ("aes", "asimd", "pmull")


def test_machine_that_hides_its_facts_is_described_by_none(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)

    assert (machine.cpu, machine.memory_bytes, machine.governor) == (None, None, None)
    assert machine.flags == ()
    assert machine.cores >= 1


def test_versions_are_those_installed() -> None:
    versions = read_versions()

    assert versions.openssl.startswith("OpenSSL ")
    assert versions.lasagna
    assert versions.onnxruntime


def git(tree: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
    subprocess.run(
        [shutil.which("git") or "git", "-C", str(tree), *identity, *arguments],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    plant(tmp_path, "pyproject.toml", "")
    git(tmp_path, "init", "--quiet")
    return tmp_path


def test_commit_of_a_clean_tree(tree: Path) -> None:
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "one")

    commit = read_commit(tree)

    assert commit is not None
    assert len(commit.id) == 40
    assert not commit.dirty


def test_commit_is_dirty_by_any_change_but_results(tree: Path) -> None:
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "one")
    plant(tree, "results/probe.json", "{}")
    after_results = read_commit(tree)
    plant(tree, "src/new.py", "")
    after_source = read_commit(tree)

    assert after_results is not None
    assert not after_results.dirty
    assert after_source is not None
    assert after_source.dirty


def test_tree_without_a_commit_has_none(tree: Path) -> None:
    assert read_commit(tree) is None


def test_folder_that_is_no_source_tree_has_no_commit(tmp_path: Path) -> None:
    assert read_commit(tmp_path) is None


def test_ticks_are_the_first_line_without_guest_times(tmp_path: Path) -> None:
    plant(tmp_path, "proc/stat", "cpu  10 1 5 100 4 0 2 8 3 3\ncpu0 1 1 1 1 1 1 1 1 1 1\n")

    assert read_ticks(tmp_path) == CpuTicks(total=130, idle=104, steal=8)


@pytest.mark.parametrize("text", ["", "intr 5\n", "cpu 1 2 3\n"])
def test_ticks_of_a_strange_system_are_none(tmp_path: Path, text: str) -> None:
    plant(tmp_path, "proc/stat", text)

    assert read_ticks(tmp_path) is None


def test_noise_is_the_share_between_two_readings() -> None:
    noise = noise_between(CpuTicks(1000, 500, 10), CpuTicks(1200, 600, 11), load_before=0.256)

    assert noise is not None
    assert (noise.steal_percent, noise.busy_percent, noise.load_before) == (0.5, 50, 0.26)
    assert noise.warning is None


def test_stolen_time_above_two_percent_is_a_warning() -> None:
    noise = noise_between(CpuTicks(1000, 500, 10), CpuTicks(1200, 600, 15), load_before=0)

    assert noise is not None
    assert noise.warning is not None
    assert "2.5 %" in noise.warning


def test_noise_that_can_not_be_told_is_none() -> None:
    ticks = CpuTicks(1000, 500, 10)

    assert noise_between(None, ticks, 0) is None
    assert noise_between(ticks, None, 0) is None
    assert noise_between(ticks, ticks, 0) is None


def test_idle_time_that_steps_back_is_not_a_share_below_zero() -> None:
    noise = noise_between(CpuTicks(1000, 500, 10), CpuTicks(1001, 503, 9), load_before=0)

    assert noise is not None
    assert (noise.steal_percent, noise.busy_percent) == (0, 0)
