"""Promise: threads that meet at the same rows or requests keep requests apart, the fate of one is
not another's, and each second is charged once."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from lasagna.enclave import executor
from lasagna.enclave import messages as m
from lasagna.enclave.cuts import Cut, Row
from lasagna.enclave.executor import Job, open_requests
from lasagna.enclave.model import Lane
from lasagna.enclave.pool import Memory
from lasagna.errors import EnclaveError, InvalidInputError

from .asking import (
    InThread,
    assert_answer,
    client,
    give,
    in_stages,
    in_thread,
    kept,
    part,
    results,
    run,
    slices,
)
from .conftest import Sealed

CUT = 3
WAIT_S = 30


class Gate:
    """Stops whoever comes to it, until it is opened."""

    def __init__(self) -> None:
        self._reached, self._open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self._reached.set()
        assert self._open.wait(WAIT_S), "the test has forgotten its gate"

    def await_somebody(self) -> None:
        assert self._reached.wait(WAIT_S), "nobody comes"

    def open(self) -> None:
        self._open.set()


def forget(enclave: InThread, number: int) -> None:
    enclave.call(m.Forget(enclave.next_id(), number), m.Done)


def test_a_forgotten_requests_rows_never_leave_under_the_next_one_of_its_number(
    squeezenet: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host forgets a request while a run puts its row to a cut, gives its number to a client of
    its own, and asks for the row before that run has noticed."""
    before, after = Gate(), Gate()
    put, first = Cut.put, threading.Event()

    def stopped(self: Cut, row: Row, places: Sequence[Memory], number: int) -> None:
        if first.is_set():
            put(self, row, places, number)
            return
        first.set()
        before.pass_through()
        put(self, row, places, number)
        after.pass_through()

    monkeypatch.setattr(Cut, "put", stopped)
    with in_thread(squeezenet, threads=2) as enclave:
        give(enclave, in_stages(squeezenet, enclave.digest, [CUT], threads=2))
        _, victim = client(enclave, squeezenet, 1, 1)
        values, spy = client(enclave, squeezenet, 2, 2)
        slow = run(enclave, [part(1, victim)], 0, CUT, keep=True)
        enclave.send(slow)
        before.await_somebody()
        forget(enclave, 1)
        results(enclave, [part(1, spy, 1, 1)], 0, CUT, keep=True)
        before.open()
        after.await_somebody()
        with pytest.raises(InvalidInputError, match="row 0 of request 1 is not at this cut"):
            results(enclave, [kept(1, 0)], CUT, slices(squeezenet))
        after.open()
        assert enclave.receive(m.Ran).id == slow.id
        (early,) = results(enclave, [part(1, spy, 0, 1)], 0, slices(squeezenet))
        (late,) = results(enclave, [kept(1, 1)], CUT, slices(squeezenet))
        assert_answer(enclave, squeezenet, values, spy, early, late)
        (cut,) = enclave.inner._arrangement.models[enclave.digest].cuts.values()  # type: ignore[union-attr]
        assert len(cut._free) == cut.capacity, "the victim's row has made room"


