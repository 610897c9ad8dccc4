"""The queue's choices: examples first, then what must hold after any sequence of events."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lasagna.errors import InvalidInputError, OverloadedError
from lasagna.server.fcfs import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    Batch,
    Fcfs,
    Places,
    backoff_s,
    may_wait,
)


def queue(rows: int = 4, batches: int = 2, limit: int = 8) -> Fcfs:
    return Fcfs(Places(rows=rows, batches=batches), limit)


def arrive(fcfs: Fcfs, *ids: int, rows: int = 1) -> None:
    for one in ids:
        fcfs.arrived(one, rows)


def ids_of(batch: Batch | None) -> tuple[int, ...]:
    return batch.ids if batch else ()


def test_a_request_runs_at_once_when_there_is_a_place() -> None:
    fcfs = queue()
    arrive(fcfs, 1)
    assert ids_of(fcfs.next_batch(0.0)) == (1,)
    arrive(fcfs, 2)
    assert ids_of(fcfs.next_batch(0.0)) == (2,)


def test_what_waited_runs_as_one_batch_up_to_the_limit_of_rows() -> None:
    fcfs = queue(rows=4, batches=1)
    arrive(fcfs, 1)
    first = fcfs.next_batch(0.0)
    assert first
    arrive(fcfs, 2, 3, 4, 5, 6)
    assert fcfs.next_batch(0.0) is None
    fcfs.finished(first.number, 1.0)
    assert ids_of(fcfs.next_batch(1.0)) == (2, 3, 4, 5)
    assert fcfs.waiting == 1


def test_nobody_is_overtaken_to_fill_a_batch() -> None:
    fcfs = queue(rows=4, batches=1)
    arrive(fcfs, 1, rows=3)
    arrive(fcfs, 2, rows=2)
    arrive(fcfs, 3, rows=1)  # would fit beside the first
    assert ids_of(fcfs.next_batch(0.0)) == (1,)


def test_more_rows_than_a_batch_are_refused_with_the_limit() -> None:
    with pytest.raises(InvalidInputError, match="5 rows in one request; this server runs up to 4"):
        queue(rows=4).arrived(1, 5)


def test_a_full_queue_refuses_and_tells_when_to_come_back() -> None:
    fcfs = queue(batches=1, limit=2)
    arrive(fcfs, 1)
    first = fcfs.next_batch(0.0)
    assert first
    fcfs.finished(first.number, 0.5)
    arrive(fcfs, 2)
    fcfs.next_batch(0.5)
    arrive(fcfs, 3, 4)
    with pytest.raises(OverloadedError, match="2 requests are waiting") as caught:
        fcfs.arrived(5, 1)
    assert caught.value.retry_after_s == pytest.approx(1.5)  # three requests at 0.5 s each
    assert fcfs.waiting == 2


def test_a_batch_behind_another_counts_from_when_that_one_ended() -> None:
    fcfs = queue(batches=2)
    arrive(fcfs, 1)
    first = fcfs.next_batch(0.0)
    arrive(fcfs, 2)
    second = fcfs.next_batch(0.0)
    assert first
    assert second
    fcfs.finished(first.number, 1.0)
    fcfs.finished(second.number, 2.0)
    assert fcfs.retry_after_s() == pytest.approx(1.0)


def test_a_withdrawn_request_leaves_the_queue() -> None:
    fcfs = queue(batches=1)
    arrive(fcfs, 1)
    fcfs.next_batch(0.0)
    arrive(fcfs, 2, 3)
    fcfs.withdrawn(2)
    fcfs.enclave_died()
    assert ids_of(fcfs.next_batch(0.0)) == (1,)
    assert fcfs.waiting == 1


def test_after_a_death_requests_run_again_alone_in_order() -> None:
    fcfs = queue(rows=4, batches=2)
    arrive(fcfs, 1, 2)
    assert ids_of(fcfs.next_batch(0.0)) == (1, 2)
    arrive(fcfs, 3)
    assert ids_of(fcfs.next_batch(0.0)) == (3,)
    arrive(fcfs, 4)
    assert fcfs.enclave_died() == ()

    served = []
    for _ in range(4):
        batch = fcfs.next_batch(0.0)
        assert batch
        assert fcfs.next_batch(0.0) is None or batch.ids == (4,)
        served.append(batch.ids)
        fcfs.finished(batch.number, 0.0)
    assert served == [(1,), (2,), (3,), (4,)]


def test_nothing_joins_a_request_that_runs_a_second_time() -> None:
    fcfs = queue(batches=2)
    arrive(fcfs, 1)
    fcfs.next_batch(0.0)
    fcfs.enclave_died()
    fcfs.next_batch(0.0)
    arrive(fcfs, 2)
    assert fcfs.next_batch(0.0) is None


def test_a_request_whose_enclave_dies_twice_is_given_up_and_takes_nobody_along() -> None:
    fcfs = queue(batches=2)
    arrive(fcfs, 1, 2)
    fcfs.next_batch(0.0)
    assert fcfs.enclave_died() == ()
    assert ids_of(fcfs.next_batch(0.0)) == (1,)
    assert fcfs.enclave_died() == (1,)
    assert ids_of(fcfs.next_batch(0.0)) == (2,)


def test_a_batch_that_fails_is_taken_apart_and_one_that_fails_alone_is_given_up() -> None:
    fcfs = queue(rows=4, batches=2)
    arrive(fcfs, 1, 2, 3)
    first = fcfs.next_batch(0.0)
    assert first
    arrive(fcfs, 4, 5)
    second = fcfs.next_batch(0.0)
    assert ids_of(second) == (4, 5)
    assert fcfs.failed(first.number, 1.0) == ()
    alone = fcfs.next_batch(1.0)
    assert ids_of(alone) == (1,)  # beside the other batch: the enclave lives
    assert alone
    assert fcfs.failed(alone.number, 2.0) == (1,)
    assert ids_of(fcfs.next_batch(2.0)) == (2,)


def test_nothing_joins_the_batch_of_one_that_runs_alone() -> None:
    fcfs = queue(rows=4, batches=1)
    arrive(fcfs, 1, 2)
    both = fcfs.next_batch(0.0)
    assert both
    arrive(fcfs, 3, 4)
    assert fcfs.failed(both.number, 1.0) == ()
    served = []
    while batch := fcfs.next_batch(1.0):
        served.append(batch.ids)
        fcfs.finished(batch.number, 1.0)
    assert served == [(1,), (2,), (3, 4)]


def test_who_is_left_of_a_batch_that_fails_is_not_blamed_for_it() -> None:
    fcfs = queue(rows=4, batches=1)
    arrive(fcfs, 1, 2)
    both = fcfs.next_batch(0.0)
    assert both
    fcfs.withdrawn(1)
    assert fcfs.failed(both.number, 1.0) == ()
    assert ids_of(fcfs.next_batch(1.0)) == (2,)


def test_a_failed_batch_counts_as_no_death() -> None:
    fcfs = queue(batches=1)
    arrive(fcfs, 1, 2)
    both = fcfs.next_batch(0.0)
    assert both
    fcfs.failed(both.number, 1.0)
    assert ids_of(fcfs.next_batch(1.0)) == (1,)
    assert fcfs.enclave_died() == ()
    assert ids_of(fcfs.next_batch(1.0)) == (1,)
    assert fcfs.enclave_died() == (1,)


def test_who_stopped_waiting_is_not_run_again() -> None:
    fcfs = queue()
    arrive(fcfs, 1)
    fcfs.next_batch(0.0)
    fcfs.withdrawn(1)
    assert fcfs.enclave_died() == ()
    assert fcfs.idle


def test_abandoned_requests_are_named() -> None:
    fcfs = queue(batches=1)
    arrive(fcfs, 1)
    fcfs.next_batch(0.0)
    arrive(fcfs, 2, 3)
    assert fcfs.abandon() == (2, 3)
    assert not fcfs.idle  # one runs


def test_backoff_doubles_up_to_its_limit() -> None:
    assert [backoff_s(n) for n in (1, 2, 3)] == [
        FIRST_BACKOFF_S,
        2 * FIRST_BACKOFF_S,
        4 * FIRST_BACKOFF_S,
    ]
    assert backoff_s(50) == backoff_s(10_000) == MAX_BACKOFF_S


def test_requests_wait_for_a_restart_but_not_for_ever() -> None:
    assert [may_wait(deaths) for deaths in range(5)] == [True, True, True, False, False]


class AnySequence(RuleBasedStateMachine):
    """Whatever happens: no request is lost or answered twice, order and limits hold."""

    @initialize(rows=st.integers(1, 5), batches=st.integers(1, 3), limit=st.integers(1, 6))
    def start(self, rows: int, batches: int, limit: int) -> None:
        self.fcfs = queue(rows, batches, limit)
        self.rows: dict[int, int] = {}
        self.waiting: list[int] = []
        self.running: dict[int, tuple[int, ...]] = {}
        self.sizes: dict[int, int] = {}
        self.died: set[int] = set()
        self.failed: set[int] = set()
        self.now = 0.0
        self.limit = limit

    @rule(rows=st.integers(1, 6))
    def arrives(self, rows: int) -> None:
        one = len(self.rows) + 1
        try:
            self.fcfs.arrived(one, rows)
        except InvalidInputError:
            assert rows > self.fcfs.places.rows
        except OverloadedError:
            assert len(self.waiting) >= self.limit
        else:
            self.rows[one] = rows
            self.waiting.append(one)

    @rule()
    def starts(self) -> None:
        batch = self.fcfs.next_batch(self.now)
        if batch is None:
            full = len(self.running) >= self.fcfs.places.batches
            retried = any(self.died.intersection(ids) for ids in self.running.values())
            head_waits = bool(self.waiting) and self.waiting[0] in self.died and self.running
            assert not self.waiting or full or retried or head_waits
            return
        assert list(batch.ids) == self.waiting[: len(batch.ids)]
        assert sum(self.rows[one] for one in batch.ids) <= self.fcfs.places.rows
        if self.died.intersection(batch.ids):
            assert len(batch.ids) == 1
            assert not self.running
        if self.failed.intersection(batch.ids):
            assert len(batch.ids) == 1
        del self.waiting[: len(batch.ids)]
        self.running[batch.number] = batch.ids
        self.sizes[batch.number] = len(batch.ids)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), elapsed=st.floats(0, 10))
    def finishes(self, data: st.DataObject, elapsed: float) -> None:
        number = data.draw(st.sampled_from(sorted(self.running)))
        self.now += elapsed
        self.fcfs.finished(number, self.now)
        del self.running[number]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.running)))
        ids = self.running.pop(number)
        given_up = self.fcfs.failed(number, self.now)
        if self.sizes[number] == 1:
            assert given_up == ids
            return
        assert given_up == ()
        self.failed |= set(ids)
        self.waiting = sorted([*self.waiting, *ids])

    @rule(data=st.data())
    def somebody_leaves(self, data: st.DataObject) -> None:
        one = data.draw(st.integers(1, len(self.rows) + 1))
        self.fcfs.withdrawn(one)
        self.waiting = [other for other in self.waiting if other != one]
        for number, ids in self.running.items():
            self.running[number] = tuple(other for other in ids if other != one)

    @rule()
    def dies(self) -> None:
        caught = {one for ids in self.running.values() for one in ids}
        given_up = set(self.fcfs.enclave_died())
        assert given_up == caught & self.died
        self.waiting = sorted([*self.waiting, *(caught - given_up)])
        self.died |= caught
        self.running.clear()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "fcfs"):
            assert self.fcfs.waiting == len(self.waiting)
            assert self.fcfs.idle == (not self.waiting and not self.running)
            assert self.fcfs.retry_after_s() > 0


TestAnySequence = AnySequence.TestCase
