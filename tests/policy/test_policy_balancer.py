"""Promise: a request goes where its answer is expected first, if it can be served there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.policy.machine import MB, linear

from lasagna.errors import BudgetError, UsageError
from lasagna.policy.balancer import RULES, Balancer
from lasagna.policy.balancer_events import (
    Asked,
    Dispatch,
    Ended,
    Passed,
    Reject,
    Replaced,
    Reported,
    ServerBack,
    ServerLost,
)
from lasagna.policy.beliefs import Belief, carried_s
from lasagna.policy.cluster import Cluster, Part, Server, is_chain
from lasagna.policy.media import media
from lasagna.policy.paging import Paging
from lasagna.policy.placed import Bound, PartCosts, Placement, connected
from lasagna.policy.stages import Machine

MACHINE = Machine(40 * MB, 1, 1, 3e9, 0.0003)
COSTS = linear([MB] * 4, [100_000] * 4, [0.01] * 4)
WHOLE = PartCosts(0.04, 0.04, 100_000, 4000, 10.0)
HALF = PartCosts(0.02, 0.02, 100_000, 100_000, 10.0)


def cluster(*servers: Server) -> Cluster:
    return Cluster(servers, {"m": (COSTS,)}, {"m": 1.0})


def server(name: str, **facts: float) -> Server:
    return Server(name, MACHINE, **facts)


def placement(parts: dict[Part, PartCosts]) -> Placement:
    bound = Bound(1.0, "by hand")
    return Placement(parts, 1.0, 1.0, {"m": 0.1}, "nothing", bound, bound)


def two_wholes(rule: str = "earliest") -> Balancer:
    parts = {Part("m", 0, 4, name): WHOLE for name in "ab"}
    return Balancer(cluster(server("a"), server("b")), placement(parts), rule)


def routed(balancer: Balancer, request: int, now_s: float = 0.0, draw: float = 0.5) -> Dispatch:
    (command,) = balancer.handle(Asked(now_s, request, "m", draw))
    assert isinstance(command, Dispatch)
    return command


def servers_of(command: Dispatch) -> list[str]:
    return [part.server for part in command.route]


def test_the_idle_server_is_taken_and_then_the_one_that_is_free_first() -> None:
    """Its own requests fill a server's bucket, and time drains it."""
    balancer = two_wholes()
    first, second = routed(balancer, 1), routed(balancer, 2)
    assert {*servers_of(first), *servers_of(second)} == {"a", "b"}
    assert second.expected_s == pytest.approx(first.expected_s)
    third = routed(balancer, 3)
    assert third.expected_s == pytest.approx(first.expected_s + WHOLE.work_s, rel=0.05)
    later = routed(balancer, 4, now_s=10.0)
    assert later.expected_s - 10.0 == pytest.approx(first.expected_s)


def test_flows_become_those_of_the_plan_before_a_server_is_missed_by_another_model() -> None:
    """Model m would be quicker over b, on which alone n lives: the plan leaves that to n."""
    parts = {
        Part("m", 0, 4, "a"): replace(WHOLE, rate=20.0),
        Part("m", 0, 4, "b"): replace(WHOLE, through_s=0.01, work_s=0.02, rate=1.0),
        Part("n", 0, 4, "b"): replace(WHOLE, rate=20.0),
    }
    models = dict.fromkeys("mn", (COSTS,))
    both = Cluster((server("a"), server("b")), models, {"m": 20.0, "n": 20.0})
    balancer = Balancer(both, placement(parts))
    assert servers_of(routed(balancer, 0)) == ["b"]  # nobody needs it yet
    now_s, sent = 0.0, Counter[str]()
    for number in range(1, 400):
        now_s += 1 / 40
        if number % 2:
            balancer.handle(Asked(now_s, number, "n", 0.5))
        else:
            sent[servers_of(routed(balancer, number, now_s))[0]] += 1
    assert sent["b"] <= 0.15 * sent["a"]


def test_a_part_may_use_what_its_server_has_free_and_each_balancer_its_share() -> None:
    """Planned for half of its time, a server takes twice the rate; of four balancers, a quarter."""
    part = Part("m", 0, 4, "a")
    rate = 0.5 / WHOLE.work_s
    for balancers in (1, 4):
        balancer = Balancer(
            cluster(server("a")),
            placement({part: replace(WHOLE, rate=rate)}),
            balancers=balancers,
        )
        routed(balancer, 1)
        assert balancer._shares[part].wait_s(0.0) == pytest.approx(balancers * 0.5 / rate)


