"""Promise: when servers change, models move to others while requests go on; or nothing moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.cases import MACHINE, MB, cluster, everywhere, load, model, placed, servers

from lasagna.policy.balancer_events import Ended, Replaced
from lasagna.policy.cluster import Part
from lasagna.policy.placement import PlanOptions
from lasagna.policy.program import NEVER, Ends, Program, Solved
from lasagna.policy.state import Settings
from lasagna.sim.arrivals import merge
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.metrics import Outcome
from lasagna.sim.options import EpcTaken, Options, ServerDies, ServerSlows, Trouble
from lasagna.sim.planner import Planner
from lasagna.sim.replacing import Replanning

PLANNER = Planner()
MODELS = {"a": model(4, 0.01), "b": model(6, 0.03, weight=5 * MB)}
THREE = cluster(servers(3), MODELS, rate=10.0)
APART = placed(THREE, [Part("a", 0, 4, "s0"), Part("b", 0, 6, "s1")])
HOW = Replanning(after_s=0.5, options=PlanOptions(time_limit_s=1.0))
OPTIONS = Options(settings=Settings(queue_rows=100_000), detect_s=0.2, replanning=HOW)


def simulated(
    troubles: Sequence[Trouble], options: Options = OPTIONS, seed: int = 1, **facts: Any
) -> tuple[VirtualCluster, Outcome]:
    run = VirtualCluster(THREE, APART, options, planner=PLANNER, **facts)
    return run, run.run(load(seed, 20.0, 12.0, "a", "b"), troubles)


def test_what_a_lost_server_had_is_served_by_another() -> None:
    """Without another placement all requests for its model are rejected from then on."""
    lost = [ServerDies(2.0, "s0")]
    _, before = simulated(lost, replace(OPTIONS, replanning=None))
    run, after = simulated(lost)
    assert before.figures()["a"].refused > 80
    assert after.figures()["a"].refused < 20
    assert after.figures()["b"].answered == before.figures()["b"].answered
    assert after.moves.applied == 1
    assert after.moves.moved_bytes >= MODELS["a"].weight_bytes
    placement = run.balancers[0].placement
    assert {part.server for part in placement.parts} <= {"s1", "s2"}
    assert {part.model for part in placement.parts} == {"a", "b"}


def test_a_server_that_returns_is_used_again() -> None:
    """It comes back with nothing, and gets parts if that is worth it."""
    troubles = [ServerDies(1.0, "s0", 3.0), ServerDies(1.5, "s2"), ServerDies(6.0, "s1")]
    run, outcome = simulated(troubles)
    assert {part.server for part in run.balancers[0].placement.parts} == {"s0"}
    assert outcome.requests.figures().unfinished == 0
    assert outcome.moves.applied >= 2


def test_a_server_that_slows_down_is_planned_for_anew() -> None:
    """It is noticed by its reports, and another server takes its work."""
    run, outcome = simulated([ServerSlows(1.0, "s1", 4.0)])
    assert outcome.moves.looked >= 1
    assert outcome.requests.figures().answered == outcome.requests.figures().count
    assert "s2" in {part.server for part in run.balancers[0].placement.parts}


def test_the_slowness_that_was_planned_with_counts_once() -> None:
    """A plan for a slow server has its times at full speed: balancers know how slow it is."""
    run, outcome = simulated([ServerSlows(1.0, "s1", 4.0), ServerDies(4.0, "s0")])
    assert outcome.moves.applied >= 1
    balancer = run.balancers[0]
    assert balancer.servers["s1"].factor == pytest.approx(4.0, rel=0.1)
    parts = {part: one for part, one in balancer.placement.parts.items() if part.server == "s1"}
    assert parts
    for part, costs in parts.items():
        slices = MODELS[part.model].slices[part.first : part.last]
        alone_s = sum(one.compute_at(1) for one in slices)
        assert costs.through_s == pytest.approx(alone_s, rel=0.3)


def test_late_answers_are_better_than_none() -> None:
    """A limit that no plan keeps is no reason to leave a model without a place."""
    given = replace(THREE, limits_s={"a": 1e-4})
    run = VirtualCluster(given, APART, OPTIONS, planner=PLANNER)
    outcome = run.run(load(1, 20.0, 12.0, "a", "b"), [ServerDies(2.0, "s0")])
    assert outcome.moves.applied == 1
    assert outcome.figures()["a"].refused < 20


def test_a_lost_server_that_also_loses_memory_stops_no_move() -> None:
    """Another server was about to get its model, and gets it still."""
    slow = replace(THREE, servers=servers(3, bandwidth=3e6))
    run = VirtualCluster(slow, APART, OPTIONS, planner=PLANNER)
    outcome = run.run(
        load(1, 3.0, 40.0, "a", "b"), [ServerDies(2.0, "s1"), EpcTaken(4.0, "s1", 50 * MB, 1.0)]
    )
    assert outcome.moves.looked >= 2
    assert {part.model for part in run.balancers[0].placement.parts} == {"a", "b"}
    assert outcome.requests.figures(since_s=30.0).refused == 0


def test_no_plan_depends_on_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer programs end after so many nodes, never by the clock."""
    seen: list[Ends] = []
    solve = Program.solve

    def watched(self: Program, *, ends: Ends = NEVER, **facts: Any) -> Solved | None:
        seen.append(ends)
        return solve(self, ends=ends, **facts)

    monkeypatch.setattr(Program, "solve", watched)
    simulated([ServerDies(2.0, "s0")])
    assert len(seen) > 2
    assert {one.after_s for one in seen} == {NEVER.after_s}