def test_a_request_that_is_forgotten_while_its_batch_waits_does_not_stop_the_others(
    squeezenet: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client goes away; the host says so at once, and the batch has been asked for already."""
    gate, run_slice = Gate(), Lane.run_slice
    stop = threading.Event()

    def slow(self: Lane, *rest: Any) -> None:
        if stop.is_set():
            gate.pass_through()
        run_slice(self, *rest)

    monkeypatch.setattr(Lane, "run_slice", slow)
    with in_thread(squeezenet) as enclave:
        give(enclave, in_stages(squeezenet, enclave.digest, [CUT]))
        clients = [client(enclave, squeezenet, 1, seed) for seed in range(4)]
        for number in range(3):
            results(enclave, [part(number, clients[number][1])], 0, CUT, keep=True)
        stop.set()
        enclave.send(run(enclave, [part(3, clients[3][1])], 0, slices(squeezenet)))
        gate.await_somebody()
        late = run(enclave, [kept(0), kept(1), kept(2)], CUT, slices(squeezenet))
        enclave.send(late)
        forget(enclave, 1)
        gate.open()
        assert not enclave.receive(m.Ran).results[0].error
        found = enclave.receive(m.Ran).results
        assert found[1] == m.PartResult()
        for index in (0, 2):
            assert_answer(enclave, squeezenet, *clients[index], found[index])


def test_a_request_that_is_forgotten_while_it_runs_leaves_nothing_behind(
    squeezenet: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, run_slice = Gate(), Lane.run_slice
    stop = threading.Event()

    def slow(self: Lane, *rest: Any) -> None:
        if stop.is_set():
            gate.pass_through()
        run_slice(self, *rest)

    monkeypatch.setattr(Lane, "run_slice", slow)
    with in_thread(squeezenet) as enclave:
        give(enclave, in_stages(squeezenet, enclave.digest, [CUT]))
        _, request = client(enclave, squeezenet, 2, 0)
        results(enclave, [part(1, request, 0, 1)], 0, CUT, keep=True)
        stop.set()
        enclave.send(run(enclave, [part(1, request, 1, 1)], 0, CUT, keep=True))
        gate.await_somebody()
        forget(enclave, 1)
        gate.open()
        assert enclave.receive(m.Ran).results == (m.PartResult(),)
        (cut,) = enclave.inner._arrangement.models[enclave.digest].cuts.values()  # type: ignore[union-attr]
        assert len(cut._free) == cut.capacity
        assert not enclave.inner._requests._open


def test_what_a_run_seals_is_within_the_budget_of_its_keys(
    squeezenet: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where the rows come in and leave, be that a cut (docs/reference/records.md)."""
    from lasagna.trust import records

    monkeypatch.setattr(records, "MAX_RECORDS_PER_REQUEST", 2)
    with in_thread(squeezenet) as enclave:
        give(enclave, in_stages(squeezenet, enclave.digest, [CUT]))
        values, request = client(enclave, squeezenet, 2, 0)
        _, other = client(enclave, squeezenet, 1, 1)
        found = results(enclave, [part(1, request), part(2, other)], 0, slices(squeezenet))
        assert [one.kind for one in found] == ["TrustError", ""]
        assert "a request has at most 2" in found[0].error
        assert results(enclave, [part(1, request)], 0, CUT, keep=True) == (m.PartResult(),)
        (late,) = results(enclave, [kept(1, 0, 2)], CUT, slices(squeezenet))
        assert_answer(enclave, squeezenet, values, request, late)


def test_time_is_charged_once_whether_a_request_waits_or_is_opened(
    squeezenet: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compute thread that opens the inputs itself is not waited for meanwhile.

    Opening counts in processor seconds, as it would in a profile: not what others take beside it.
    """
    real = executor.open_sealed

    def slow(*rest: Any) -> None:
        end_s = time.thread_time() + 0.1
        while time.thread_time() < end_s:
            pass
        real(*rest)

    monkeypatch.setattr(executor, "open_sealed", slow)
    with in_thread(squeezenet) as enclave:
        give(enclave, in_stages(squeezenet, enclave.digest, [], input_slots=0))
        _, request = client(enclave, squeezenet, 1, 0)
        command = run(enclave, [part(1, request)], 0, slices(squeezenet))
        made = enclave.inner._arrangement
        assert made is not None
        model = made.models[enclave.digest]
        requests = open_requests(enclave.inner._requests, command, model)
        job = Job(command, made, model, requests, rows=1)
        job.course = made.weights.announce(0, slices(squeezenet))
        job.queued_at = time.perf_counter() - 0.2
        begin = time.perf_counter()
        reply = enclave.inner._run(job, 0)
        took_s = time.perf_counter() - begin
    assert isinstance(reply, m.Ran)
    times = reply.timings
    assert times.open_s >= 0.1
    assert 0.2 <= times.wait_s < 0.29
    assert times.open_s + times.compute_s + times.stall_s + times.copy_s + times.seal_s <= took_s


class Failing:
    """A session whose runs fail with ONNX Runtime's words."""

    def __init__(self, said: str) -> None:
        self._said = said

    def io_binding(self) -> Any:
        return self

    def bind_input(self, *_: object) -> None: ...

    def bind_output(self, *_: object) -> None: ...

    def run_with_iobinding(self, _: object) -> None:
        raise RuntimeError(f"{self._said}\nand more")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("indices element out of data bounds, idx=31337", "values do not suit the model"),
        ("Available memory of 5 is smaller than requested 31337", "more workspace than was"),
    ],
)
def test_why_a_run_failed_is_told_without_its_values(
    squeezenet: Sealed, said: str, told: str
) -> None:
    """And its rows stay at the cut, to be tried apart."""
    with in_thread(squeezenet) as enclave:
        give(enclave, in_stages(squeezenet, enclave.digest, [CUT]))
        made = enclave.inner._arrangement
        assert made is not None
        model = made.models[enclave.digest]
        values, request = client(enclave, squeezenet, 1, 0)
        results(enclave, [part(1, request)], 0, CUT, keep=True)
        sessions = model.sessions
        model.sessions = {model.variant.slices[CUT].graph: Failing(said)}
        made.lanes[0]._bindings.clear()
        with pytest.raises(
            EnclaveError, match=rf"^slice {CUT} failed: .*{told}.* \(RuntimeError\)$"
        ) as caught:
            results(enclave, [kept(1)], CUT, slices(squeezenet))
        assert "31337" not in str(caught.value)
        model.sessions = sessions
        made.lanes[0]._bindings.clear()
        (found,) = results(enclave, [kept(1)], CUT, slices(squeezenet))
        assert_answer(enclave, squeezenet, values, request, found)
