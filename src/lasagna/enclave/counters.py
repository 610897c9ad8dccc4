"""What the enclave has done so far, for its host. Public facts."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from lasagna.enclave.arrangement import Arrangement
from lasagna.enclave.executor import Job
from lasagna.enclave.messages import Stats, Timings
from lasagna.enclave.pieces import LoadCounters
from lasagna.enclave.weights import Weights


@dataclass(slots=True)
class Counters:
    """Sums since the enclave started, those of former arrangements included. Thread-safe."""

    entries: int = 0
    runs: int = 0
    rows: int = 0
    slice_runs: int = 0
    row_slices: int = 0
    open_s: float = 0.0
    compute_s: float = 0.0
    copy_s: float = 0.0
    seal_s: float = 0.0
    _stall_s: float = 0.0
    _before: LoadCounters = field(default_factory=LoadCounters)
    _told: LoadCounters = field(default_factory=LoadCounters)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, job: Job, weights: Weights) -> Timings:
        """Count a run; what it took, and what was loaded since the run before."""
        command = job.command
        with self._lock:
            self.runs += 1
            slices = command.last - command.first
            self.slice_runs += slices
            self.row_slices += slices * job.rows
            self.rows += 0 if command.keep else job.rows
            self.open_s += job.open_s
            self.compute_s += job.compute_s
            self.copy_s += job.copy_s
            self.seal_s += job.seal_s
            now = self._loads(weights)
            told, self._told = self._told, now
            return Timings(
                open_s=job.open_s,
                wait_s=job.wait_s,
                compute_s=max(0.0, job.compute_s),
                stall_s=max(0.0, job.stall_s),
                copy_s=job.copy_s,
                seal_s=job.seal_s,
                load_bytes=now.loaded_bytes - told.loaded_bytes,
                load_s=max(0.0, now.load_s - told.load_s),
            )

    def keep(self, weights: Weights) -> None:
        """An arrangement is given up: keep what it has counted."""
        with self._lock:
            self._before = self._loads(weights)
            self._stall_s += sum(weights.stall_s)

    def stats(self, id_: int, arrangement: Arrangement | None) -> Stats:
        """The sums."""
        with self._lock:
            loads, stall_s = self._before, self._stall_s
            if arrangement is not None:
                loads = self._loads(arrangement.weights)
                stall_s += sum(arrangement.weights.stall_s)
            return Stats(
                id=id_,
                pool_bytes=arrangement.pool.used if arrangement else 0,
                pool_high_water=arrangement.pool.high_water if arrangement else 0,
                workspace_bytes=arrangement.workspace_bytes if arrangement else 0,
                entries=self.entries,
                runs=self.runs,
                rows=self.rows,
                slice_runs=self.slice_runs,
                row_slices=self.row_slices,
                loads=loads.loads,
                loaded_bytes=loads.loaded_bytes,
                load_s=loads.load_s,
                compute_s=self.compute_s,
                stall_s=stall_s,
                open_s=self.open_s,
                copy_s=self.copy_s,
                seal_s=self.seal_s,
            )

    def _loads(self, weights: Weights) -> LoadCounters:
        counted, before = weights.counters, self._before
        return LoadCounters(
            before.loads + counted.loads,
            before.loaded_bytes + counted.loaded_bytes,
            before.load_s + counted.load_s,
        )