def test_of_servers_that_seem_idle_one_gets_it_that_has_none_of_its_requests() -> None:
    """Batches are believed to be full. A lone request takes longer than its share of one."""
    balancer = two_wholes()
    first = servers_of(routed(balancer, 1))
    later_s = 2 * WHOLE.work_s  # by then the bucket is empty, and the answer may be under way
    assert servers_of(routed(balancer, 2, now_s=later_s)) != first
    balancer.handle(Ended(later_s, 2))
    assert servers_of(routed(balancer, 3, now_s=2 * later_s)) != first


def test_a_report_sets_right_what_was_believed() -> None:
    """Others' requests are known by a report only, and what was sent since comes on top."""
    balancer = two_wholes()
    balancer.handle(Reported(0.0, "a", 0.0, backlog_s=5.0))
    assert [servers_of(routed(balancer, n)) for n in range(10)] == [["b"]] * 10
    balancer.handle(Reported(0.2, "a", 0.1, backlog_s=0.0))
    assert servers_of(routed(balancer, 20, now_s=0.2)) == ["a"]


def test_a_server_that_is_slower_than_predicted_gets_less() -> None:
    """Its factor stretches both its work and the way through it."""
    balancer = two_wholes()
    balancer.handle(Reported(0.0, "a", 0.0, backlog_s=0.0, factor=3.0))
    count = Counter(servers_of(routed(balancer, n))[0] for n in range(40))
    assert count["b"] == pytest.approx(30, abs=2)


@given(st.data())
def test_no_other_chain_of_parts_ends_sooner(data: st.DataObject) -> None:
    """The search leaves out what can't be better, and nothing else: whatever is busy, and when."""
    seconds, names = st.floats(0.0, 0.2), ("a", "b", "c")
    spans = data.draw(st.lists(st.sampled_from([(0, 4), (0, 2), (2, 4)]), min_size=3, max_size=9))
    parts = {
        Part("m", first, last, data.draw(st.sampled_from(names))): PartCosts(
            0.01, data.draw(seconds), 100_000, 100_000, 0.0
        )
        for first, last in spans
    }
    balancer = Balancer(cluster(*map(server, names)), placement(parts))
    for belief in balancer.servers.values():
        for bucket in (belief.work, belief.down, belief.up):
            bucket.fill(data.draw(st.floats(0.0, 0.4)), data.draw(seconds))
        belief.factor = data.draw(st.sampled_from([1.0, 0.5, 4.0]))
    for share in balancer._shares.values():
        share.fill(0.0, data.draw(seconds))
    rows = data.draw(st.integers(1, 3))
    asked = Asked(0.1, 1, "m", 0.5, rows)

    def ends_s(chain: tuple[Part, ...]) -> float:
        time_s, before = asked.at_s, None
        for part in chain:
            costs, belief = parts[part], balancer.servers[part.server]
            time_s = carried_s(rows * costs.in_bytes, time_s, before, belief)
            held_s = balancer._shares[part].wait_s(asked.at_s)
            time_s += max(belief.backlog_s(time_s), held_s) + belief.through_s(costs, rows)
            before = belief
        return carried_s(rows * parts[chain[-1]].out_bytes, time_s, before, None)

    pairs = [*((one,) for one in parts), *product(parts, parts)]
    ends = {chain: ends_s(chain) for chain in pairs if is_chain(chain, 4)}
    (command,) = balancer.handle(asked)
    if ends:
        assert isinstance(command, Dispatch)
        assert ends[command.route] == pytest.approx(min(ends.values()))
    else:
        assert isinstance(command, Reject)


def test_a_route_over_two_servers_is_taken_if_it_ends_first() -> None:
    """The dynamic program weighs what carrying costs against a faster pair."""
    parts = {
        Part("m", 0, 4, "a"): WHOLE,
        Part("m", 0, 2, "b"): replace(HALF, through_s=0.005),
        Part("m", 2, 4, "c"): replace(HALF, through_s=0.005),
    }
    for bandwidth, expected in ((125e6, ["b", "c"]), (1.25e6, ["a"])):
        servers = (server("a"), server("b", bandwidth=bandwidth), server("c", bandwidth=bandwidth))
        balancer = Balancer(cluster(*servers), placement(parts))
        assert servers_of(routed(balancer, 1)) == expected


def test_what_would_be_late_is_rejected_with_how_late() -> None:
    """Admission: a deadline that no route meets."""
    balancer = two_wholes()
    (command,) = balancer.handle(Asked(0.0, 1, "m", 0.5, deadline_s=0.01))
    assert isinstance(command, Reject)
    assert command.retry_after_s == pytest.approx(0.031, abs=0.005)
    assert "too late" in command.reason
    (command,) = balancer.handle(Asked(0.0, 2, "x", 0.5))
    assert isinstance(command, Reject)
    assert "'x'" in command.reason


