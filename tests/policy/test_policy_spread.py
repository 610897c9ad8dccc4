"""Placements of whole models: what they promise, and whom they refuse."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.machine import MACHINE, MB, linear

from lasagna.errors import BudgetError
from lasagna.policy.cluster import Cluster, Part, Server
from lasagna.policy.costs import Forms
from lasagna.policy.spread import models_apart, whole_models


def server(name: str, *, speed: float = 1.0) -> Server:
    return Server(name, replace(MACHINE, cores=2), speed)


def test_whole_models_are_on_every_server_that_can_hold_them() -> None:
    """The placement without a plan: all models on all servers, or in turn where memory is short."""
    small = linear([2 * MB] * 2, [50_000] * 2, [0.002] * 2)
    models = {f"m{n}": (small,) for n in range(3)}
    given_ = Cluster((server("a"), server("b")), models, dict.fromkeys(models, 1.0))
    found = whole_models(given_)
    assert len(found.parts) == 6
    assert {(part.first, part.last) for part in found.parts} == {(0, 2)}
    huge = linear([60 * MB], [50_000], [0.002])
    with pytest.raises(BudgetError, match="'h'"):
        whole_models(Cluster((server("a"),), {"h": (huge,)}, {"h": 1.0}))


def light(row_s: float, weight: int = 2 * MB) -> Forms:
    return (linear([weight], [50_000], [row_s]),)


@given(
    st.lists(st.tuples(st.floats(0.001, 0.1), st.floats(0.1, 100.0)), min_size=1, max_size=4),
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), max_size=6),
)
@settings(deadline=None)
def test_models_apart_are_shared_out_by_their_demand(
    models: list[tuple[float, float]], spare: list[float]
) -> None:
    """One model a server, none without one, and none has a server that the worst served needs."""
    names = [f"m{n}" for n in range(len(models))]
    speeds = [1.0] * len(models) + spare
    given_ = Cluster(
        tuple(server(f"s{n}", speed=speed) for n, speed in enumerate(speeds)),
        {name: light(row_s) for name, (row_s, _) in zip(names, models, strict=True)},
        {name: rate for name, (_, rate) in zip(names, models, strict=True)},
    )
    found = models_apart(given_)
    assert Counter(part.server for part in found.parts) == dict.fromkeys(
        (one.name for one in given_.servers), 1
    )
    served: dict[str, list[float]] = {}
    for part, costs in found.parts.items():
        served.setdefault(part.model, []).append(1 / costs.work_s / given_.demand[part.model])
    assert set(served) == set(names)
    worst = min(map(sum, served.values()))
    for shares in served.values():  # without its slowest server it would be no better off
        assert sum(shares) - min(shares) <= worst * (1 + 1e-9)


def test_apart_each_model_gets_a_server_that_it_fits() -> None:
    """A large one only the large server, though another would be quicker on it, too."""
    large = replace(server("large"), machine=replace(MACHINE, budget=200 * MB, cores=2))
    many = (replace(linear([2 * MB], [1_500_000], [0.002]), running_bytes=(90 * MB,)),)
    given_ = Cluster(
        (server("a", speed=0.5), large), {"m": many, "l": light(0.1)}, {"m": 1, "l": 9}
    )
    assert set(models_apart(given_).parts) == {Part("l", 0, 1, "a"), Part("m", 0, 1, "large")}


def test_apart_there_must_be_a_server_for_each() -> None:
    two = {"a": light(0.01), "b": light(0.01)}
    with pytest.raises(BudgetError, match="no server is left for 'b' alone"):
        models_apart(Cluster((server("s"),), two, {"a": 1.0, "b": 1.0}))
