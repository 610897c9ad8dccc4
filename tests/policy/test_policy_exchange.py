"""Promise: the search in large clusters finds only what fits, and gives the poor more."""

from __future__ import annotations

from itertools import combinations, count, pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from tests.policy.machine import MB, linear
from tests.policy.test_policy_placement import cluster, clusters, server

from lasagna.bench.plan import random_cluster, random_model
from lasagna.policy import exchange
from lasagna.policy.cluster import Cluster, sliced
from lasagna.policy.columns import Column, columns_of, cuts_of, kinds_of
from lasagna.policy.exchange import _Exchange, best_exchanged, exchanged
from lasagna.policy.flow import Choice, chosen, fits, relaxed


def columns_for(given_: Cluster) -> tuple[list[Column], dict[int, list[Column]]]:
    cuts = {name: cuts_of(sliced(given_.models[name])) for name in given_.wanted}
    columns = columns_of(given_, cuts)
    kinds = kinds_of(given_.servers)
    numbers = {one.kind: number for number, one in enumerate(kinds)}
    by_kind = {k: [c for c in columns if c.kind == k] for k in numbers.values()}
    return columns, {n: by_kind[numbers[one.kind]] for n, one in enumerate(given_.servers)}


def searched(given_: Cluster, begin: Choice, attempts: int = 400) -> Choice:
    columns, free = columns_for(given_)
    most = relaxed(given_, columns, "throughput")
    assert most is not None
    left = iter(range(attempts))
    return exchanged(
        given_, begin, free, most[0].scale, lambda: next(left, attempts) < attempts - 1
    )


def scale_of(given_: Cluster, choice: Choice) -> float:
    flows = chosen(given_, choice, "throughput")
    return 0.0 if flows is None else flows.scale


def test_from_nothing_idle_servers_are_filled() -> None:
    """Four equal servers and a model that fits each: all of them end up with work."""
    model = linear([2 * MB] * 3, [100_000] * 3, [0.01] * 3)
    given_ = cluster([server(f"s{n}") for n in range(4)], {"m": model})
    found = searched(given_, Choice(((),) * 4))
    columns, _ = columns_for(given_)
    most = relaxed(given_, columns, "throughput")
    assert most is not None
    assert scale_of(given_, found) > 0.99 * most[0].scale
    assert all(found.columns)


def test_a_poor_model_gets_room_on_a_rich_ones_server() -> None:
    """What is there becomes leaner, or goes, when the other model is worth more."""
    rich = linear([4 * MB] * 4, [100_000] * 4, [0.0005] * 4)
    poor = linear([4 * MB] * 4, [100_000] * 4, [0.01] * 4)
    given_ = cluster([server("a", 30 * MB), server("b", 30 * MB)], {"poor": poor, "rich": rich})
    _, free = columns_for(given_)
    begin = []
    for number, name in enumerate(("rich", "poor")):
        own = [c for c in free[number] if c.model == name and (c.first, c.last) == (0, 4)]
        begin.append((max(own, key=lambda c: c.own_bytes),))
    before = scale_of(given_, Choice(tuple(begin)))
    assert before > 0
    found = searched(given_, Choice(tuple(begin)))
    assert scale_of(given_, found) > 1.3 * before


def test_where_nothing_cheaper_helps_busy_columns_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four servers and three models the search gets no further by cheap exchanges alone."""
    rng = np.random.default_rng(23)
    models = {f"m{n}": random_model(rng, 4, 20 * MB) for n in range(3)}
    given_ = random_cluster(rng, 4, 2, models)
    every = scale_of(given_, searched(given_, Choice(((),) * 4), attempts=100_000))
    monkeypatch.setattr(exchange, "LOSSES", exchange.LOSSES[:1])
    cheap = scale_of(given_, searched(given_, Choice(((),) * 4), attempts=100_000))
    assert every > 1.05 * cheap > 0


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(clusters())
def test_exchanges_are_tried_from_the_cheapest_and_none_in_vain(given_: Cluster) -> None:
    """All fit and have the new column; what would be left of one before is not tried again."""
    columns, free = columns_for(given_)
    most = relaxed(given_, columns, "throughput")
    if most is None:
        return
    here = searched(given_, Choice(((),) * len(given_.servers)), attempts=60)
    search = _Exchange(given_, here, free, most[0].scale)
    for number, one in enumerate(given_.servers):
        for column in free[number][:: max(1, len(free[number]) // 10)]:
            ways = list(search._ways(number, column))
            assert all(column in after and fits(one, after) for _, after in ways)
            assert all(low <= high for (low, _), (high, _) in pairwise(ways))
            for (_, before), (_, after) in combinations(ways, 2):
                assert not set(before) >= set(after)


def test_the_best_of_several_beginnings_is_taken() -> None:
    """The result is no worse than any beginning, however little time there is, and it ends."""
    model = linear([2 * MB] * 3, [100_000] * 3, [0.01] * 3)
    given_ = cluster([server(f"s{n}") for n in range(4)], {"m": model})
    columns, free = columns_for(given_)
    most = relaxed(given_, columns, "throughput")
    assert most is not None
    whole = max((c for c in free[0] if (c.first, c.last) == (0, 3)), key=lambda c: c.own_bytes)
    begins = [Choice(((whole,), (whole,), (), ())), Choice(((),) * 4), Choice(((), (), (), ()))]
    values = []
    for time in (0.0, 10.0, 1e9):
        looks = count()
        value, found = best_exchanged(
            given_,
            begins,
            free,
            most[0].scale,
            lambda one: scale_of(given_, one),
            clock=lambda looks=looks: float(next(looks)),  # type: ignore[misc]
            until_s=time,
        )
        assert value == scale_of(given_, found)
        assert value >= scale_of(given_, begins[0]) > 0
        values.append(value)
    assert values[-1] > 0.99 * most[0].scale
    assert scale_of(given_, begins[0]) < 0.6 * most[0].scale


def test_a_server_too_small_for_anything_stays_empty() -> None:
    """Beside one that is large enough, which does all the work."""
    model = linear([4 * MB] * 2, [100_000] * 2, [0.01] * 2)
    given_ = cluster([server("small", 200_000), server("large", 30 * MB)], {"m": model})
    _, free = columns_for(given_)
    assert not free[0]
    found = searched(given_, Choice(((), ())))
    assert not found.columns[0]
    assert found.columns[1]


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(clusters())
def test_whatever_is_found_fits(given_: Cluster) -> None:
    columns, _ = columns_for(given_)
    if relaxed(given_, columns, "throughput") is None:
        return
    found = searched(given_, Choice(((),) * len(given_.servers)), attempts=60)
    for one, here in zip(given_.servers, found.columns, strict=True):
        assert fits(one, here)