def test_a_server_with_less_epc_is_planned_for_anew() -> None:
    """Where streaming takes longer than computing, the model goes to a server that can pin it."""
    models = {"a": MODELS["a"], "b": model(6, 0.03, weight=5 * MB, max_rows=2)}
    slow = cluster(servers(3, replace(MACHINE, load_rate=1e8)), models, rate=10.0)
    run = VirtualCluster(slow, APART, OPTIONS, planner=PLANNER)
    outcome = run.run(load(1, 20.0, 12.0, "a", "b"), [EpcTaken(2.0, "s1", 40 * MB, 0.5)])
    assert outcome.moves.applied >= 1
    assert outcome.requests.figures().refused < 20  # while nobody serves the model
    assert "s2" in {part.server for part in run.balancers[0].placement.parts}


def test_what_does_not_fit_any_more_is_served_by_another() -> None:
    """Its memory is too small for one slice: without another placement its model is gone."""
    taken = [EpcTaken(2.0, "s1", 58 * MB, 0.5)]
    _, before = simulated(taken, replace(OPTIONS, replanning=None))
    run, after = simulated(taken)
    assert before.figures()["b"].refused > 80
    assert after.figures()["b"].refused < 20
    assert after.figures()["a"].answered == before.figures()["a"].answered
    assert not run.balancers[0].placement.on("s1")


def test_without_a_change_nothing_is_looked_for() -> None:
    _, outcome = simulated([])
    assert outcome.moves.looked == 0
    assert outcome.moves.moved_bytes == 0


def test_requests_go_on_while_parts_move() -> None:
    """From the first step to the last there is no second in which nothing is answered."""
    steps: list[float] = []
    ends: list[float] = []

    def hear(_: str, event: object, __: Sequence[object]) -> None:
        if isinstance(event, Replaced):
            steps.append(event.at_s)
        elif isinstance(event, Ended):
            ends.append(event.at_s)

    simulated([ServerDies(2.0, "s0")], heard=hear)
    assert len(steps) >= 2
    during = [end for end in ends if steps[0] <= end <= steps[-1] + 1.0]
    gaps = [b - a for a, b in zip([steps[0], *during], [*during, steps[-1] + 1.0], strict=True)]
    assert max(gaps) < 1.0


def test_the_same_seed_gives_the_same_placements() -> None:
    found = []
    for _ in range(2):
        run, outcome = simulated([ServerDies(2.0, "s0", 4.0), ServerSlows(1.0, "s1", 3.0)])
        latencies = outcome.requests.latencies_s().tolist()
        found.append((run.balancers[0].placement.parts, outcome.moves, latencies))
    assert found[0] == found[1]


