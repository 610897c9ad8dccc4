"""Promise: a compute thread finds exactly its slice's weights, however slots are reused and slices
pinned meanwhile, and a chunk that does not open stops the run that needs it and nothing else."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lasagna.enclave.pieces import pieces_of
from lasagna.enclave.pool import Pool
from lasagna.enclave.spans import Recorder
from lasagna.enclave.weights import Weights
from lasagna.errors import BudgetError, EnclaveError, InvalidInputError, PackageError
from lasagna.package.format import HEADER, SIGNATURE_BYTES, encode
from lasagna.package.reader import OpenPackage, Package
from lasagna.units import MIB

from .conftest import Sealed
from .numbered import (
    DEADLINE_S,
    Numbered,
    Told,
    is_own,
    join,
    load_all,
    loading,
    memory,
    numbered_weights,
    waits,
)


def real_weights(path: Path, sealed: Sealed, slots: int, threads: int) -> Weights:
    package = OpenPackage(Package(path), sealed.keys.content_key.reveal())
    pieces = pieces_of(bytes(32), package, package.manifest.variants[0].slices)
    largest = max(piece.size for piece in pieces)
    return Weights(
        pieces,
        [memory(largest) for _ in range(slots)],
        [memory(2**20 + 16) for _ in range(threads + 1)],
        Pool(20 * MIB),
        Recorder(),
    )


def turn(store: Weights, loader: Callable[[Weights], object] = lambda _: None) -> list[int]:
    """One run through all pieces, with a loader that gets time before each; where each lay."""
    course, places = store.announce(0, len(store.pieces)), []
    for number in range(len(store.pieces)):
        loader(store)
        slot = store.acquire(0, course, number)
        places.append(slot.memory.ctypes.data)
        store.release(course, slot)
    store.finish(course)
    return places


@pytest.mark.parametrize("loader", [True, False], ids=["loader", "no loader"])
@pytest.mark.parametrize("slots", [1, 2, 3, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_slice_is_its_own(squeezenet: Sealed, slots: int, threads: int, loader: bool) -> None:
    store = real_weights(squeezenet.path, squeezenet, slots, threads)
    store.pin_now(0)
    store.pin_now(3)
    package = store.pieces[0].package
    sections = [[section for section, *_ in piece.chunks] for piece in store.pieces]
    truth = [b"".join(map(package.read_section, dict.fromkeys(found))) for found in sections]
    wrong: list[tuple[int, int]] = []

    def work(thread: int) -> None:
        for _ in range(3):
            course = store.announce(0, len(truth))
            for number, expected in enumerate(truth):
                slot = store.acquire(thread, course, number)
                if bytes(slot.memory[: len(expected)]) != expected:
                    wrong.append((thread, number))
                store.release(course, slot)
            store.finish(course)

    with loading(store, loader):
        workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(threads)]
        for worker in workers:
            worker.start()
        join(*workers)
    assert not wrong


def test_a_ring_that_holds_everything_loads_everything_once() -> None:
    store = numbered_weights(Numbered(), [1, 3, 2, 1], slots=4, threads=1)
    with loading(store):
        for _ in range(3):
            turn(store)
    assert store.counters.loads == 4
    assert store.counters.loaded_bytes == sum(piece.size for piece in store.pieces)


def test_a_slice_that_is_loaded_ahead_comes_to_the_same_place_every_turn() -> None:
    """Or its graph would have to be bound to its weights anew at every run."""
    store = numbered_weights(Numbered(), [2] * 17, slots=5, threads=1, room=1)
    store.pin_now(2)
    places = [turn(store, loader=load_all) for _ in range(6)]
    assert places == [places[0]] * 6


def test_what_is_loaded_ahead_is_loaded_once_a_turn() -> None:
    """It is not overwritten before it is used."""
    store = numbered_weights(Numbered(), [2] * 12, slots=5, threads=1)
    with loading(store):
        for _ in range(6):
            turn(store)
    assert store.counters.loads <= 6 * 12


def test_the_loader_follows_announced_runs_in_their_order() -> None:
    store = numbered_weights(Numbered(), [2] * 10, slots=4, threads=2)
    assert load_all(store) == [], "nobody needs anything"
    later, sooner = store.announce(6, 8), store.announce(2, 5)
    assert load_all(store) == [6, 7, 2, 3]
    slot = store.acquire(0, sooner, 2)  # the second run begins first: it is what counts
    assert load_all(store) == [4], "in the place of 7"
    store.release(sooner, slot)
    assert 7 not in store._ring.where
    store.finish(later)
    store.finish(sooner)


def test_what_no_run_needs_any_more_gives_way() -> None:
    store = numbered_weights(Numbered(), [1] * 6, slots=2, threads=1)
    given_up = store.announce(0, 2)
    assert load_all(store) == [0, 1]
    store.finish(given_up)
    course = store.announce(4, 6)
    assert load_all(store) == [4, 5]
    store.finish(course)


def test_two_threads_that_need_a_slice_share_its_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk is decrypted once, by whoever comes first; nobody reads before all are there."""
    package = Numbered()
    store = numbered_weights(package, [8], slots=2, threads=3)
    start = threading.Barrier(3, timeout=DEADLINE_S)
    right: list[bool] = []

    def need(thread: int) -> None:
        course = store.announce(0, 1)
        start.wait()
        slot = store.acquire(thread, course, 0)
        right.append(is_own(slot, store.pieces[0]))
        store.release(course, slot)
        store.finish(course)

    with loading(store):
        workers = [threading.Thread(target=need, args=(n,), daemon=True) for n in range(3)]
        for worker in workers:
            worker.start()
        join(*workers)
    assert right == [True] * 3
    assert sorted(package.opened) == [(0, chunk) for chunk in range(8)]
    assert store.counters.loads == 1


