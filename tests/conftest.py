"""For all tests: generated examples that are the same in every run, and fewer collections."""

from __future__ import annotations

import gc

from hypothesis import settings

# A run finds tomorrow what it finds today, and no slow machine fails it: hangs are the time-out's.
# To look for news: pytest --hypothesis-profile=explore
settings.register_profile("same", derandomize=True, deadline=None, database=None)
settings.register_profile("explore", max_examples=2000, deadline=None)
settings.load_profile("same")


def pytest_collection_finish() -> None:
    """Leave what has been imported out of all later collections."""
    gc.collect()
    gc.freeze()
