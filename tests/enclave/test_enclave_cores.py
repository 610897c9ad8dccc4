"""Promise: loading takes no core from threads that compute one layer together."""

from __future__ import annotations

import threading

import pytest

from .numbered import Numbered, is_own, join, load_all, loading, numbered_weights


def test_where_every_core_computes_weights_are_loaded_while_a_run_pauses() -> None:
    """A loader beside them would take a core from threads that wait for each other."""
    store = numbered_weights(Numbered(), [2] * 10, slots=3, threads=1)
    store.width = store.cores = 2
    course = store.announce(0, 10)
    for number in range(10):
        slot = store.acquire(0, course, number)
        assert is_own(slot, store.pieces[number])
        assert load_all(store) == [], "nothing while it computes"
        assert store.counters.loads == min(10, number // 3 * 3 + 3), "who pauses fills the ring"
        store.release(course, slot)
    store.finish(course)


@pytest.mark.parametrize("cores", [1, 2])
def test_who_needs_a_slot_that_the_loader_left_half_filled_fills_it(cores: int) -> None:
    """Its run is over, the ring has no other slot, and the loader rests."""
    store = numbered_weights(Numbered(), [3, 3], slots=1, threads=1)
    store.width = store.cores = cores
    gone = store.announce(0, 1)
    with store._changed:
        job = store._next_job()
    assert isinstance(job, tuple)
    store._fill(*job, store.stagings[0], "loader")  # the first of three chunks
    store.finish(gone)

    def work() -> None:
        course = store.announce(1, 2)
        slot = store.acquire(0, course, 1)
        assert is_own(slot, store.pieces[1])
        store.release(course, slot)
        store.finish(course)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    join(worker)
    assert store.counters.loads == 2


def test_two_runs_that_need_all_cores_share_what_they_load() -> None:
    store = numbered_weights(Numbered(), [2] * 20, slots=3, threads=2)
    store.cores = 2

    def work(thread: int) -> None:
        for _ in range(5):
            course = store.announce(0, 20)
            for number in range(20):
                slot = store.acquire(thread, course, number)
                assert is_own(slot, store.pieces[number])
                store.release(course, slot)
            store.finish(course)

    with loading(store):
        workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(2)]
        for worker in workers:
            worker.start()
        join(*workers)
    assert store.counters.loads <= 2 * 5 * 20
