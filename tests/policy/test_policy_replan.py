"""Promise: a change is answered by a plan that moves little, or by none, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.policy.machine import MB, linear

from lasagna.policy.cluster import Cluster, Part, Server, part_of
from lasagna.policy.memory import require_fits
from lasagna.policy.placed import connected
from lasagna.policy.placement import PlanOptions, plan_cluster
from lasagna.policy.promise import lengths_of
from lasagna.policy.replan import Step, kept, replan, steps
from lasagna.policy.stages import Machine

MACHINE = Machine(40 * MB, 1, 1, 3e9, 0.0003)
MODEL = linear([9 * MB] * 4, [200_000] * 4, [0.004] * 4)
OTHER = linear([5 * MB] * 2, [100_000] * 2, [0.01] * 2)
QUICK = PlanOptions(time_limit_s=1.0)


def server(name: str, budget: int = 40 * MB, **facts: float) -> Server:
    return Server(name, replace(MACHINE, budget=budget), **facts)


def cluster(*servers: Server, rate: float = 40.0) -> Cluster:
    models = {"m": (MODEL,), "o": (OTHER,)}
    return Cluster(servers, models, {"m": rate, "o": rate / 4})


def require_room(given: Cluster, parts: set[Part]) -> None:
    for one in given.servers:
        forms = {
            part.key: part_of(given.models[part.model], part.first, part.last)
            for part in parts
            if part.server == one.name
        }
        if forms:
            require_fits(forms, one.machine)


def test_where_nothing_has_changed_nothing_is_moved() -> None:
    """Moves have a price: the present placement is as good as another one of its kind."""
    given = cluster(*(server(name) for name in "abc"))
    present = plan_cluster(given, QUICK)
    found = replan(given, present.parts, QUICK)
    assert found.present is not None
    assert found.present.scale >= 0.98 * present.scale
    assert not found.worth_it or found.moved_bytes == 0


def test_a_lost_server_is_replaced_from_what_is_left() -> None:
    """A model without a chain is placed anew whatever that costs; the lost server gets nothing."""
    split = [Part("m", 0, 2, "a"), Part("m", 2, 4, "b"), Part("o", 0, 2, "c")]
    less = cluster(server("a"), server("c"))
    found = replan(less, split, QUICK)
    assert found.present is None
    assert found.worth_it
    assert all(connected(found.best.parts, lengths_of(less)).values())
    assert {part.server for part in found.best.parts} <= {"a", "c"}


def test_more_is_planned_for_where_latency_is_what_the_first_plan_was_for() -> None:
    """A plan for latency serves the demand and no more: it would never be better than what is."""
    given = cluster(server("a"), server("b"), rate=80.0)
    parts = [Part("m", 0, 4, "a"), Part("o", 0, 2, "a")]
    found = replan(given, parts, PlanOptions("latency", QUICK.time_limit_s))
    assert found.best.scale > 1.0
    assert found.worth_it


def test_what_is_left_after_memory_is_lost_is_reckoned_anew() -> None:
    """With less EPC the same parts stream instead of staying, and carry less."""
    given = cluster(server("a", 80 * MB), server("b", 80 * MB))
    parts = [Part("m", 0, 4, "a"), Part("m", 0, 4, "b"), Part("o", 0, 2, "b")]
    _, before = kept(given, parts)
    _, after = kept(cluster(server("a", 25 * MB), server("b", 25 * MB)), parts)
    assert before is not None
    assert after is not None
    assert after.scale < before.scale
    assert set(after.parts) <= set(parts)


def test_a_new_server_is_used_if_it_will_be_there_for_long_enough() -> None:
    """The same gain is worth its moves over ten minutes, and not over a fraction of a second."""
    parts = [Part("m", 0, 4, "a"), Part("o", 0, 2, "a")]
    more = cluster(server("a"), server("b", speed=2.0), rate=80.0)
    found = replan(more, parts, QUICK)
    assert found.worth_it
    assert found.moved_bytes > 0
    assert any(part.server == "b" for part in found.best.parts)
    assert found.gain > found.cost
    short = replan(more, parts, QUICK, horizon_s=0.001)
    assert not short.worth_it or short.moved_bytes == 0


def test_each_step_leaves_every_model_served_where_memory_allows_it() -> None:
    """New parts come before old ones go; a server that is full gives up what is not needed."""
    given = cluster(server("a"), server("b"), server("c"))
    present = [Part("m", 0, 4, "a"), Part("o", 0, 2, "b")]
    wanted = [Part("m", 0, 2, "b"), Part("m", 2, 4, "c"), Part("o", 0, 2, "a")]
    now = set(present)
    for step in steps(given, present, wanted):
        now = now | {step.part} if step.add else now - {step.part}
        require_room(given, now)
        assert all(connected(now, lengths_of(given)).values()), step
    assert now == set(wanted)


def test_steps_between_equal_placements_are_none() -> None:
    """And a part that is only given up is one step."""
    given = cluster(server("a"), server("b"))
    parts = [Part("m", 0, 4, "a"), Part("m", 0, 4, "b"), Part("o", 0, 2, "b")]
    assert steps(given, parts, parts) == []
    assert steps(given, parts, parts[1:]) == [Step(parts[0], add=False)]


def test_what_restores_service_comes_first() -> None:
    """Of models that nobody serves the smaller one, then what only makes others faster."""
    given = cluster(server("a"), server("b"), server("c", 80 * MB))
    present = [Part("m", 0, 2, "a")]
    wanted = [*present, Part("m", 0, 4, "c"), Part("o", 0, 2, "b"), Part("m", 2, 4, "b")]
    order = [step.part for step in steps(given, present, wanted) if step.add]
    assert order[0] == Part("o", 0, 2, "b")
    assert set(order[1:]) == {Part("m", 0, 4, "c"), Part("m", 2, 4, "b")}


def test_what_lies_on_a_servers_disk_need_not_be_carried() -> None:
    """The same plan moves fewer bytes, and none that the server has kept."""
    given = cluster(server("a"), server("b"))
    parts = [Part("m", 0, 4, "a"), Part("o", 0, 2, "a")]
    plain = replan(given, parts, QUICK)
    assert plain.moved_bytes > 0
    every = {("m", n) for n in range(4)} | {("o", n) for n in range(2)}
    kept_all = replan(given, parts, QUICK, stored={"a": every, "b": every})
    assert kept_all.moved_bytes == 0
    assert kept_all.gain > plain.gain  # it is there sooner


@pytest.mark.parametrize("gone", ["m", "o"])
def test_parts_of_a_model_that_is_no_longer_asked_for_do_not_count(gone: str) -> None:
    """A model that was unloaded leaves its memory to the others."""
    given = cluster(server("a"), server("b"))
    present = plan_cluster(given, QUICK)
    rest = replace(given, demand={**given.demand, gone: 0.0})
    found = replan(rest, present.parts, QUICK)
    assert all(part.model != gone for part in found.best.parts)
