"""Promise: a row comes out of a cut as it was put in, for the request that it belongs to and for no
other, and a cut never holds more than its capacity."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lasagna.enclave.cuts import Cut, Owner
from lasagna.enclave.pool import Memory
from lasagna.errors import InvalidInputError

SIZES = (3, 64)
BATCH = 4


def memory(size: int, value: int = 0) -> Memory:
    return np.full(size, value, dtype=np.uint8)


def cut_of(capacity: int) -> Cut:
    return Cut(SIZES, [memory(size * capacity) for size in SIZES], capacity)


def places(value: int = 0) -> list[Memory]:
    return [memory(size * BATCH, value) for size in SIZES]


def test_a_row_comes_out_as_it_was_put_in_wherever_it_stands_in_the_batches() -> None:
    cut, mine, other = cut_of(3), Owner(1), Owner(2)
    batch = [np.arange(size * BATCH, dtype=np.uint8) for size in SIZES]
    cut.put((mine, 5), batch, 2)
    cut.put((other, 5), places(99), 0)
    out = places()
    cut.copy_out((mine, 5), out, 0)
    for size, before, after in zip(SIZES, batch, out, strict=True):
        np.testing.assert_array_equal(after[:size], before[2 * size : 3 * size])
        assert not after[size:].any(), "the other rows of the batch are not touched"


def test_requests_of_one_number_are_two() -> None:
    """The host gave the first one's number to another: that one finds nothing here."""
    cut, first, second = cut_of(2), Owner(7), Owner(7)
    cut.put((first, 0), places(1), 0)
    with pytest.raises(InvalidInputError, match="row 0 of request 7 is not at this cut"):
        cut.copy_out((second, 0), places(), 0)
    cut.put((second, 0), places(2), 0)
    cut.forget(first)
    out = places()
    cut.copy_out((second, 0), out, 0)
    assert out[0][0] == 2


def test_a_miscount_is_refused() -> None:
    cut, mine = cut_of(1), Owner(1)
    cut.drop((mine, 0))
    cut.put((mine, 0), places(1), 0)
    with pytest.raises(InvalidInputError, match="row 0 of request 1 is at this cut already"):
        cut.put((mine, 0), places(2), 0)
    with pytest.raises(InvalidInputError, match="1 rows are at this cut, which is its capacity"):
        cut.put((mine, 1), places(2), 0)
    out = places()
    cut.copy_out((mine, 0), out, 0)
    assert out[0][0] == 1
    cut.drop((mine, 0))
    cut.drop((mine, 0))
    cut.put((mine, 1), places(2), 0)
    with pytest.raises(InvalidInputError, match="its capacity"):
        cut.put((mine, 0), places(2), 0)


class Interrupted:
    """Memory of a batch; before it is first touched, something else happens, or tries to."""

    def __init__(self, inner: Memory, happens: Callable[[], None]) -> None:
        self._inner = inner
        self.thread = threading.Thread(target=happens, daemon=True)

    def _interrupt(self) -> None:
        if self.thread.ident is None:
            self.thread.start()
            self.thread.join(0.2)  # by then it is over, or has to wait for us

    def __setitem__(self, key: Any, value: Memory) -> None:
        self._interrupt()
        self._inner[key] = value

    def __getitem__(self, key: Any) -> Memory:
        self._interrupt()
        return cast(Memory, self._inner[key])


def test_a_row_that_is_copied_out_is_not_overwritten_by_another_requests() -> None:
    """A hostile host runs one row twice at once: one run drops it while the other copies it."""
    cut, victim, mine = cut_of(1), Owner(1), Owner(2)

    def replace() -> None:
        cut.drop((mine, 0))
        cut.put((victim, 0), places(66), 0)

    cut.put((mine, 0), places(1), 0)
    inner = places()
    watched = Interrupted(inner[0], replace)
    cut.copy_out((mine, 0), cast("list[Memory]", [watched, inner[1]]), 0)
    watched.thread.join(5)
    assert [place[0] for place in inner] == [1, 1]


def test_a_row_that_is_put_does_not_end_in_another_requests_place() -> None:
    """A hostile host forgets a request while a row of it is copied here."""
    cut, victim, mine = cut_of(1), Owner(1), Owner(2)

    def replace() -> None:
        cut.forget(victim)
        cut.put((mine, 0), places(1), 0)

    batch = places(66)
    watched = Interrupted(batch[0], replace)
    cut.put((victim, 0), cast("list[Memory]", [watched, batch[1]]), 0)
    watched.thread.join(5)
    out = places()
    cut.copy_out((mine, 0), out, 0)
    assert [place[0] for place in out] == [1, 1]


class Model(RuleBasedStateMachine):
    """A cut against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.owners = [Owner(0), Owner(0), Owner(1)]
        self.held: dict[tuple[int, int], int] = {}
        self.value = 0

    @initialize(capacity=st.integers(0, 5))
    def make(self, capacity: int) -> None:
        self.cut = cut_of(capacity)

    @rule(owner=st.integers(0, 2), row=st.integers(0, 3), number=st.integers(0, BATCH - 1))
    def put(self, owner: int, row: int, number: int) -> None:
        self.value = (self.value + 1) % 256
        batch = [place * 0 for place in places()]
        for size, place in zip(SIZES, batch, strict=True):
            place[number * size : (number + 1) * size] = self.value
        full = len(self.held) == self.cut.capacity
        if full or (owner, row) in self.held:
            with pytest.raises(InvalidInputError):
                self.cut.put((self.owners[owner], row), batch, number)
        else:
            self.cut.put((self.owners[owner], row), batch, number)
            self.held[owner, row] = self.value

    @rule(owner=st.integers(0, 2), row=st.integers(0, 3))
    def drop(self, owner: int, row: int) -> None:
        self.cut.drop((self.owners[owner], row))
        self.held.pop((owner, row), None)

    @rule(owner=st.integers(0, 2))
    def forget(self, owner: int) -> None:
        self.cut.forget(self.owners[owner])
        self.held = {key: value for key, value in self.held.items() if key[0] != owner}

    @invariant()
    def all_rows_are_as_they_came(self) -> None:
        for owner in range(3):
            for row in range(4):
                out, here = places(), self.held.get((owner, row))
                if here is None:
                    with pytest.raises(InvalidInputError):
                        self.cut.copy_out((self.owners[owner], row), out, 1)
                    continue
                self.cut.copy_out((self.owners[owner], row), out, 1)
                for size, place in zip(SIZES, out, strict=True):
                    assert set(place[size : 2 * size].tolist()) == {here}


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=25)
