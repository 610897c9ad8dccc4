"""Promise: tenants get work by their weights; who rests saves nothing up."""

from __future__ import annotations

import pytest

from lasagna.policy.fair import FairQueue, Shares, Waiting

FOR_EVER = 1e9


def waiting(number: int, tenant: str, priority: int = 0, since_s: float = 0.0) -> Waiting:
    return Waiting(number, tenant, priority, since_s, FOR_EVER, 0, 1)


def serve(queue: FairQueue, count: int, now_s: float = 0.0, patience_s: float = FOR_EVER) -> str:
    served = ""
    for _ in range(count):
        head = queue.head(now_s, patience_s)
        assert head is not None
        queue.take(head, 1, 1.0)
        served += head.tenant
    return served


def test_weights_are_kept_from_the_first_requests_on() -> None:
    queue = FairQueue(Shares({"a": 3.0}))
    for number in range(40):
        queue.push(waiting(number, "ab"[number % 2]))
    assert serve(queue, 16).count("a") == 12


def test_who_rested_gets_no_more_than_the_others() -> None:
    queue = FairQueue(Shares({}))
    for number in range(20):
        queue.push(waiting(number, "a"))
    serve(queue, 10)
    for number in range(20, 40):
        queue.push(waiting(number, "b"))
    assert serve(queue, 10).count("b") in (5, 6)


def test_priority_goes_first_and_patience_before_it() -> None:
    queue = FairQueue(Shares({}))
    queue.push(waiting(1, "a", priority=0))
    queue.push(waiting(2, "b", priority=5, since_s=4.0))
    assert serve(queue, 1, now_s=4.0, patience_s=5.0) == "b"
    queue.push(waiting(3, "b", priority=5, since_s=4.0))
    assert serve(queue, 1, now_s=6.0, patience_s=5.0) == "a"


def test_who_leaves_takes_all_rows_along() -> None:
    queue = FairQueue(Shares({}))
    queue.push(Waiting(1, "a", 0, 0.0, FOR_EVER, 0, 7))
    queue.push(waiting(2, "b"))
    head = queue.head(0.0, FOR_EVER)
    assert head is not None
    queue.take(head, 3, 1.0)
    assert (queue.rows, queue.left(1)) == (5, 4)
    queue.remove(1)
    queue.remove(1)
    assert (queue.rows, queue.left(1)) == (1, 0)
    assert [one.request for one in queue] == [2]
    queue.remove(2)
    assert queue.head(0.0, FOR_EVER) is None


def test_weights_must_be_above_nothing() -> None:
    with pytest.raises(AssertionError):
        Shares({"a": 0.0})