def test_nobody_is_refused_for_the_plans_rates() -> None:
    """Server a is used far beyond its part's rate and has time; b alone would be too late."""
    parts = {
        Part("m", 0, 4, "a"): replace(WHOLE, work_s=0.02, rate=0.5),
        Part("n", 0, 4, "a"): replace(WHOLE, work_s=0.02, rate=49.5),
        Part("m", 0, 4, "b"): replace(WHOLE, through_s=0.8),
    }
    models = dict.fromkeys("mn", (COSTS,))
    both = Cluster((server("a"), server("b")), models, {"m": 0.5, "n": 49.5})
    balancer = Balancer(both, placement(parts))
    assert servers_of(routed(balancer, 0)) == ["a"]
    assert servers_of(routed(balancer, 1, now_s=0.1)) == ["b"], "a is kept for others"
    (command,) = balancer.handle(Asked(0.1, 2, "m", 0.5, deadline_s=0.3))
    assert isinstance(command, Dispatch)
    assert servers_of(command) == ["a"]


def test_requests_of_a_lost_server_begin_anew_elsewhere() -> None:
    """Nothing is lost: what was on it, or on its way, is sent anew; what had left is not."""
    balancer = two_wholes()
    routes = {n: servers_of(routed(balancer, n))[0] for n in range(6)}
    gone = next(n for n, name in routes.items() if name == "a")
    balancer.handle(Ended(0.01, gone))
    commands = balancer.handle(ServerLost(0.02, "a"))
    expected = [n for n, name in routes.items() if name == "a" and n != gone]
    assert [command.request for command in commands] == expected
    assert all(isinstance(c, Dispatch) and servers_of(c) == ["b"] for c in commands)
    assert balancer.servers["a"].outstanding == 0
    assert balancer.servers["b"].outstanding == 5
    balancer.handle(ServerBack(1.0, "a"))
    assert servers_of(routed(balancer, 10, now_s=1.0)) == ["a"]


def test_without_a_chain_a_request_is_rejected() -> None:
    """The only server of a part is lost: no route, and it is said."""
    parts = {Part("m", 0, 2, "a"): HALF, Part("m", 2, 4, "b"): HALF}
    balancer = Balancer(cluster(server("a"), server("b")), placement(parts))
    assert servers_of(routed(balancer, 1)) == ["a", "b"]
    (command,) = balancer.handle(ServerLost(0.0, "b"))
    assert isinstance(command, Reject)
    assert "no servers have all of 'm'" in command.reason


def test_another_placement_is_for_new_requests() -> None:
    """Requests under way keep their routes."""
    balancer = two_wholes()
    old = routed(balancer, 1)
    balancer.handle(Replaced(0.0, placement({Part("m", 0, 4, "b"): WHOLE})))
    assert [servers_of(routed(balancer, n)) for n in (2, 3)] == [["b"], ["b"]]
    (first,) = servers_of(old)
    before = balancer.servers[first].outstanding
    balancer.handle(Passed(0.1, 1, 0))
    assert balancer.servers[first].outstanding == before - 1


def test_servers_and_models_may_come() -> None:
    """What was believed of the others stays."""
    balancer = two_wholes()
    routed(balancer, 1)
    before = balancer.servers["a"]
    joined = Cluster(
        (server("a"), server("c")), {"m": (COSTS,), "n": (COSTS,)}, {"m": 1.0, "n": 1.0}
    )
    parts = {Part("m", 0, 4, "a"): WHOLE, Part("n", 0, 4, "c"): WHOLE}
    balancer.handle(Replaced(0.0, placement(parts), joined))
    (command,) = balancer.handle(Asked(0.0, 2, "n", 0.5))
    assert isinstance(command, Dispatch)
    assert servers_of(command) == ["c"]
    balancer.handle(Reported(0.1, "c", 0.1, 0.5, 1.0))
    assert balancer.servers["c"].backlog_s(0.1) == pytest.approx(0.5)
    assert balancer.servers["a"] is before


@pytest.mark.parametrize("rule", sorted(RULES))
@given(st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=1, max_size=40))
def test_every_rule_gives_whole_chains_and_counts_right(rule: str, draws: list[float]) -> None:
    """Routes go from first slice through last; when all has ended nothing is outstanding."""
    parts = {
        Part("m", 0, 4, "a"): WHOLE,
        Part("m", 0, 2, "b"): HALF,
        Part("m", 2, 4, "c"): HALF,
        Part("m", 2, 4, "a"): HALF,
        Part("m", 1, 4, "c"): HALF,  # nothing leads to it
    }
    balancer = Balancer(cluster(server("a"), server("b"), server("c")), placement(parts), rule)
    for number, draw in enumerate(draws):
        route = routed(balancer, number, draw=draw).route
        assert is_chain(route, 4)
        for hop in range(len(route) - 1):
            balancer.handle(Passed(1.0, number, hop))
    assert sum(belief.outstanding for belief in balancer.servers.values()) == len(draws)
    for number in range(len(draws)):
        balancer.handle(Ended(2.0, number))
    assert all(not belief.outstanding for belief in balancer.servers.values())


