"""What runs next when requests are served first come, first served. Pure: events in, choices out.

* A request runs at once when the enclave has a place; places are its compute threads and one more,
  so that the next inputs are opened while the last ones compute.
* While all places are taken, requests wait. A place that becomes free takes as many from the head
  of the queue as fit one batch: nobody waits for a batch to fill, and nobody is overtaken.
* When the enclave dies, what was in it goes back to the head of the queue, in order, and runs a
  second time: each request alone, with nothing else in the enclave. So if one of them is the cause,
  it takes no other with it. Who was in it twice is given up.
* When the enclave fails a batch, and lives, the cause may be the values of one row: its requests go
  back in the same way and run again in a batch each. Who fails alone is given up.

Ids grow with arrival. Every request is at any time in exactly one place: waiting, in one batch, or
gone. What dies twice, fails alone or is withdrawn never comes back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from lasagna.errors import InvalidInputError, OverloadedError

FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 30.0
PATIENCE: Final = 3
"""So many deaths without an answer between them, and requests no longer wait for a restart."""
_SMOOTHING: Final = 0.2
"""Weight of the newest service time in the moving average."""
_MIN_RETRY_S: Final = 0.05
_MAX_RETRY_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Places:
    """What the enclave can take.

    Attributes:
        rows: of one batch at most.
        batches: in the enclave at once.
    """

    rows: int
    batches: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests to run together.

    Attributes:
        number: of the batch.
        ids: of its requests, in order of arrival.
    """

    number: int
    ids: tuple[int, ...]


@dataclass(slots=True)
class _Request:
    """A request and what it has been through.

    Attributes:
        id: its number.
        rows: how many.
        alone: it runs in a batch of its own, since one that it was in came to nothing.
        died: its enclave has died once; then nothing else may be in the enclave either.
    """

    id: int
    rows: int
    alone: bool = False
    died: bool = False


@dataclass(slots=True)
class _Running:
    """A batch in the enclave.

    Attributes:
        requests: those that somebody still waits for.
        since_s: when it was sent.
        size: how many requests it began with.
        exclusive: nothing may join it in the enclave.
    """

    requests: list[_Request]
    since_s: float
    size: int
    exclusive: bool


class Fcfs:
    """The queue of one model. Times are seconds of any steady clock."""

    def __init__(self, places: Places, queue_limit: int) -> None:
        """Hold at most ``queue_limit`` waiting requests."""
        self.places = places
        self._queue_limit = queue_limit
        self._waiting: OrderedDict[int, _Request] = OrderedDict()
        self._running: OrderedDict[int, _Running] = OrderedDict()
        self._last_id = 0
        self._batches = 0
        self._service_s = 0.0
        self._finished_s = 0.0

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self._waiting and not self._running

    def retry_after_s(self) -> float:
        """When the queue as it stands will probably have been served."""
        expected = self._service_s * (len(self._waiting) + 1)
        return min(_MAX_RETRY_S, max(_MIN_RETRY_S, expected))

    def arrived(self, request: int, rows: int) -> None:
        """A request came in.

        Args:
            request: its id, larger than all before.
            rows: at least 1.

        Raises:
            InvalidInputError: it has more rows than one batch may have.
            OverloadedError: the queue is full.
        """
        assert request > self._last_id
        assert rows >= 1
        if rows > self.places.rows:
            raise InvalidInputError(
                f"{rows} rows in one request; this server runs up to {self.places.rows} at once: "
                "split the request"
            )
        if len(self._waiting) >= self._queue_limit:
            raise OverloadedError(
                f"{len(self._waiting)} requests are waiting, which is the limit",
                self.retry_after_s(),
            )
        self._last_id = request
        self._waiting[request] = _Request(request, rows)

    def withdrawn(self, request: int) -> None:
        """Nobody waits for this request any more. What runs already runs on, unheard."""
        self._waiting.pop(request, None)
        for running in self._running.values():
            running.requests = [one for one in running.requests if one.id != request]

    def next_batch(self, now_s: float) -> Batch | None:
        """Requests to start now, or None. To be asked until it says None."""
        if not self._waiting or len(self._running) >= self.places.batches:
            return None
        head = next(iter(self._waiting.values()))
        exclusive = any(running.exclusive for running in self._running.values())
        if exclusive or (head.died and self._running):
            return None
        chosen: list[_Request] = []
        rows = 0
        for request in self._waiting.values():
            rows += request.rows
            if chosen and (rows > self.places.rows or request.alone or head.alone):
                break
            chosen.append(request)
        for request in chosen:
            del self._waiting[request.id]
        self._batches += 1
        self._running[self._batches] = _Running(chosen, now_s, len(chosen), head.died)
        return Batch(self._batches, tuple(request.id for request in chosen))

    def finished(self, batch: int, now_s: float) -> None:
        """The enclave answered a batch, with results or with an error for all."""
        self._end(batch, now_s)

    def failed(self, batch: int, now_s: float) -> tuple[int, ...]:
        """The enclave could not run a batch, and one request of it may be the cause.

        Returns:
            The requests that are given up; the others wait again.
        """
        running = self._end(batch, now_s)
        if running.size == 1:
            return tuple(one.id for one in running.requests)
        self._wait_again(_Request(one.id, one.rows, alone=True) for one in running.requests)
        return ()

    def _end(self, batch: int, now_s: float) -> _Running:
        running = self._running.pop(batch)
        # A batch behind another one began, as far as the enclave is concerned, when that one ended.
        taken = now_s - max(running.since_s, self._finished_s)
        self._finished_s = now_s
        each = taken / max(1, len(running.requests))
        weight = _SMOOTHING if self._service_s else 1.0
        self._service_s += weight * (each - self._service_s)
        return running

    def _wait_again(self, requests: Iterable[_Request]) -> None:
        """Back into the queue, in order of arrival; its limit is for those that arrive."""
        waiting = sorted([*requests, *self._waiting.values()], key=lambda one: one.id)
        self._waiting = OrderedDict((one.id, one) for one in waiting)

    def enclave_died(self) -> tuple[int, ...]:
        """Everything that was in the enclave is lost.

        Returns:
            The requests that are given up; the others wait again.
        """
        caught = [one for running in self._running.values() for one in running.requests]
        self._running.clear()
        self._wait_again(
            _Request(one.id, one.rows, alone=True, died=True) for one in caught if not one.died
        )
        return tuple(one.id for one in caught if one.died)

    def abandon(self) -> Sequence[int]:
        """Give up everything that waits.

        Returns:
            The ids.
        """
        ids = tuple(self._waiting)
        self._waiting.clear()
        return ids


def backoff_s(deaths: int) -> float:
    """How long to wait before the enclave is started again: doubling, up to a limit.

    Args:
        deaths: in a row, without an answer to a request between them; at least 1.
    """
    assert deaths >= 1
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(deaths - 1, 30))


def may_wait(deaths: int) -> bool:
    """Whether requests may wait for an enclave that died so many times in a row."""
    return deaths < PATIENCE