changes = st.one_of(
    st.builds(
        ServerDies,
        st.floats(0.5, 8.0),
        st.sampled_from(["s0", "s1", "s2"]),
        st.one_of(st.floats(0.1, 3.0), st.just(float("inf"))),
    ),
    st.builds(ServerSlows, st.floats(0.5, 8.0), st.just("s1"), st.floats(0.5, 8.0)),
    st.builds(
        EpcTaken,
        st.floats(0.5, 8.0),
        st.sampled_from(["s0", "s1"]),
        st.integers(0, 59 * MB),
        st.floats(0.1, 3.0),
    ),
)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.lists(changes, max_size=3))
def test_every_request_ends_once_whatever_changes(seed: int, troubles: list[Trouble]) -> None:
    _, outcome = simulated(troubles, seed=seed)
    figures = outcome.requests.figures()
    assert figures.count == len(load(seed, 20.0, 12.0, "a", "b"))
    assert figures.unfinished == 0


def test_a_part_that_is_given_up_while_its_server_starts_may_come_back() -> None:
    """The new enclave has been told of the part already, and forgets it before it gets it again."""
    run = VirtualCluster(THREE, APART, OPTIONS, planner=PLANNER)
    server, part = run.servers["s0"], Part("a", 0, 4, "s0")
    forms = server.models[part.key]
    server.lose()
    server.return_after(1.0)
    run.clock.at(1.0, lambda _: server.forget(part.key))  # after its start, before it is open
    run.clock.at(2.0, lambda _: server.add(part.key, forms))
    run.clock.run(until_s=4.0)
    assert server.alive
    plan = server.enclave.scheduler.plan
    assert plan is not None
    assert set(plan.costs) == {part.key}


def test_a_part_without_room_is_not_added() -> None:
    """Others may have taken memory since it was planned."""
    run = VirtualCluster(THREE, APART, OPTIONS, planner=PLANNER)
    server, forms = run.servers["s2"], run.servers["s1"].models["b[0:6]"]
    server.take_epc(MACHINE.budget - 2 * MB, 0.1)
    assert not server.add("b[0:6]", forms)
    assert not server.models
    server.take_epc(0, 0.1)
    assert server.add("b[0:6]", forms)


def test_a_part_is_not_added_that_needs_another_way_to_share_the_work() -> None:
    """Each of four threads has a batch, and no room for one of the new part's."""
    lanes = replace(MACHINE, lanes=4, cores=4, budget=20 * MB)
    described = cluster(servers(1, lanes), {"a": model(4, 0.02)})
    run = VirtualCluster(described, everywhere(described), Options())
    server, wide = run.servers["s0"], (replace(model(4, 0.02), running_bytes=(8 * MB,) * 4),)
    run.clock.run(until_s=1.0)
    assert not server.add("b[0:4]", wide)
    assert set(server.models) == {"a[0:4]"}
    server.take_epc(0, 0.1)  # its next enclave may take another shape
    assert server.add("b[0:4]", wide)


def test_an_enclave_that_does_not_run_does_not_die() -> None:
    """A server without parts has none; when it gets a part later, that is served."""
    run = VirtualCluster(THREE, APART, OPTIONS, planner=PLANNER)
    server, part = run.servers["s2"], Part("a", 0, 4, "s2")
    server.die(1.0)
    run.clock.at(0.5, lambda _: server.add(part.key, run.servers["s0"].models["a[0:4]"]))
    run.clock.run(until_s=3.0)
    assert set(server.models) == {part.key}
    assert server.enclave.scheduler.plan is not None


def test_a_change_in_the_middle_of_moves_begins_them_anew() -> None:
    """Over slow links a move lasts; a server that returns meanwhile is planned for at once."""
    slow = replace(THREE, servers=servers(3, bandwidth=3e6))
    options = replace(OPTIONS, replanning=replace(HOW, after_s=0.2))
    run = VirtualCluster(slow, APART, options, planner=PLANNER)
    outcome = run.run(
        load(1, 3.0, 40.0, "a", "b"), [ServerDies(2.0, "s1", 4.0), ServerDies(30.0, "s2")]
    )
    assert outcome.moves.looked >= 3
    assert outcome.requests.figures().unfinished == 0
    assert {part.model for part in run.balancers[0].placement.parts} == {"a", "b"}


def test_what_a_server_has_on_disk_is_not_carried_again() -> None:
    """A server that comes back needs its memory filled, not its link."""
    troubles = [ServerDies(1.0, "s0", 3.0), ServerDies(1.5, "s2"), ServerDies(6.0, "s1")]
    _, outcome = simulated(troubles)
    sizes = [MODELS[name].weight_bytes for name in "ab"]
    assert outcome.moves.applied >= 2
    assert outcome.moves.moved_bytes < 2 * sum(sizes)


