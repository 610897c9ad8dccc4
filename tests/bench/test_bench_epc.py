"""Promise: the access patterns of bench-epc touch every page once, each in its own order."""

from __future__ import annotations

import numpy as np
import pytest

from lasagna.bench.epc_patterns import PATTERNS, order

PAGES = 64


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_page_is_touched_once(pattern: str) -> None:
    assert sorted(order(pattern, PAGES, 1)) == list(range(PAGES))


def test_patterns_are_what_they_are_called() -> None:
    assert order("in order", PAGES, 1)[:3].tolist() == [0, 1, 2]
    assert order("backwards", PAGES, 1)[:3].tolist() == [63, 62, 61]
    assert order("four streams", PAGES, 1)[:6].tolist() == [0, 16, 32, 48, 1, 17]
    assert np.array_equal(order("shuffled", PAGES, 1), order("shuffled", PAGES, 2))
    assert not np.array_equal(order("random", PAGES, 1), order("random", PAGES, 2))
