"""Weights in enclave memory: pinned slices stay, the others pass through a ring of slots.

A loader thread decrypts ahead, always the absent slice that is needed next. A compute thread that
finds its slice not ready helps: it takes chunks of it beside the loader until none is left, rather
than wait. Slices run in a cycle, so what was used just now is needed last: the loader overwrites a
slice when it has been used, and never one that is needed before the slice to load.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from lasagna.enclave.pool import Memory
from lasagna.errors import PackageError
from lasagna.package.format import Variant, weight_chunks
from lasagna.package.reader import OpenPackage


@dataclass(slots=True, eq=False)
class _Slot:
    """A piece of the ring, in one of these states.

    ==========  =====  =======  ==========  =====  ==============================================
    state       holds  missing  next_chunk  error  leaves it
    ==========  =====  =======  ==========  =====  ==============================================
    free        -1     0        0                  ``_claim``: to filling
    filling     slice  > 0      < chunks           ``_take_chunk`` of the last one: to finishing
    finishing   slice  > 0      chunks             ``_fill`` of the last one: to ready
    ready       slice  0        chunks             ``_claim`` for another slice, if without users
    broken      slice  >= 0     chunks      set    ``release`` by who was told, or ``_claim``
    ==========  =====  =======  ==========  =====  ==============================================

    ``missing`` counts chunks that are not decrypted, ``users`` threads between acquire and release.
    From filling or finishing, a chunk that does not open leads to broken. A slot stays broken until
    somebody needs its slice and is told; were it freed at once, the loader would try it again and
    again.
    """

    memory: Memory
    holds: int = -1
    users: int = 0
    next_chunk: int = 0
    missing: int = 0
    error: PackageError | None = None

    @property
    def ready(self) -> bool:
        return self.holds >= 0 and self.missing == 0 and self.error is None


@dataclass(slots=True)
class LoadCounters:
    """What loading has cost so far: slices, bytes, and seconds of all threads that decrypt."""

    loads: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0


@dataclass(slots=True)
class WeightStore:
    """Plaintext weights of one model, for any number of compute threads.

    Attributes:
        package: where they come from.
        variant: whose slices.
        pinned: memory of the slices that stay, by number.
        ring: memory of the slots.
        stagings: ciphertext memory, one piece for the loader and one for every compute thread.
        counters: for statistics.
        stall_s: seconds that each compute thread has spent in ``acquire`` over slices that were
            not there, decrypting with the loader or waiting for it.
    """

    package: OpenPackage
    variant: Variant
    pinned: dict[int, Memory]
    ring: Sequence[Memory]
    stagings: Sequence[Memory]
    counters: LoadCounters = field(default_factory=LoadCounters)
    stall_s: list[float] = field(init=False)
    _slots: list[_Slot] = field(init=False)
    _where: dict[int, _Slot] = field(default_factory=dict)
    _filling: list[_Slot] = field(default_factory=list)
    _loader_waits: bool = False
    _at: dict[int, int] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False
    _streamed: tuple[int, ...] = field(init=False)
    _first_streamed: list[int] = field(init=False)
    _chunks: list[list[tuple[int, int, int, int]]] = field(init=False)

    def __post_init__(self) -> None:
        """Everything is absent until ``load_pinned`` and the loader have run."""
        self.stall_s = [0.0] * (len(self.stagings) - 1)
        self._slots = [_Slot(memory) for memory in self.ring]
        numbers = range(len(self.variant.slices))
        manifest = self.package.manifest
        self._chunks = [weight_chunks(manifest, facts) for facts in self.variant.slices]
        self._streamed = tuple(n for n in numbers if n not in self.pinned)
        self._first_streamed = [bisect_left(self._streamed, n) for n in numbers]

    def load_pinned(self) -> None:
        """Decrypt all pinned slices, on the calling thread.

        Raises:
            PackageError: a chunk does not open.
        """
        start = time.perf_counter()
        for number, memory in self.pinned.items():
            for chunk in range(len(self._chunks[number])):
                self._decrypt(number, chunk, memory, self.stagings[0])
            self._count(number)
        self.counters.load_s += time.perf_counter() - start

    def load_ahead(self) -> None:
        """Keep the ring filled with what is needed next, until ``close``: the loader thread."""
        while True:
            with self._changed:
                while (job := self._next_job()) is None and not self._closed:
                    self._loader_waits = True
                    self._changed.wait()
                    self._loader_waits = False
                if self._closed or job is None:
                    return
            self._fill(*job, self.stagings[0])

    def acquire(self, thread: int, number: int) -> Memory:
        """The weights of a slice, in memory until ``release``.

        Args:
            thread: the compute thread's number, from 0.
            number: the slice.

        Raises:
            PackageError: they do not open, or the store was closed.
        """
        resident = self.pinned.get(number)
        if resident is not None:
            return resident
        with self._changed:
            self._at[thread] = number
            slot = self._where.get(number)
            if slot is not None and slot.ready:  # the usual case: the loader was here before
                slot.users += 1
                return slot.memory
        start = time.perf_counter()
        slot = self._claim_for(number)
        try:
            self._finish(slot, number, self.stagings[1 + thread])
        except PackageError:
            self.release(thread, number)
            raise
        finally:
            self.stall_s[thread] += time.perf_counter() - start
        return slot.memory

    def release(self, thread: int, number: int) -> None:
        """The thread is done with a slice; its next one follows in the cycle."""
        if number in self.pinned:
            return
        with self._changed:
            slot = self._where[number]
            slot.users -= 1
            self._at[thread] = (number + 1) % len(self.variant.slices)
            if slot.error is not None and not slot.users and not slot.missing:
                self._empty(slot)  # who needed it has been told; the next one may try again
            if self._loader_waits or len(self._at) > 1:  # else nobody waits for a slot
                self._changed.notify_all()

    def idle(self, thread: int) -> None:
        """The thread has no request: what it needs next is the first slice."""
        with self._changed:
            self._at.pop(thread, None)

    def close(self) -> None:
        """Stop the loader and wake whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _claim_for(self, number: int) -> _Slot:
        """A slot that holds or will hold the slice, with this thread among its users."""
        with self._changed:
            while True:
                slot = self._where.get(number) or self._claim(number, urgent=True)
                if slot is not None:
                    slot.users += 1
                    return slot
                if self._closed:
                    raise PackageError("the enclave is stopping")
                self._changed.wait()

    def _finish(self, slot: _Slot, number: int, staging: Memory) -> None:
        """Decrypt what is left of a slice, then wait for the chunks that others have taken."""
        while True:
            with self._changed:
                while slot.missing and not self._left(slot):
                    if self._closed:
                        raise PackageError("the enclave is stopping")
                    self._changed.wait()
                if slot.error is not None:
                    raise slot.error.again()
                if not slot.missing:
                    return
                chunk = self._take_chunk(slot)
            self._fill(slot, number, chunk, staging)

    def _next_job(self) -> tuple[_Slot, int, int] | None:
        """What the loader should decrypt now, or nothing. Called with the lock held."""
        while self._filling:
            slot = min(self._filling, key=lambda s: self._distance(s.holds))
            if self._left(slot):
                return slot, slot.holds, self._take_chunk(slot)
            self._filling.remove(slot)
        nearest = self._nearest_absent()
        claimed = None if nearest is None else self._claim(nearest, urgent=False)
        if nearest is None or claimed is None:
            return None
        return claimed, nearest, self._take_chunk(claimed)

    def _nearest_absent(self) -> int | None:
        """The absent slice that any thread needs next; a few steps, as few slots hold slices."""
        count = len(self._streamed)
        found = []
        for at in self._at.values() or (0,):
            first = self._first_streamed[at]
            for step in range(min(count, len(self._slots) + 1)):
                number = self._streamed[(first + step) % count]
                if number not in self._where:
                    found.append(number)
                    break
        return min(found, key=self._distance, default=None)

    def _claim(self, number: int, *, urgent: bool) -> _Slot | None:
        """The slot for an absent slice, or nothing while that is needed otherwise.

        Streamed slices get the slots in turn, each always the same one, which it shares with those
        that come a ring later: at the same address every time, its graph is bound to it once. Only
        who needs the slice now, and finds the slot in use by another thread, takes any that is not.
        """
        own = self._slots[self._first_streamed[number] % len(self._slots)]
        for slot in (own, *self._slots) if urgent else (own,):
            if slot.users or slot.missing:
                continue
            if slot.holds >= 0:
                if not urgent and self._distance(slot.holds) <= self._distance(number):
                    return None
                self._empty(slot)
            break
        else:
            return None
        slot.holds = number
        slot.next_chunk = 0
        slot.missing = len(self._chunks[number])
        self._where[number] = slot
        self._filling.append(slot)
        return slot

    def _empty(self, slot: _Slot) -> None:
        del self._where[slot.holds]
        if slot in self._filling:
            self._filling.remove(slot)
        slot.holds, slot.error, slot.missing, slot.next_chunk = -1, None, 0, 0

    def _distance(self, number: int) -> int:
        """Slices until this one is needed by any thread."""
        count = len(self.variant.slices)
        return min(((number - at) % count for at in self._at.values()), default=number)

    def _left(self, slot: _Slot) -> bool:
        return slot.next_chunk < len(self._chunks[slot.holds])

    def _take_chunk(self, slot: _Slot) -> int:
        slot.next_chunk += 1
        return slot.next_chunk - 1

    def _fill(self, slot: _Slot, number: int, chunk: int, staging: Memory) -> None:
        """Decrypt one chunk of a slice into its slot, and note how that went."""
        start = time.perf_counter()
        error: PackageError | None = None
        try:
            self._decrypt(number, chunk, slot.memory, staging)
        except PackageError as found:
            error = found
        with self._changed:
            self.counters.load_s += time.perf_counter() - start
            slot.missing -= 1
            if error is not None:
                slot.error = error
                chunks = len(self._chunks[number])
                slot.missing -= chunks - slot.next_chunk  # nobody needs to try the rest
                slot.next_chunk = chunks
            if slot.missing == 0:
                if slot.error is None:
                    self._count(number)
                self._changed.notify_all()

    def _decrypt(self, number: int, chunk: int, memory: Memory, staging: Memory) -> None:
        section, index, begin, end = self._chunks[number][chunk]
        self.package.decrypt_chunk(section, index, staging, memory[begin:end].data)

    def _count(self, number: int) -> None:
        self.counters.loads += 1
        self.counters.loaded_bytes += self.variant.slices[number].weight_bytes
