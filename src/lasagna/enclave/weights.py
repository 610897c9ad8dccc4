"""Weights in enclave memory: pinned slices stay, the others pass through a ring of slots.

Slices of all models are numbered through: a *piece* is one of them. The host announces its runs
before they begin, and each needs its pieces in order, so the next uses are known. A loader thread
decrypts ahead, always the absent piece that is needed next, and overwrites only what is needed
later than that (Belady, IBM Systems Journal 5(2), 1966). A compute thread that finds its piece not
ready helps: it takes chunks of it beside the loader until none is left, rather than wait.

Where every core computes, a loader beside them would take one away in the middle of a layer, and
the threads that share that layer would wait. So it works only while one of them pauses for weights;
and who pauses fills the ring before it goes on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lasagna.enclave.messages import Span
from lasagna.enclave.pieces import Course, LoadCounters, Move, Piece, Slot
from lasagna.enclave.pool import Memory, Pool
from lasagna.enclave.ring import Ring
from lasagna.enclave.spans import Recorder
from lasagna.errors import EnclaveError, InvalidInputError, LasagnaError, PackageError


@dataclass(slots=True)
class Weights:
    """Plaintext weights of all models of an arrangement, for any number of compute threads.

    Attributes:
        pieces: of all models, numbered through.
        ring: memory of the slots, each large enough for every piece that is not pinned.
        stagings: ciphertext memory, one piece for the loader and one for every compute thread.
        pool: where memory for pinned slices comes from.
        recorder: of spans.
        width: threads that compute one run.
        cores: processors for all threads.
        counters: for statistics.
        stall_s: seconds that each compute thread has spent in ``acquire`` over pieces that were
            not there, decrypting with the loader or waiting for it.
    """

    pieces: Sequence[Piece]
    ring: Sequence[Memory]
    stagings: Sequence[Memory]
    pool: Pool
    recorder: Recorder
    width: int = 1
    cores: int = 2
    counters: LoadCounters = field(default_factory=LoadCounters)
    stall_s: list[float] = field(init=False)
    _ring: Ring = field(init=False)
    _pinned: dict[int, Slot] = field(default_factory=dict)
    _moves: deque[Move] = field(default_factory=deque)
    _waiters: int = 0
    _paused: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _closed: bool = False

    def __post_init__(self) -> None:
        """Everything is absent."""
        self.stall_s = [0.0] * (len(self.stagings) - 1)
        self._ring = Ring(self.pieces, [Slot(memory) for memory in self.ring])

    # What runs and moves.

    def announce(self, first: int, last: int) -> Course:
        """A run will need these pieces, ``last`` exclusive, after those announced before."""
        course = Course(first, last)
        with self._changed:
            self._ring.courses.announced.append(course)
            self._wake()
        return course

    def finish(self, course: Course) -> None:
        """The run is over."""
        with self._changed:
            self._ring.courses.announced.remove(course)
            self._wake()

    def move(self, piece: int, *, pin: bool, done: Callable[[LasagnaError | None], None]) -> None:
        """Have the loader pin a piece, or unpin it as soon as nobody uses it.

        Args:
            piece: which.
            pin: or unpin.
            done: called on the loader's thread, with the reason if it could not be.
        """
        with self._changed:
            self._moves.append(Move(piece, pin, done))
            self._wake()

    def pin_now(self, piece: int) -> Memory:
        """Decrypt a piece into memory of its own, on the calling thread.

        Raises:
            BudgetError: there is no memory for it.
            PackageError: a chunk does not open.
        """
        start, cpu = time.perf_counter(), time.thread_time()
        facts = self.pieces[piece]
        memory = self.pool.take(facts.size)
        try:
            for chunk in range(len(facts.chunks)):
                self._decrypt(piece, chunk, memory, self.stagings[0])
        except PackageError:
            self.pool.give_back(facts.size)
            raise
        slot = Slot(memory, holds=piece, next_chunk=len(facts.chunks))
        with self._changed:
            self._pinned[piece] = slot
            self._ring.stay(piece, slot)
            self._wake()
            self.counters.load_s += time.thread_time() - cpu
            self.counters.loaded_bytes += facts.size
            self.counters.loads += 1
        self._span("loader", "pin", start, piece)
        return memory

    def is_pinned(self, piece: int) -> bool:
        """Whether it stays."""
        return piece in self._pinned

    def memory_of(self, piece: int) -> Memory:
        """A pinned piece's memory."""
        return self._pinned[piece].memory

    def load_ahead(self) -> None:
        """Keep the ring filled with what is needed next, until ``close``: the loader thread."""
        while (job := self._await_job()) is not None:
            if isinstance(job, Move):
                self._carry_out(job)
            else:
                self._fill(*job, self.stagings[0], "loader")
        while self._moves:
            self._moves.popleft().done(EnclaveError("the memory is divided anew"))

    def acquire(self, thread: int, course: Course, piece: int) -> Slot:
        """The weights of a piece, in memory until ``release``.

        Args:
            thread: the compute thread's number, from 0.
            course: of its run.
            piece: that it is at.

        Raises:
            PackageError: they do not open, or the store was closed.
        """
        with self._changed:
            course.at, course.running = piece, True
            slot = self._ring.where.get(piece)
            if slot is not None and slot.ready:  # the usual case: the loader was here before
                slot.users += 1
                return slot
            self._paused += 1
            self._wake()
        start = time.perf_counter()
        staging, who = self.stagings[1 + thread], f"compute {thread}"
        slot = self._claim_for(piece, staging, who)
        try:
            self._finish(slot, piece, staging, who)
            self._stock_up(staging, who)
        except PackageError:
            self.release(course, slot)
            raise
        finally:
            with self._changed:
                self._paused -= 1
            self.stall_s[thread] += time.perf_counter() - start
            self._span(f"compute {thread}", "stall", start, piece)
        return slot

    def release(self, course: Course, slot: Slot) -> None:
        """The run is done with a piece; its next one follows."""
        with self._changed:
            slot.users -= 1
            course.at += 1
            if slot.error is not None and not slot.users and not slot.missing:
                self._ring.empty(slot)  # who needed it has been told; the next one may try again
            self._wake()

    def close(self) -> None:
        """Stop the loader and wake whoever waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # Moves.

    def _carry_out(self, move: Move) -> None:
        try:
            if not move.pin:
                with self._changed:
                    if self._in_use(move):  # a run was faster
                        self._moves.appendleft(move)
                        return
                    self._unpin(move.piece)
            elif self.is_pinned(move.piece):
                raise InvalidInputError("the slice is pinned already")
            else:
                self.pin_now(move.piece)
        except LasagnaError as error:
            move.done(error)
        else:
            move.done(None)

    def _unpin(self, piece: int) -> None:
        """Give up a pinned piece's memory. Called with the lock held; nobody uses it.

        Raises:
            InvalidInputError: it is not pinned, or can't pass through the ring.
        """
        if not self.is_pinned(piece):
            raise InvalidInputError("the slice is not pinned")
        size = self.pieces[piece].size
        if not self.ring or size > len(self.ring[0]):
            raise InvalidInputError(f"a slice of {size} bytes can't pass through the ring")
        slot = self._pinned.pop(piece)
        self._ring.pass_through(piece, slot)
        self.pool.give_back(size)

    def _in_use(self, move: Move) -> bool:
        slot = self._pinned.get(move.piece)
        return not move.pin and slot is not None and slot.users > 0

    def _possible_move(self) -> Move | None:
        if not self._moves or self._in_use(self._moves[0]):
            return None
        return self._moves.popleft()

    # The ring.

    def _claim_for(self, piece: int, staging: Memory, who: str) -> Slot:
        """A slot that holds or will hold the piece, with this thread among its users.

        One that is half filled is free for nobody, and its filler may have stopped in favour of
        computing: who needs it finishes it.
        """
        while True:
            with self._changed:
                slot = self._ring.where.get(piece) or self._ring.claim(piece, urgent=True)
                if slot is not None:
                    slot.users += 1
                    return slot
                if self._closed:
                    raise PackageError("the enclave is stopping")
                job = self._ring.started()
                if job is None:
                    self._wait()
            if job is not None:
                self._fill(*job, staging, who)

    def _finish(self, slot: Slot, piece: int, staging: Memory, who: str) -> None:
        """Decrypt what is left of a piece, then wait for the chunks that others have taken."""
        while True:
            with self._changed:
                while slot.missing and not self._ring.left(slot):
                    if self._closed:
                        raise PackageError("the enclave is stopping")
                    self._wait()
                if slot.error is not None:
                    raise slot.error.again()
                if not slot.missing:
                    return
                chunk = self._ring.take_chunk(slot)
            self._fill(slot, piece, chunk, staging, who)

    def _stock_up(self, staging: Memory, who: str) -> None:
        """Fill the ring, unless the loader can do that while the runs compute."""
        while True:
            with self._changed:
                resumed = self._paused - 1
                if self._closed or self._core_left(resumed):
                    return
                job = self._ring.next_chunk()
            if job is None:
                return
            self._fill(*job, staging, who)

    def _core_left(self, paused: int) -> bool:
        """Whether the loader takes no core from computing while so many threads pause."""
        running = sum(course.running for course in self._ring.courses.announced)
        return (running - paused) * self.width + paused + 1 <= self.cores

    def _await_job(self) -> tuple[Slot, int, int] | Move | None:
        """The loader's next job; nothing when the store is closed."""
        with self._changed:
            while not self._closed:
                job = self._next_job()
                if job is not None:
                    return job
                self._wait()
        return None

    def _next_job(self) -> tuple[Slot, int, int] | Move | None:
        """What the loader should do now, or nothing. Called with the lock held."""
        move = self._possible_move()
        if move is not None:
            return move
        return self._ring.next_chunk() if self._core_left(self._paused) else None

    def _fill(self, slot: Slot, piece: int, chunk: int, staging: Memory, who: str) -> None:
        """Decrypt one chunk of a piece into its slot, and note how that went."""
        start, cpu = time.perf_counter(), time.thread_time()
        error: PackageError | None = None
        size = 0
        try:
            size = self._decrypt(piece, chunk, slot.memory, staging)
        except PackageError as found:
            error = found.again()  # its traceback would keep the memory of this arrangement
        with self._changed:
            self.counters.load_s += time.thread_time() - cpu
            self.counters.loaded_bytes += size
            slot.missing -= 1
            if error is not None:
                slot.error = error
                chunks = len(self.pieces[piece].chunks)
                slot.missing -= chunks - slot.next_chunk  # nobody needs to try the rest
                slot.next_chunk = chunks
            if slot.missing == 0:
                if slot.error is None:
                    self.counters.loads += 1
                self._changed.notify_all()
        self._span(who, "load", start, piece)

    def _decrypt(self, piece: int, chunk: int, memory: Memory, staging: Memory) -> int:
        """Bytes that were decrypted."""
        facts = self.pieces[piece]
        section, index, begin, end = facts.chunks[chunk]
        facts.package.decrypt_chunk(section, index, staging, memory[begin:end].data)
        return end - begin

    def _wait(self) -> None:
        """Until something changes. Called with the lock held."""
        self._waiters += 1
        self._changed.wait()
        self._waiters -= 1

    def _wake(self) -> None:
        if self._waiters:
            self._changed.notify_all()

    def _span(self, thread: str, kind: str, start: float, piece: int) -> None:
        if self.recorder.on:
            facts = self.pieces[piece]
            end = time.perf_counter()
            self.recorder.add(Span(thread, kind, start, end, facts.model, facts.slice, 0, 0))