# Chunks that do not open.


def changed(squeezenet: Sealed, folder: Path, number: int) -> Path:
    """A copy of the package with another byte in the weights of one slice."""
    path = folder / "changed.lsg"
    shutil.copy(squeezenet.path, path)
    manifest = squeezenet.manifest
    victim = manifest.variants[0].slices[number].weights[0]
    body = HEADER.size + len(encode(manifest)) + SIGNATURE_BYTES
    with path.open("r+b") as file:
        file.seek(manifest.section_offsets(body)[victim] + 100)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return path


@pytest.mark.parametrize("loader", [True, False], ids=["loader", "no loader"])
def test_a_changed_chunk_is_refused_and_the_others_go_on(
    squeezenet: Sealed, tmp_path: Path, loader: bool
) -> None:
    store = real_weights(changed(squeezenet, tmp_path, 4), squeezenet, 2, 1)
    with loading(store, loader):
        for _ in range(2):
            course = store.announce(0, len(store.pieces))
            for number in range(len(store.pieces)):
                if number == 4:
                    with pytest.raises(PackageError, match="does not open"):
                        store.acquire(0, course, number)
                else:
                    store.release(course, store.acquire(0, course, number))
            store.finish(course)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_broken_chunk_is_tried_once_until_somebody_needs_it_and_then_again(damaged: int) -> None:
    """Trying again and again would take a core from the others; what was a hiccup passes."""
    package = Numbered(Counter({damaged: 1}))
    store = numbered_weights(package, [3] * 3, slots=3, threads=1)
    course = store.announce(0, 3)
    assert sorted(load_all(store)) == [0, 1, 2]
    assert [section for section, _ in package.opened].count(damaged) == 1, "the rest is left"
    assert load_all(store) == []
    with pytest.raises(PackageError, match=f"section {damaged} does not open"):
        store.acquire(0, course, damaged)
    store.finish(course)
    again = store.announce(damaged, damaged + 1)
    slot = store.acquire(0, again, damaged)
    assert is_own(slot, store.pieces[damaged])
    store.release(again, slot)
    store.finish(again)


def test_two_threads_that_need_a_broken_slice_are_both_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = Numbered(Counter({0: 2}))
    store = numbered_weights(package, [1, 1], slots=2, threads=2)
    told: list[PackageError] = []
    start = threading.Barrier(2, timeout=DEADLINE_S)

    def need(thread: int) -> None:
        course = store.announce(0, 1)
        start.wait()
        try:
            store.acquire(thread, course, 0)
        except PackageError as error:
            told.append(error)
        store.finish(course)

    with loading(store, loader=False):
        workers = [threading.Thread(target=need, args=(n,), daemon=True) for n in range(2)]
        for worker in workers:
            worker.start()
        join(*workers)
        course = store.announce(1, 2)
        assert is_own(store.acquire(0, course, 1), store.pieces[1]), "the slots are free again"
    assert len(told) == 2
    assert told[0] is not told[1]


# Waiting, and the end.


def test_only_who_waits_for_a_slice_is_charged_for_it() -> None:
    store = numbered_weights(Numbered(), [1] * 4, slots=2, threads=2, room=1)
    store.pin_now(0)
    with loading(store, loader=False):
        for thread, number in ((0, 0), (1, 3)):
            course = store.announce(number, number + 1)
            store.release(course, store.acquire(thread, course, number))
    assert store.stall_s[0] == 0
    assert store.stall_s[1] > 0


