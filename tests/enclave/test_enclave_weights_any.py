"""Promise: whatever runs and moves come, in whatever order and on however many threads: every run
sees its own weights, the loader overwrites nothing that is needed sooner than what it loads, and
everything ends."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.enclave.pieces import Course
from lasagna.enclave.weights import Weights
from lasagna.errors import PackageError

from .numbered import Numbered, Told, is_own, join, loading, numbered_weights

PIECES = 9
NEVER = 10**6


def steps(store: Weights, courses: list[Course]) -> list[int]:
    """What one thread will need, in order: the run under way, then the others as announced."""
    order = sorted(courses, key=lambda course: not course.running)
    return [piece for course in order for piece in range(course.at, course.last)]


def until(needs: list[int], piece: int) -> int:
    return needs.index(piece) if piece in needs else NEVER


def loader_steps(store: Weights, courses: list[Course], most: int) -> None:
    """Let the loader begin so many pieces, and check its choice each time."""
    for _ in range(most):
        before = {slot.holds: id(slot) for slot in store._ring.slots if slot.holds >= 0}
        with store._changed:
            job = store._next_job()
        needs = steps(store, courses)
        absent = [piece for piece in needs if piece not in before and not store.is_pinned(piece)]
        if job is None:
            kept = [until(needs, slot.holds) for slot in store._ring.slots if not slot.users]
            assert not absent or all(at < until(needs, absent[0]) for at in kept), "it idles"
            return
        assert isinstance(job, tuple)
        slot, piece, _ = job
        assert piece == absent[0], "what is needed next comes first"
        for held, place in before.items():
            if place == id(slot):
                assert until(needs, held) > until(needs, piece), "it was needed sooner"
        store._fill(*job, store.stagings[0], "loader")


@given(st.data())
def test_the_loader_makes_room_only_at_the_cost_of_what_is_needed_later(
    data: st.DataObject,
) -> None:
    """With one compute thread, where what is needed when is beyond doubt."""
    slots = data.draw(st.integers(1, 4), "slots")
    pinned = data.draw(st.sets(st.integers(0, PIECES - 1), max_size=4), "pinned")
    store = numbered_weights(Numbered(), [1] * PIECES, slots, threads=1, room=4)
    for piece in pinned:
        store.pin_now(piece)
    courses: list[Course] = []
    for _ in range(data.draw(st.integers(1, 12), "turns")):
        if not courses or data.draw(st.booleans(), "announce another"):
            first = data.draw(st.integers(0, PIECES - 1))
            courses.append(store.announce(first, data.draw(st.integers(first + 1, PIECES))))
        loader_steps(store, courses, data.draw(st.integers(0, 6), "loaded ahead"))
        course = courses[0]
        for _ in range(data.draw(st.integers(1, PIECES), "steps")):
            slot = store.acquire(0, course, course.at)
            assert is_own(slot, store.pieces[course.at])
            loader_steps(store, courses, data.draw(st.integers(0, 2), "loaded meanwhile"))
            assert is_own(slot, store.pieces[course.at]), "it was overwritten in use"
            store.release(course, slot)
            if course.at == course.last:
                store.finish(course)
                courses.remove(course)
                break


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_any_runs_and_moves_on_any_threads(seed: int, slots: int, threads: int) -> None:
    chance = random.Random(f"{seed} {slots} {threads}")  # noqa: S311 - a test's
    broken = Counter({number: chance.randrange(3) for number in range(PIECES)} if seed % 2 else {})
    chunks = [chance.randint(1, 4) for _ in range(PIECES)]
    store = numbered_weights(Numbered(broken), chunks, slots, threads, room=PIECES)
    runs = [
        [sorted(chance.sample(range(PIECES + 1), 2)) for _ in range(25)] for _ in range(threads)
    ]
    moves = [(chance.randrange(PIECES), chance.random() < 0.5, Told()) for _ in range(60)]
    wrong: list[int] = []
    refused: list[int] = []

    def work(thread: int) -> None:
        for first, last in runs[thread]:
            course = store.announce(first, last)
            try:
                for number in range(first, last):
                    slot = store.acquire(thread, course, number)
                    seen = [is_own(slot, store.pieces[number]) for _ in range(3)]
                    store.release(course, slot)
                    wrong.extend(number for own in seen if not own)
            except PackageError:
                refused.append(first)
            store.finish(course)

    def move() -> None:
        for piece, pin, told in moves:
            store.move(piece, pin=pin, done=told)
            if chance.random() < 0.5:
                told.outcome()

    with loading(store):
        workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(threads)]
        workers.append(threading.Thread(target=move, daemon=True))
        for worker in workers:
            worker.start()
        join(*workers)
        for *_, told in moves:
            told.outcome()
    assert not wrong
    assert bool(refused) <= bool(broken)
    assert not any(slot.users for slot in (*store._ring.slots, *store._pinned.values()))
    assert not store._ring.courses.announced
    assert store.pool.used == 4096 * len(store._pinned)
    assert store._ring.streamed == [n for n in range(PIECES) if n not in store._pinned]