def test_baselines_do_what_their_names_say() -> None:
    """Round robin takes turns, least-outstanding the emptiest, two choices one of two drawn."""
    turns = two_wholes("round-robin")
    assert [servers_of(routed(turns, n))[0] for n in range(4)] == ["a", "b", "a", "b"]
    least = two_wholes("least-outstanding")
    routed(least, 1)
    assert servers_of(routed(least, 2)) == ["b"]
    drawn = two_wholes("random")
    assert [servers_of(routed(drawn, n, draw=d))[0] for n, d in ((1, 0.1), (2, 0.9))] == ["a", "b"]
    two = two_wholes("power-of-two")
    assert {servers_of(routed(two, n, draw=0.3))[0] for n in range(2)} == {"a", "b"}
    with pytest.raises(UsageError, match="no rule 'best'"):
        two_wholes("best")


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=30), st.floats(0, 20))
def test_a_belief_is_never_negative_nor_more_than_was_sent(
    sends: list[tuple[float, float]], now_s: float
) -> None:
    """A leaky bucket: between nothing and all that came in."""
    belief = Belief(server("a"))
    for at_s, work_s in sorted(sends):
        belief.send(at_s, work_s)
    total_s = sum(work_s for _, work_s in sends)
    assert 0.0 <= belief.backlog_s(now_s) <= total_s + 1e-9


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 1)), max_size=30),
    st.floats(0, 10),
    st.floats(0, 5),
)
def test_a_report_is_on_top_of_what_comes_in_after_it_was_measured(
    sends: list[tuple[float, float]], measured_s: float, backlog_s: float
) -> None:
    """In the order in which it was sent, as if the balancer had begun with the report."""
    belief, anew = Belief(server("a")), Belief(server("a"))
    anew.work.fill(measured_s, backlog_s)
    for at_s, work_s in sends:
        belief.send(at_s, work_s)
        if at_s > measured_s:
            anew.send(at_s, work_s)
    for _ in range(2):  # the same report again says nothing else
        belief.report(measured_s, backlog_s, 1.0)
        for now_s in (measured_s, 10.0, 20.0):
            assert belief.backlog_s(now_s) == anew.backlog_s(now_s)


def test_media_splits_what_pages_and_keeps_together_what_fits() -> None:
    """Merged while it fits; over slow links paging is cheaper than carrying."""
    paging = {f"s{n}": Paging(42 * MB, 11.5e-6) for n in range(4)}
    small = linear([5 * MB] * 4, [100_000] * 4, [0.01] * 4)
    large = linear([20 * MB] * 4, [100_000] * 4, [0.01] * 4)
    fast = tuple(server(f"s{n}") for n in range(4))
    fits = media(Cluster(fast, {"m": (small,)}, {"m": 1.0}), paging)
    assert {(part.first, part.last) for part in fits.parts} == {(0, 4)}
    assert len(fits.parts) == 1
    again = media(Cluster(fast, {"m": (small,)}, {"m": 1.0}), paging, repeated=True)
    assert len(again.parts) == 4  # a chain for each server
    split = media(Cluster(fast, {"m": (large,)}, {"m": 1.0}), paging)
    assert all(part.last - part.first == 1 for part in split.parts)
    assert connected(split.parts, {"m": 4})["m"]
    slow = tuple(replace(one, bandwidth=12_500.0) for one in fast)
    merged = media(Cluster(slow, {"m": (large,)}, {"m": 1.0}), paging)
    assert {(part.first, part.last) for part in merged.parts} == {(0, 4)}
    with pytest.raises(BudgetError, match="no server left"):
        media(Cluster(fast[:1], {"a": (small,), "b": (small,)}, {"a": 1.0, "b": 1.0}), paging)


def test_of_many_parts_others_are_looked_at_for_each_request() -> None:
    """With 50 idle servers, requests with different draws reach most of them."""
    names = [f"s{number}" for number in range(50)]
    given = cluster(*(server(name) for name in names))
    balancer = Balancer(given, placement({Part("m", 0, 4, name): WHOLE for name in names}))
    used = set()
    for number in range(200):
        event = Asked(1000.0 * number, number, "m", draw=number / 200)
        (command,) = balancer.handle(event)
        assert isinstance(command, Dispatch)
        used.add(command.route[0].server)
        balancer.handle(Ended(1000.0 * number + 1, number))
    assert used <= set(names)
    assert len(used) > 30
