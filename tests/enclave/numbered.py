"""Weights that tell whose they are: every byte of a piece is its number."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from lasagna.enclave.pieces import Piece, Slot
from lasagna.enclave.pool import Memory, Pool
from lasagna.enclave.spans import Recorder
from lasagna.enclave.weights import Weights
from lasagna.errors import PackageError
from lasagna.package.reader import OpenPackage

CHUNK = 10
DEADLINE_S = 30.0


@dataclass
class Numbered:
    """A package in memory. Section n holds piece n.

    Attributes:
        broken: how many times more each section does not open.
        opened: chunks that were asked for.
    """

    broken: Counter[int] = field(default_factory=Counter)
    opened: list[tuple[int, int]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def decrypt_chunk(self, section: int, chunk: int, staging: Memory, out: memoryview) -> None:
        staging[:CHUNK] = section  # a thread's own, or two would spoil each other's
        with self._lock:
            self.opened.append((section, chunk))
            if self.broken[section]:
                self.broken[section] -= 1
                raise PackageError(f"section {section} does not open")
        out[:] = bytes(staging[: len(out)])


def memory(size: int) -> Memory:
    return np.zeros(size, dtype=np.uint8)


def numbered_weights(
    package: Numbered, chunks: Sequence[int], slots: int, threads: int, room: int = 0
) -> Weights:
    """A store of pieces of so many chunks each, and a pool with room for so many pages."""
    pieces = [
        Piece(
            bytes(32),
            number,
            cast(OpenPackage, package),
            count * CHUNK,
            tuple((number, chunk, chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in range(count)),
        )
        for number, count in enumerate(chunks)
    ]
    return Weights(
        pieces,
        [memory(max(chunks) * CHUNK) for _ in range(slots)],
        [memory(CHUNK) for _ in range(threads + 1)],
        Pool(room * 4096),
        Recorder(),
    )


def is_own(slot: Slot, piece: Piece) -> bool:
    """Whether the slot holds exactly this piece's bytes."""
    return bool(np.all(slot.memory[: piece.size] == piece.slice))


@contextmanager
def loading(store: Weights, loader: bool = True) -> Iterator[None]:
    """With the loader thread, or without; it ends in time in any case."""
    thread = threading.Thread(target=store.load_ahead, daemon=True)
    if loader:
        thread.start()
    try:
        yield
    finally:
        store.close()
        if loader:
            thread.join(DEADLINE_S)
            assert not thread.is_alive(), "the loader does not end"


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive(), "a thread waits for ever"


def load_all(store: Weights) -> list[int]:
    """Do what the loader would do now, on this thread; the pieces it loaded, in order."""
    done: list[int] = []
    while True:
        with store._changed:
            job = store._next_job()
        if job is None:
            return list(dict.fromkeys(done))
        if isinstance(job, tuple):
            done.append(job[1])
            store._fill(*job, store.stagings[0], "loader")
        else:
            store._carry_out(job)


class Told:
    """The outcome of a Pin or Unpin, when it is told."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: Exception | None = None

    def __call__(self, error: Exception | None) -> None:
        self._error = error
        self._event.set()

    @property
    def yet(self) -> bool:
        return self._event.is_set()

    def outcome(self) -> Exception | None:
        assert self._event.wait(DEADLINE_S), "nobody says what became of the move"
        return self._error


def waits(monkeypatch: Any) -> threading.Semaphore:
    """Counts the threads that begin to wait in a store."""
    begun = threading.Semaphore(0)
    wait = Weights._wait

    def noted(self: Weights) -> None:
        begun.release()
        wait(self)

    monkeypatch.setattr(Weights, "_wait", noted)
    return begun
