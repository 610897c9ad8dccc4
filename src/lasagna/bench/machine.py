"""Where a benchmark ran: the machine, the versions, the commit, and how quiet it was.

Everything is read from ``/proc``, ``/sys``, the installed packages and git. What can't be read is
None: a container may hide any of it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

FLAGS_OF_INTEREST: Final = (
    *("avx2", "avx512f", "avx512_vnni", "amx_tile", "aes", "vaes", "sgx"),  # x86
    *("asimd", "sve", "pmull"),  # arm64; its "aes" is spelt as on x86
)

STEAL_LIMIT_PERCENT: Final = 2.0
"""Beyond this share of stolen time a run's figures carry a warning."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about the machine. ``cores`` are those that this process may use."""

    cpu: str | None
    cores: int
    flags: tuple[str, ...]
    memory_bytes: int | None
    kernel: str
    governor: str | None
    hypervisor: bool


@dataclass(frozen=True, slots=True)
class Versions:
    """Versions of what a figure depends on; None for a package that is not installed."""

    lasagna: str | None
    python: str
    numpy: str | None
    onnxruntime: str | None
    cryptography: str | None
    openssl: str


@dataclass(frozen=True, slots=True)
class Commit:
    """The source's commit. ``dirty``: it had changes besides those under ``results/``."""

    id: str
    dirty: bool


@dataclass(frozen=True, slots=True)
class CpuTicks:
    """Totals over all processors since boot, in clock ticks."""

    total: int
    idle: int
    steal: int


@dataclass(frozen=True, slots=True)
class Noise:
    """What else the machine did during a run.

    Attributes:
        steal_percent: share of processor time that the hypervisor gave to others.
        busy_percent: share of processor time that was not idle, this run's own included.
        load_before: the load average of the minute before the run.
        warning: for people; None if the run was quiet.
    """

    steal_percent: float
    busy_percent: float
    load_before: float
    warning: str | None


def read_machine(root: Path = Path("/")) -> Machine:
    """Facts about this machine, from the ``/proc`` and ``/sys`` below ``root``."""
    facts = _first_processor(_read(root / "proc/cpuinfo"))
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    memory = _first_processor(_read(root / "proc/meminfo")).get("MemTotal")
    governor = _read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return Machine(
        cpu=facts.get("model name"),
        cores=len(os.sched_getaffinity(0)),
        flags=tuple(flag for flag in FLAGS_OF_INTEREST if flag in flags),
        memory_bytes=int(memory.split()[0]) * 1024 if memory else None,
        kernel=platform.release(),
        governor=governor or None,
        hypervisor="hypervisor" in flags,
    )


def read_versions() -> Versions:
    """Versions of the packages that are installed, and of the OpenSSL that cryptography uses."""
    from cryptography.hazmat.backends.openssl import backend

    return Versions(
        lasagna=_version("lasagna"),
        python=platform.python_version(),
        numpy=_version("numpy"),
        onnxruntime=_version("onnxruntime"),
        cryptography=_version("cryptography"),
        openssl=backend.openssl_version_text(),
    )


def read_commit(source: Path | None = None) -> Commit | None:
    """The commit of the source tree; None outside one, or before the first commit.

    Args:
        source: the tree; by default the one that this file was imported from, if it is one.
    """
    tree = source or Path(__file__).resolve().parents[3]
    if not (tree / "pyproject.toml").exists() or not (tree / ".git").exists():
        return None
    commit = _git(tree, "rev-parse", "--verify", "HEAD")
    # Results are written by the benchmarks themselves: the second of two would always be dirty.
    changes = _git(tree, "status", "--porcelain", "--", ".", ":(exclude)results")
    return Commit(commit, dirty=changes != "") if commit else None


def read_ticks(root: Path = Path("/")) -> CpuTicks | None:
    """The processors' time so far; None where there is no ``/proc/stat``."""
    # proc(5): cpu user nice system idle iowait irq softirq steal guest guest_nice, where guest
    # times are already counted in user and nice.
    fields = _read(root / "proc/stat").partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return None
    times = [int(field) for field in fields[1:9]]
    return CpuTicks(total=sum(times), idle=times[3] + times[4], steal=times[7])


def noise_between(
    before: CpuTicks | None, after: CpuTicks | None, load_before: float
) -> Noise | None:
    """How noisy the machine was from ``before`` to ``after``; None if it can't be told."""
    if before is None or after is None or after.total <= before.total:
        return None
    span = after.total - before.total
    # /proc/stat's idle may step back a little (proc(5)), so no share below zero.
    steal = max(0.0, 100 * (after.steal - before.steal) / span)
    busy = max(0.0, 100 - 100 * (after.idle - before.idle) / span)
    warning = None
    if steal > STEAL_LIMIT_PERCENT:
        warning = (
            f"the hypervisor took {steal:.1f} % of the processor time during the run "
            f"(more than {STEAL_LIMIT_PERCENT:g} %): the figures are not those of a quiet machine"
        )
    return Noise(round(steal, 2), round(busy, 2), round(load_before, 2), warning)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _first_processor(text: str) -> dict[str, str]:
    """``key : value`` lines up to the first blank one."""
    lines = text.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(tree: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    done = subprocess.run(
        [git, "-C", str(tree), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else None
