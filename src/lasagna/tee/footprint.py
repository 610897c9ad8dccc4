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
from pathlib import Path
from typing import Final

from lasagna.tee.epc import MIN_PAGES
from lasagna.tee.epc_stats import StatsFile
from lasagna.units import KIB, PAGE, Bytes

_MAPPING: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ...(.) \S+ \S+ \S+ *(.*)")
OBSERVE_S: Final = 2.0
"""How often the hot footprint of a program is read."""
_EMULATOR: Final = "liblasagna_epc.so"
_REFERENCED: Final = "Referenced:"


def referenced_bytes(smaps: str, without: Sequence[tuple[int, int]]) -> tuple[Bytes, Bytes]:
    """Bytes referenced since ``clear_refs``, over all mappings but some: anonymous, and of files.

    Args:
        smaps: text of ``/proc/PID/smaps``.
        without: start and size of ranges; a mapping that overlaps one is not counted.
    """
    total, counted, of_file = [0, 0], False, False
    for line in smaps.splitlines():
        mapping = _MAPPING.fullmatch(line)
        if mapping:
            start, end = int(mapping[1], 16), int(mapping[2], 16)
            overlaps = any(start < s + size and s < end for s, size in without if size)
            shared = mapping[3] == "s"
            of_file = mapping[4].startswith("/")
            counted = not overlaps and not shared and _EMULATOR not in mapping[4]
        elif counted and line.startswith(_REFERENCED):
            total[of_file] += int(line.split()[1]) * KIB
    return Bytes(total[0]), Bytes(total[1])


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
        self._hot = Bytes(0)
        self._anonymous = self._files = 0
        self._last: deque[int] = deque(maxlen=3)

    @property
    def hot_bytes(self) -> Bytes:
        """What is deducted now."""
        return self._hot

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
        anonymous, files = referenced_bytes(smaps, own)
        self._anonymous = max(self._anonymous, anonymous)
        self._last.append(files)
        if len(self._last) == self._last.maxlen:
            self._files = max(self._files, min(self._last))
        self._hot = Bytes(self._anonymous + (self._files or max(self._last)))
        pages = max(MIN_PAGES, self._limit_pages - -(-self._hot // PAGE))
        self._file.set_limit(pages)
