"""Rows that wait in enclave memory at a cut between two stages, until a run takes them on."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from lasagna.enclave.pool import Memory
from lasagna.errors import InvalidInputError


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """Whose a row is: one request, by identity.

    The number is the host's, which may give it to another request while a run of this one is still
    under way. That one must not find these rows.
    """

    number: int


Row = tuple[Owner, int]
"""A request, and the row in it."""


@dataclass(slots=True)
class Cut:
    """Room for so many rows of the tensors that cross one cut. Thread-safe.

    The host says which rows go where, and may say it of one row in two runs at once. It can lose
    rows and room that way; but a row comes out as it was put in, and for its owner only: copying
    and handing out places exclude each other.

    Attributes:
        sizes: bytes of a row of each tensor, in the order of ``package.forms.boundary``.
        memory: of all rows, each tensor's one behind the other.
        capacity: in rows.
    """

    sizes: Sequence[int]
    memory: Sequence[Memory]
    capacity: int
    _at: dict[Row, int] = field(default_factory=dict)
    _free: list[int] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        """Nothing waits."""
        self._free = list(range(self.capacity))

    def put(self, row: Row, places: Sequence[Memory], number: int) -> None:
        """Keep a row of a batch.

        Args:
            row: whose it is.
            places: memory of each tensor for the batch.
            number: of the row in the batch.

        Raises:
            InvalidInputError: there is no room, or the row is here already; the host miscounts.
        """
        with self._lock:
            if row in self._at:
                raise InvalidInputError(f"{_called(row)} is at this cut already")
            if not self._free:
                raise InvalidInputError(
                    f"{self.capacity} rows are at this cut, which is its capacity"
                )
            at = self._at[row] = self._free.pop()
            for size, kept, place in zip(self.sizes, self.memory, places, strict=True):
                kept[at * size : (at + 1) * size] = place[number * size : (number + 1) * size]

    def copy_out(self, row: Row, places: Sequence[Memory], number: int) -> None:
        """Copy a row into a batch. It stays here until it is dropped, so the batch may fail.

        Raises:
            InvalidInputError: it is not here; the host miscounts.
        """
        with self._lock:
            at = self._at.get(row)
            if at is None:
                raise InvalidInputError(f"{_called(row)} is not at this cut")
            for size, kept, place in zip(self.sizes, self.memory, places, strict=True):
                place[number * size : (number + 1) * size] = kept[at * size : (at + 1) * size]

    def drop(self, row: Row) -> None:
        """Free a row's memory, if it is here."""
        with self._lock:
            at = self._at.pop(row, None)
            if at is not None:
                self._free.append(at)

    def forget(self, owner: Owner) -> None:
        """Free all rows of a request."""
        with self._lock:
            for row in [row for row in self._at if row[0] is owner]:
                self._free.append(self._at.pop(row))


def _called(row: Row) -> str:
    return f"row {row[1]} of request {row[0].number}"
