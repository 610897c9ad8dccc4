"""Promise: a compute thread finds exactly its slice's weights, however slots are reused, and a
chunk that does not open stops the request that needs it and nothing else."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lasagna.enclave.weights import WeightStore
from lasagna.errors import PackageError
from lasagna.package.format import HEADER, SIGNATURE_BYTES, encode
from lasagna.package.reader import OpenPackage, Package

from .conftest import Sealed


def memory(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.zeros(size, dtype=np.uint8)


@contextmanager
def running(store: WeightStore, loader: bool) -> Iterator[None]:
    thread = threading.Thread(target=store.load_ahead)
    if loader:
        thread.start()
    try:
        yield
    finally:
        store.close()
        if loader:
            thread.join(10)
            assert not thread.is_alive()


def open_store(
    path: Path, sealed: Sealed, slots: int, pinned: set[int], threads: int
) -> WeightStore:
    package = OpenPackage(Package(path), sealed.keys.content_key.reveal())
    variant = package.manifest.variants[0]
    largest = max(facts.weight_bytes for facts in variant.slices)
    return WeightStore(
        package,
        variant,
        {n: memory(variant.slices[n].weight_bytes) for n in pinned},
        [memory(largest) for _ in range(slots)],
        [memory(2**20 + 16) for _ in range(threads + 1)],
    )


@pytest.mark.parametrize("loader", [True, False], ids=["loader", "no loader"])
@pytest.mark.parametrize("slots", [1, 2, 3, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_slice_is_its_own(squeezenet: Sealed, slots: int, threads: int, loader: bool) -> None:
    store = open_store(squeezenet.path, squeezenet, slots, {0, 3}, threads)
    store.load_pinned()
    slices = store.variant.slices
    truth = [b"".join(store.package.read_section(s) for s in f.weights) for f in slices]
    wrong: list[tuple[int, int]] = []

    def work(thread: int) -> None:
        for _ in range(3):
            for number, facts in enumerate(slices):
                weights = store.acquire(thread, number)
                if bytes(weights[: facts.weight_bytes]) != truth[number]:
                    wrong.append((thread, number))
                store.release(thread, number)
        store.idle(thread)

    with running(store, loader):
        workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert not worker.is_alive(), "a compute thread waits for ever"
    assert not wrong


def test_a_ring_that_holds_everything_loads_everything_once(squeezenet: Sealed) -> None:
    store = open_store(squeezenet.path, squeezenet, 60, set(), 1)
    with running(store, loader=False):
        for _ in range(3):
            for number in range(len(store.variant.slices)):
                store.acquire(0, number)
                store.release(0, number)
    assert store.counters.loads == len(store.variant.slices)
    assert store.counters.loaded_bytes == store.variant.weight_bytes


def test_a_slice_comes_to_the_same_place_every_turn(squeezenet: Sealed) -> None:
    """Or its graph would have to be bound to its weights anew at every run."""
    store = open_store(squeezenet.path, squeezenet, 5, {2}, 1)
    places: dict[int, set[int]] = {}
    with running(store, loader=True):
        for _ in range(6):
            for number in range(len(store.variant.slices)):
                memory_of_slice = store.acquire(0, number)
                places.setdefault(number, set()).add(memory_of_slice.ctypes.data)
                store.release(0, number)
    assert {number: len(found) for number, found in places.items()} == dict.fromkeys(places, 1)


def test_what_is_loaded_ahead_is_not_overwritten_before_it_is_used(squeezenet: Sealed) -> None:
    store = open_store(squeezenet.path, squeezenet, 5, set(), 1)
    turns = 6
    with running(store, loader=True):
        for _ in range(turns):
            for number in range(len(store.variant.slices)):
                store.acquire(0, number)
                store.release(0, number)
    ahead = 5  # of the turn that does not come
    assert store.counters.loads <= turns * len(store.variant.slices) + ahead


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
    store = open_store(changed(squeezenet, tmp_path, 4), squeezenet, 2, set(), 1)
    with running(store, loader):
        for _ in range(2):
            for number in range(len(store.variant.slices)):
                if number == 4:
                    with pytest.raises(PackageError, match="does not open"):
                        store.acquire(0, number)
                else:
                    store.acquire(0, number)
                    store.release(0, number)


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_the_loader_tries_a_changed_chunk_once_and_then_waits(
    squeezenet: Sealed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    """Until somebody needs it. Trying again and again would take a core from the others."""
    store = open_store(changed(squeezenet, tmp_path, damaged), squeezenet, 3, set(), 1)
    tries: list[int] = []
    decrypt = store.package.decrypt_chunk

    def counted(section: int, *rest: Any) -> None:
        tries.append(section)
        decrypt(section, *rest)

    monkeypatch.setattr(store.package, "decrypt_chunk", counted)
    with running(store, loader=True):
        for turn in (1, 2):
            deadline = time.monotonic() + 10
            while not all(n in store._where and not store._where[n].missing for n in range(3)):
                assert time.monotonic() < deadline, "the loader does not fill the ring"
                time.sleep(0.001)
            time.sleep(0.05)
            slices = store.variant.slices
            assert tries.count(slices[damaged].weights[0]) == turn
            for number in range(len(slices)):
                if number == damaged:
                    with pytest.raises(PackageError, match="does not open"):
                        store.acquire(0, number)
                else:
                    store.acquire(0, number)
                    store.release(0, number)
            store.idle(0)


def test_two_threads_that_need_a_changed_slice_are_both_told(
    squeezenet: Sealed, tmp_path: Path
) -> None:
    store = open_store(changed(squeezenet, tmp_path, 0), squeezenet, 2, set(), 2)
    told: list[PackageError] = []

    def need(thread: int) -> None:
        try:
            store.acquire(thread, 0)
        except PackageError as error:
            told.append(error)

    with running(store, loader=True):
        threads = [threading.Thread(target=need, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert store.acquire(0, 1).size  # the slots are free again
        store.release(0, 1)
    assert len(told) == 2
    assert told[0] is not told[1]


def test_only_who_waits_for_a_slice_is_charged_for_it(squeezenet: Sealed) -> None:
    store = open_store(squeezenet.path, squeezenet, 2, {0}, 2)
    store.load_pinned()
    with running(store, loader=False):
        store.acquire(0, 0)
        store.acquire(1, 3)
        store.release(1, 3)
    assert store.stall_s[0] == 0
    assert store.stall_s[1] > 0


def test_closing_wakes_a_waiting_thread(squeezenet: Sealed) -> None:
    store = open_store(squeezenet.path, squeezenet, 1, set(), 2)
    store.acquire(0, 0)
    failed: list[str] = []

    def wait() -> None:
        try:
            store.acquire(1, 5)  # the only slot is in use
        except PackageError as error:
            failed.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    store.close()
    waiter.join(10)
    assert failed == ["the enclave is stopping"]