def test_closing_wakes_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread without a slot, one that waits for another's chunk, and the loader."""
    store = numbered_weights(Numbered(), [1] * 6, slots=2, threads=3)
    begun = waits(monkeypatch)
    holding = store.announce(0, 1)
    store.acquire(0, holding, 0)
    with store._changed:  # somebody took the only chunk of 1, and never comes back
        lost = store._ring.claim(1, urgent=True)
        assert lost is not None
        store._ring.take_chunk(lost)
    failed: list[str] = []

    def wait(thread: int, number: int) -> None:
        course = store.announce(number, number + 1)
        try:
            store.acquire(thread, course, number)
        except PackageError as error:
            failed.append(str(error))

    waiters = [
        threading.Thread(target=wait, args=(1, 5), daemon=True),
        threading.Thread(target=wait, args=(2, 1), daemon=True),
        threading.Thread(target=store.load_ahead, daemon=True),
    ]
    for waiter in waiters:
        waiter.start()
        assert begun.acquire(timeout=DEADLINE_S)
    store.close()
    join(*waiters)
    assert failed == ["the enclave is stopping"] * 2


# Pins.


def test_a_slice_is_pinned_while_a_run_reads_it_from_the_ring() -> None:
    store = numbered_weights(Numbered(), [2] * 4, slots=2, threads=2, room=1)
    course, told = store.announce(0, 4), Told()
    with loading(store):
        before = store.acquire(0, course, 0)
        store.move(0, pin=True, done=told)
        assert told.outcome() is None
        other = store.announce(0, 1)
        after = store.acquire(1, other, 0)
        assert after.memory is store.memory_of(0)
        assert after is not before
        assert is_own(before, store.pieces[0])
        store.release(other, after)
        store.finish(other)
        store.release(course, before)
        for number in (1, 2, 3):
            slot = store.acquire(0, course, number)
            assert is_own(slot, store.pieces[number])
            store.release(course, slot)
        store.finish(course)
    assert (store.is_pinned(0), store.pool.used) == (True, 4096)


def test_unpinning_waits_until_no_run_uses_the_slice() -> None:
    """Its memory is another's afterwards."""
    store = numbered_weights(Numbered(), [1] * 3, slots=1, threads=1, room=1)
    store.pin_now(1)
    course, told = store.announce(1, 2), Told()
    slot = store.acquire(0, course, 1)
    store.move(1, pin=False, done=told)
    load_all(store)
    assert not told.yet
    assert (store.is_pinned(1), store.pool.used) == (True, 4096)
    store.release(course, slot)
    store.finish(course)
    load_all(store)
    assert told.outcome() is None
    assert (store.is_pinned(1), store.pool.used) == (False, 0)
    again = store.announce(1, 2)
    assert is_own(store.acquire(0, again, 1), store.pieces[1])


def test_a_run_that_begins_while_a_slice_is_unpinned_keeps_it() -> None:
    """The loader has seen that nobody uses it; then somebody does."""
    store = numbered_weights(Numbered(), [1] * 2, slots=1, threads=1, room=1)
    store.pin_now(1)
    told = Told()
    store.move(1, pin=False, done=told)
    with store._changed:
        move = store._next_job()
    assert move is not None
    assert not isinstance(move, tuple)
    course = store.announce(1, 2)
    slot = store.acquire(0, course, 1)
    store._carry_out(move)
    assert not told.yet
    assert store.pool.used == 4096
    store.release(course, slot)
    load_all(store)
    assert told.outcome() is None


@pytest.mark.parametrize(
    ("pins", "moves", "errors"),
    [
        ([1], [(1, True)], [InvalidInputError]),
        ([], [(1, False)], [InvalidInputError]),
        ([], [(1, True), (1, True)], [None, InvalidInputError]),
        ([1], [(1, False), (1, False)], [None, InvalidInputError]),
        ([2], [(2, False)], [InvalidInputError]),  # larger than a slot
        ([], [(0, True), (1, True), (2, True)], [None, None, BudgetError]),
        ([], [(3, True), (3, True)], [PackageError, None]),
    ],
)
def test_a_move_that_cannot_be_is_refused_and_the_loader_goes_on(
    pins: list[int], moves: list[tuple[int, bool]], errors: list[type[Exception] | None]
) -> None:
    """Also when it could have been as it was asked for: the host asks for several at once."""
    store = numbered_weights(Numbered(Counter({3: 1})), [1, 1, 2, 1], slots=1, threads=1, room=2)
    store.ring[0].resize(10, refcheck=False)
    for piece in pins:
        store.pin_now(piece)
    told = [Told() for _ in moves]
    for (piece, pin), one in zip(moves, told, strict=True):
        store.move(piece, pin=pin, done=one)
    with loading(store):
        outcomes = [one.outcome() for one in told]
    assert [type(outcome) if outcome else None for outcome in outcomes] == errors
    kept = sum(store.is_pinned(piece) for piece in range(4))
    assert store.pool.used == 4096 * kept, "what was not pinned takes no room"


def test_moves_that_come_too_late_are_told_so() -> None:
    store = numbered_weights(Numbered(), [1] * 2, slots=1, threads=1, room=1)
    told = Told()
    store.move(0, pin=True, done=told)
    store.close()
    store.load_ahead()
    assert isinstance(told.outcome(), EnclaveError)
