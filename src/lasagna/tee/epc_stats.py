"""What a process under the EPC emulator tells while it runs: its shared file, read from outside.

Mirrors ``struct epc_stats`` of ``native/epc/stats.h``; a test compares the two.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lasagna.errors import LasagnaError
from lasagna.tee.epc_profiles import Costs

MAGIC: Final = 0x314350456E67734C
RANGES: Final = 8
THREADS: Final = 64
FIELDS: Final = (
    "magic pid limit_pages region_pages charge_load_ns charge_add_ns charge_evict_ns"
    " charge_entry_ns own_latency_ns own_load_ns own_evict_ns resident_pages free_pages"
    " evicted_pages allocated_bytes peak_resident_pages added loaded ahead evicted"
    " second_chances waits wait_ns load_ns evict_ns late_loads late_evicts unpaid_ns entries"
    " entry_ns"
).split()
"""The counters, in the file's order; ranges and threads follow."""
OTHERS: Final = 2**32 - 1
"""The thread id of the entry that stands for all threads that found no other."""
_LAYOUT: Final = struct.Struct(f"<{len(FIELDS) + 2 * RANGES + 3 * THREADS}Q")
_SUFFIX: Final = ".epc"


@dataclass(frozen=True, slots=True)
class ThreadStats:
    """Faults of one thread, and the nanoseconds that they took.

    Attributes:
        tid: of the thread, or :data:`OTHERS`.
        faults: pages that were loaded or added for it.
        fault_ns: that it waited for them, charges included.
    """

    tid: int
    faults: int
    fault_ns: int


@dataclass(frozen=True, slots=True)
class EpcStats:
    """A moment of one process. Names and units as in ``native/epc/stats.h``."""

    counters: dict[str, int]
    own: tuple[tuple[int, int], ...]
    threads: tuple[ThreadStats, ...]

    def __getitem__(self, name: str) -> int:
        """A counter by its name."""
        return self.counters[name]

    @property
    def faults(self) -> int:
        """Pages that were loaded or added: what a thread had to wait for."""
        return self["loaded"] + self["added"]


class StatsFile:
    """The mapped file of one process; its last figures stay readable when the process has ended."""

    SIZE: Final = _LAYOUT.size

    def __init__(self, path: Path) -> None:
        """Map the file.

        Raises:
            LasagnaError: it is no such file.
            FileNotFoundError: there is none, or no longer.
        """
        with path.open("r+b") as file:
            found = os.fstat(file.fileno())
            size = found.st_size
            if size != _LAYOUT.size:
                raise LasagnaError(f"{path} is no statistics file of this version of the emulator")
            self._memory = mmap.mmap(file.fileno(), size)
        self._inode = (found.st_dev, found.st_ino)
        self.path = path

    @property
    def started(self) -> bool:
        """Whether the process's emulator is ready; before that its figures mean nothing."""
        return bool(struct.unpack_from("<Q", self._memory)[0] == MAGIC)

    @property
    def replaced(self) -> bool:
        """Whether there is a newer file: the process runs another program since (execve)."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False  # it is about to be, or the process has ended
        return (found.st_dev, found.st_ino) != self._inode

    def read(self) -> EpcStats:
        """The figures of this moment; the process runs on, so they may be an operation apart."""
        values = _LAYOUT.unpack(self._memory[: _LAYOUT.size])
        count = len(FIELDS)
        starts, sizes = values[count : count + RANGES], values[count + RANGES : count + 2 * RANGES]
        rest = values[count + 2 * RANGES :]
        threads = [ThreadStats(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
        return EpcStats(
            dict(zip(FIELDS, values[:count], strict=True)),
            tuple(zip(starts, sizes, strict=True)),
            tuple(thread for thread in threads if thread.tid),
        )

    def set_limit(self, pages: int) -> None:
        """Lower the limit, or raise it again up to what the process was started with."""
        self._set("limit_pages", pages)

    def set_charges(self, costs: Costs) -> None:
        """Charge other costs from now on; the limit stays."""
        self._set("charge_load_ns", costs.load_ns)
        self._set("charge_add_ns", costs.add_ns)
        self._set("charge_evict_ns", costs.evict_ns)
        self._set("charge_entry_ns", costs.entry_ns)

    def _set(self, field: str, value: int) -> None:
        struct.pack_into("<Q", self._memory, 8 * FIELDS.index(field), value)


def above_charge(stats: EpcStats) -> Iterator[tuple[str, int, int]]:
    """Operations that take longer here than their charge: name, own cost and charge, both in ns."""
    own = {
        "a page load": (stats["own_latency_ns"] + stats["own_load_ns"], stats["charge_load_ns"]),
        "an eviction": (stats["own_evict_ns"], stats["charge_evict_ns"]),
    }
    for operation, (own_ns, charge_ns) in own.items():
        if own_ns > charge_ns > 0:
            yield operation, own_ns, charge_ns


def processes(folder: Path) -> Iterator[StatsFile]:
    """The files of processes that live; those of dead ones are removed."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        if not path.stem.isdigit():
            continue
        if not Path(f"/proc/{path.stem}").exists():
            path.unlink(missing_ok=True)
            continue
        try:
            file = StatsFile(path)
        except (FileNotFoundError, LasagnaError):
            continue  # it has ended meanwhile, or is about to begin
        if file.started:
            yield file


def stats_path(folder: Path, pid: int) -> Path:
    """Where a process's file is."""
    return folder / f"{pid}{_SUFFIX}"
