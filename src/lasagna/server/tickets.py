"""Requests that somebody waits for, and their parts on the way to the enclave and back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from lasagna.enclave.messages import Part, PartResult, SealedRows
from lasagna.errors import LasagnaError, ProtocolError
from lasagna.policy.events import Rows

Records = tuple[tuple[bytes, ...], ...]
"""By output and row."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A request, its answer as far as it is there, and who waits for it.

    Attributes:
        number: the host's.
        model: that it is for.
        request: as the client sealed it.
        answer: set once.
        error: what the last run that came to nothing said.
    """

    number: int
    model: str
    request: SealedRows
    answer: asyncio.Future[Records]
    error: LasagnaError | None = None
    _rows: dict[int, tuple[bytes, ...]] = field(default_factory=dict)

    def part(self, rows: Rows, *, sealed: bool) -> Part:
        """Some rows as a run takes them: sealed, when they come from outside the enclave."""
        if not sealed:
            return Part(rows.request, rows.first, rows.count)
        whole = self.request
        records = tuple(tensor[rows.first : rows.first + rows.count] for tensor in whole.records)
        return Part(
            rows.request,
            rows.first,
            rows.count,
            SealedRows(whole.request_id, whole.capsule, whole.rows, records),
        )

    def collect(self, rows: Rows, result: PartResult) -> None:
        """Rows have reached the model's end.

        Raises:
            ProtocolError: the enclave sent another number of them.
        """
        if any(len(tensor) != rows.count for tensor in result.records):
            raise ProtocolError(f"the enclave did not send {rows.count} rows of each output")
        for index in range(rows.count):
            self._rows[rows.first + index] = tuple(tensor[index] for tensor in result.records)

    def finish(self) -> None:
        """All rows are here.

        Raises:
            ProtocolError: they are not.
        """
        count = self.request.rows
        if sorted(self._rows) != list(range(count)):
            raise ProtocolError(f"{len(self._rows)} of {count} rows of a request came back")
        if not self.answer.done():
            self.answer.set_result(tuple(zip(*(self._rows[n] for n in range(count)), strict=True)))

    def refuse(self, error: LasagnaError) -> None:
        """It won't be answered."""
        if not self.answer.done():
            self.answer.set_exception(error.again())


def parts_of(tickets: Sequence[Ticket], batch: Sequence[Rows], *, sealed: bool) -> tuple[Part, ...]:
    """A run's batch as the enclave takes it."""
    return tuple(
        ticket.part(rows, sealed=sealed) for ticket, rows in zip(tickets, batch, strict=True)
    )
