"""What a process under the EPC emulator uses outside the emulated region, as the kernel sees it.

Code, stacks and small allocations live outside the region, but an enclave's would lie in the EPC.
So the pages of them that are *hot*, referenced while the process works, are deducted from its
limit. Shared mappings are not counted: what an enclave shares with its host, such as the sealed
package, is not in the EPC. The kernel tells them: ``clear_refs`` forgets which pages were
referenced, ``smaps`` says which have been since (proc(5)). The emulator's own memory, which no
enclave would have, is left out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lasagna.errors import LasagnaError
from lasagna.tee.epc import MIN_PAGES
from lasagna.tee.epc_stats import EpcStats, StatsFile
from lasagna.units import KIB, PAGE, Bytes

_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...(.) \S+ \S+ \S+ *(.*)")
OBSERVE_S: Final = 2.0
"""How often the hot footprint of a program is read."""
_EMULATOR: Final = "liblasagna_epc.so"


@dataclass(frozen=True, slots=True)
class Outside:
    """What a process has outside the region.

    Attributes:
        anonymous: bytes without a file that were referenced since ``clear_refs``.
        files: bytes of mapped files that were.
        resident: bytes in memory, referenced or not.
    """

    anonymous: Bytes
    files: Bytes
    resident: Bytes


def outside_bytes(smaps: str, without: Sequence[tuple[int, int]]) -> Outside:
    """Sums over all mappings but some.

    Args:
        smaps: text of ``/proc/PID/smaps``.
        without: start and size of ranges; a mapping that overlaps one is not counted.
    """
    referenced, resident, counted, of_file = [0, 0], 0, False, False
    for line in smaps.splitlines():
        mapping = _MAPPING.fullmatch(line)
        if mapping:
            start, end = int(mapping[1], 16), int(mapping[2], 16)
            overlaps = any(start < s + size and s < end for s, size in without if size)
            shared = mapping[3] == "s"
            of_file = mapping[4].startswith("/")
            counted = not overlaps and not shared and _EMULATOR not in mapping[4]
        elif counted and line.startswith("Rss:"):
            resident += int(line.split()[1]) * KIB
        elif counted and line.startswith("Referenced:"):
            referenced[of_file] += int(line.split()[1]) * KIB
    return Outside(Bytes(referenced[0]), Bytes(referenced[1]), Bytes(resident))


class Footprint:
    """Measures a process's hot pages again and again, and deducts the most that it found.

    The largest reading counts, so a process that rests for a while gets nothing back. But the
    kernel marks the pages of a file as referenced for all who map it: when another process starts
    with the same libraries, a reading has its pages too. So of files the least of three readings in
    a row counts, as soon as there are three.
    """

    def __init__(self, file: StatsFile, limit_pages: int) -> None:
        """Begin to observe.

        Args:
            file: of the process.
            limit_pages: that the whole process may have resident.
        """
        self._file = file
        self._limit_pages = limit_pages
        self._proc = Path(f"/proc/{file.path.stem}")
        self._hot = self._resident = Bytes(0)
        self._anonymous = self._files = 0
        self._last: deque[int] = deque(maxlen=3)

    @property
    def hot_bytes(self) -> Bytes:
        """What is deducted now."""
        return self._hot

    @property
    def resident_bytes(self) -> Bytes:
        """The most that was in memory outside the region, hot or not."""
        return self._resident

    @property
    def exceeds_limit(self) -> bool:
        """Whether what is hot leaves less than the emulator's least, which it gets all the same."""
        return self._limit_pages - -(-self._hot // PAGE) < MIN_PAGES

    def stats(self) -> EpcStats:
        """The process's figures of this moment."""
        return self._file.read()

    @property
    def outdated(self) -> bool:
        """Whether the process runs another program by now, of which this knows nothing."""
        return self._file.replaced

    def begin(self) -> None:
        """Forget what has been referenced so far.

        Raises:
            OSError: the process has ended, or is somebody else's.
        """
        self._proc.joinpath("clear_refs").write_text("1")

    def deduct(self) -> None:
        """Read what was referenced since :meth:`begin`, and lower the limit by it.

        Raises:
            OSError: the process has ended, or is somebody else's.
        """
        own = self._file.read().own
        smaps = self._proc.joinpath("smaps").read_text()
        found = outside_bytes(smaps, own)
        self._resident = max(self._resident, found.resident)
        self._anonymous = max(self._anonymous, found.anonymous)
        self._last.append(found.files)
        if len(self._last) == self._last.maxlen:
            self._files = max(self._files, min(self._last))
        self._hot = Bytes(self._anonymous + (self._files or max(self._last)))
        pages = max(MIN_PAGES, self._limit_pages - -(-self._hot // PAGE))
        self._file.set_limit(pages)


class Observer:
    """Deducts the footprint of whatever program a process runs, also when it becomes another."""

    def __init__(self, path: Path, limit_pages: int) -> None:
        """Nothing is read.

        Args:
            path: of the process's statistics; they need not be there yet.
            limit_pages: that all of it may have resident.
        """
        self._path = path
        self._limit_pages = limit_pages
        self.footprint: Footprint | None = None

    def observe(self) -> None:
        """Read what was used since the last time, and begin anew.

        Raises:
            OSError: the process has ended, or is somebody else's.
        """
        if self.footprint is not None and self.footprint.outdated:
            self.footprint = None
        if self.footprint is None:
            self.footprint = self._started()
        else:
            self.footprint.deduct()
        if self.footprint is not None:
            self.footprint.begin()

    def _started(self) -> Footprint | None:
        try:
            file = StatsFile(self._path)
        except (FileNotFoundError, LasagnaError):
            return None  # not yet
        return Footprint(file, self._limit_pages) if file.started else None
