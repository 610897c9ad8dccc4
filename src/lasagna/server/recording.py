"""Records what an enclave does when: asks it for its spans now and then, and writes them down."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, get_args

from lasagna.enclave import messages as m
from lasagna.errors import LasagnaError
from lasagna.server.link import EnclaveLink
from lasagna.server.trace import Faults, Header, Kind, Span, TraceWriter
from lasagna.tee.epc import stats_folder
from lasagna.tee.epc_stats import EpcStats, StatsFile, stats_path

_log: Final = logging.getLogger(__name__)
EVERY_S: Final = 0.25
ANSWER_S: Final = 30.0
_KINDS: Final = frozenset(get_args(Kind))


class Recording:
    """A trace file that grows while an enclave works."""

    def __init__(
        self, path: Path, digests: Mapping[str, bytes], lanes: int, *, emulated: str, policy: str
    ) -> None:
        """Make the file.

        Args:
            path: of the file; one that is there is overwritten.
            digests: of the models, by name.
            lanes: compute threads.
            emulated: EPC profile, or empty.
            policy: by which the enclave is scheduled.

        Raises:
            UsageError: the file can't be made.
        """
        header = Header(
            started=datetime.now(UTC).isoformat(),
            models=tuple(digests),
            lanes=lanes,
            emulated=emulated,
            policy=policy,
            machine=f"{os.cpu_count()} cores, {platform.machine()}",
        )
        self._writer = TraceWriter(path, header)
        self._names = {digest: name for name, digest in digests.items()}
        self._began_s = asyncio.get_running_loop().time()
        self._epc: StatsFile | None = None
        self._faults: EpcStats | None = None

    async def follow(self, link: EnclaveLink, pid: int) -> None:
        """Record one life of the enclave, until its link ends."""
        self._epc = _stats_of(pid)
        self._faults = None
        try:
            while True:
                await self._take(link, record=True)
                await asyncio.sleep(EVERY_S)
        except LasagnaError:
            return  # the enclave is gone
        except OSError as error:
            _log.error("the trace ends here: %s", error)

    async def close(self, link: EnclaveLink | None) -> None:
        """Take what is left, and close the file."""
        try:
            if link is not None:
                await self._take(link, record=False)
            self._writer.close()
        except (LasagnaError, OSError) as error:
            _log.warning("the trace's last part is lost: %s", error)

    async def _take(self, link: EnclaveLink, *, record: bool) -> None:
        taken = await link.call(m.TakeSpans(link.next_id(), record), m.Spans, ANSWER_S)
        if taken.lost:
            _log.warning("%d spans were too many to record", taken.lost)
        self._writer.write(
            Span(
                span.thread,
                span.kind,  # type: ignore[arg-type]  # checked below
                span.begin_s - self._began_s,
                span.end_s - self._began_s,
                self._names[span.model],
                span.slice,
                span.rows,
                span.run,
            )
            for span in taken.spans
            if span.kind in _KINDS and span.model in self._names and span.end_s >= span.begin_s
        )
        self._write_faults()

    def _write_faults(self) -> None:
        if self._epc is None:
            return
        now, before = self._epc.read(), self._faults
        self._faults = now
        if before is not None and (pages := now.faults - before.faults):
            spent = _fault_s(now) - _fault_s(before)
            at_s = asyncio.get_running_loop().time() - self._began_s
            self._writer.write([Faults(at_s, pages, max(0.0, spent))])


def _fault_s(stats: EpcStats) -> float:
    return sum(thread.fault_ns for thread in stats.threads) / 1e9


def _stats_of(pid: int) -> StatsFile | None:
    """The emulator's statistics of a process, if it runs under one."""
    try:
        return StatsFile(stats_path(stats_folder(), pid))
    except (FileNotFoundError, LasagnaError):
        return None