def test_a_model_that_is_asked_for_all_at_once_gets_a_place() -> None:
    """Nobody planned for it; its first requests are rejected, and after some seconds none is."""
    given = replace(THREE, demand={"a": 10.0, "b": 0.0})
    only_a = placed(THREE, [Part("a", 0, 4, f"s{n}") for n in range(3)])
    options = replace(OPTIONS, replanning=replace(HOW, mix_s=2.0))
    run = VirtualCluster(given, only_a, options, planner=PLANNER)
    early = [one for one in load(1, 20.0, 30.0, "a", "b") if one.at_s > 5.0 or one.model == "a"]
    outcome = run.run(early)
    assert outcome.moves.looked >= 1
    assert {part.model for part in run.balancers[0].placement.parts} == {"a", "b"}
    refused = outcome.requests.figures("b")
    assert 0 < refused.refused < refused.count / 3
    assert outcome.requests.figures("b", since_s=15.0).refused == 0


def test_a_model_without_a_place_gets_one_however_few_ask_for_it() -> None:
    """A twentieth is no other mix, but without a place all of it would be rejected for ever."""
    given = replace(THREE, demand={"a": 20.0, "b": 0.0})
    only_a = placed(THREE, [Part("a", 0, 4, f"s{n}") for n in range(3)])
    run = VirtualCluster(given, only_a, replace(OPTIONS, replanning=replace(HOW, mix_s=2.0)))
    few = [one for n, one in enumerate(load(1, 2.0, 30.0, "b")) if one.at_s > 5.0 and n % 2]
    outcome = run.run(merge(load(2, 20.0, 30.0, "a"), few))
    assert outcome.moves.applied == 1
    assert outcome.requests.figures("b", since_s=15.0).refused == 0
    assert outcome.requests.figures("b", since_s=15.0).answered > 5
    assert outcome.requests.figures("a").refused == 0


def test_a_model_that_nobody_asks_for_leaves_where_there_is_no_room_for_both() -> None:
    """One has activations, the other weights, that take most of the memory; then the reverse."""
    wide = replace(model(4, 0.01), running_bytes=(40 * MB,) * 4)
    one = cluster(servers(1), {"a": wide, "b": model(2, 0.01, weight=40 * MB)})
    only_a = placed(one, [Part("a", 0, 4, "s0")])
    options = replace(OPTIONS, replanning=replace(HOW, mix_s=2.0))
    run = VirtualCluster(replace(one, demand={"a": 20.0, "b": 0.0}), only_a, options)
    turns = [x for x in load(1, 40.0, 60.0, "a", "b") if (x.model == "b") == (10 < x.at_s < 35)]
    outcome = run.run(turns)
    assert outcome.moves.applied == 2
    assert {part.model for part in run.balancers[0].placement.parts} == {"a"}
    assert outcome.requests.figures("b").answered > 200
    assert outcome.requests.figures("b", since_s=22.0).refused == 0
    assert outcome.requests.figures("a", since_s=47.0).refused == 0


def test_a_server_that_joins_gets_parts_and_requests() -> None:
    """It is not there at first, and is worth its moves: the load is more than the others carry."""
    given = replace(THREE, demand={"a": 50.0, "b": 50.0})
    troubles = [ServerDies(0.0, "s2", 4.0)]
    run = VirtualCluster(given, APART, OPTIONS, planner=PLANNER)
    outcome = run.run(load(1, 80.0, 20.0, "a", "b"), troubles)
    assert run.balancers[0].placement.on("s2")
    assert outcome.servers["s2"].runs > 100
    assert outcome.requests.figures().answered == outcome.requests.figures().count


def test_the_mix_that_was_planned_for_moves_nothing() -> None:
    """And a model that nobody has asked for in a while keeps its place."""
    run = VirtualCluster(THREE, APART, replace(OPTIONS, replanning=replace(HOW, mix_s=2.0)))
    outcome = run.run(load(3, 40.0, 12.0, "a", "b"))
    assert outcome.moves.looked == 0
    hot = VirtualCluster(THREE, APART, replace(OPTIONS, replanning=replace(HOW, mix_s=2.0)))
    hot.run(load(3, 40.0, 12.0, "b"))
    assert {part.model for part in hot.balancers[0].placement.parts} == {"a", "b"}
