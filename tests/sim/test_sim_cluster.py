"""Promise: every request of a cluster ends once, whatever is lost, and takes what theory says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.cases import MACHINE, MB, cluster, everywhere, load, model, placed, servers

from lasagna.errors import UsageError
from lasagna.policy.balancer_events import Dispatch, Reported
from lasagna.policy.cluster import Cluster, Part, carry_s
from lasagna.policy.events import Answer, Arrived
from lasagna.policy.placed import Placement
from lasagna.policy.plan import Style
from lasagna.policy.state import Settings
from lasagna.sim.arrivals import Arrival, merge
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.metrics import Fate, Requests
from lasagna.sim.options import EnclaveDies, EpcTaken, Options, ServerDies, ServerSlows, Trouble
from lasagna.sim.planner import Planner

PLANNER = Planner()
"""For all tests: their models are few."""
MODELS = {"a": model(4, 0.01), "b": model(6, 0.03, weight=15 * MB)}
THREE = cluster(servers(3), MODELS)
CHAINED = placed(
    THREE,
    [
        Part("a", 0, 2, "s0"),
        Part("a", 2, 4, "s1"),
        Part("a", 0, 4, "s2"),
        Part("b", 0, 3, "s1"),
        Part("b", 0, 3, "s2"),
        Part("b", 3, 6, "s0"),
        Part("b", 3, 6, "s2"),
    ],
)
ROOMY = Settings(queue_rows=100_000)


def simulated(
    described: Cluster, placement: Placement, options: Options | None = None, **facts: Any
) -> VirtualCluster:
    options = options or Options(settings=ROOMY)
    return VirtualCluster(described, placement, options, planner=PLANNER, **facts)


troubles = st.lists(
    st.one_of(
        st.builds(
            ServerDies,
            st.floats(0.0, 3.0),
            st.sampled_from(["s0", "s1", "s2"]),
            st.one_of(st.floats(0.01, 2.0), st.just(float("inf"))),
        ),
        st.builds(
            EnclaveDies, st.floats(0.0, 3.0), st.sampled_from(["s0", "s1", "s2"]), st.just(0.3)
        ),
        st.builds(ServerSlows, st.floats(0.0, 3.0), st.just("s1"), st.floats(0.5, 20.0)),
        st.builds(
            EpcTaken,
            st.floats(0.0, 3.0),
            st.just("s1"),
            st.integers(0, 55 * MB),
            st.floats(0.05, 3.0),
        ),
    ),
    max_size=4,
)


@settings(max_examples=50)
@given(
    st.integers(0, 10**6),
    st.floats(5.0, 200.0),
    troubles,
    st.integers(1, 3),
    st.sampled_from(["earliest", "round-robin", "random", "least-outstanding", "power-of-two"]),
    st.booleans(),
)
def test_every_request_ends_exactly_once(
    seed: int, rate: float, those: list[Trouble], balancers: int, rule: str, admission: bool
) -> None:
    """Conservation: with any rule, any losses and returns, and any number of balancers."""
    options = Options(rule, balancers, ROOMY, admission, detect_s=0.4)
    run = simulated(THREE, CHAINED, options, seed=seed)
    arrivals = load(seed, rate, 2.0, "a", "b", limits_s={"a": 0.2})
    outcome = run.run(arrivals, those)
    figures = outcome.requests.figures()
    assert figures.count == len(arrivals) == len(outcome.requests)
    assert figures.answered + figures.refused + figures.given_up == figures.count
    assert figures.unfinished == 0
    for balancer in run.balancers:
        assert not balancer._routes
        assert not balancer._asked
        assert all(belief.outstanding == 0 for belief in balancer.servers.values())
    if not those and not admission:
        assert figures.answered == figures.count


def test_what_has_not_ended_in_time_is_unfinished() -> None:
    """A horizon cuts a simulation off, and the books still balance."""
    arrivals = load(1, 100.0, 2.0, "a", "b")
    outcome = simulated(THREE, CHAINED).run(iter(arrivals), until_s=1.0)
    figures = outcome.requests.figures()
    assert outcome.seconds == 1.0
    assert figures.unfinished > 0
    assert figures.answered + figures.unfinished == figures.count
    assert figures.count == sum(one.at_s <= 1.0 for one in arrivals)


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_a_single_server_is_the_queue_that_theory_knows(busy: float) -> None:
    """M/D/1: mean wait and utilisation are those of Pollaczek and Khinchine."""
    costs = model(1, 0.01, max_rows=1)
    described = cluster(servers(1, delay_s=0.0, bandwidth=1e15), {"m": costs})
    placement = everywhere(described)
    alone_s = float(simulated(described, placement).run([Arrival(0.0, "m")]).seconds)
    outcome = simulated(described, placement).run(load(7, busy / alone_s, 250.0, "m"))
    waited_s = outcome.requests.figures(since_s=10.0).mean_s - alone_s
    assert outcome.servers["s0"].utilisation == pytest.approx(busy, rel=0.02)
    assert waited_s == pytest.approx(busy * alone_s / (2 * (1 - busy)), rel=0.08)


def test_a_lone_request_takes_what_is_carried_and_computed() -> None:
    """Its latency is the sum of idle links, parts and the way back."""
    those = servers(2, bandwidth=1e6, delay_s=0.005)
    described = cluster(those, {"a": MODELS["a"]})
    placement = placed(described, [Part("a", 0, 2, "s0"), Part("a", 2, 4, "s1")])
    run = simulated(described, placement)
    outcome = run.run([Arrival(0.0, "a", rows=2)])
    sizes = [placement.parts[part].in_bytes for part in sorted(placement.parts)]
    carried = carry_s(2 * sizes[0], None, those[0]) + carry_s(2 * sizes[1], *those)
    carried += carry_s(2 * 4000, those[1], None)
    computed = sum(server.enclave.counters.busy_s for server in run.servers.values())
    assert outcome.requests.latencies_s() == pytest.approx(carried + computed)
    assert outcome.servers["s0"].out_bytes == outcome.servers["s1"].in_bytes == 2 * sizes[1]


def test_a_request_stays_on_a_server_without_using_its_link() -> None:
    """Two parts in a row on one server: nothing goes to the switch and back."""
    described = cluster(servers(1), {"a": MODELS["a"]})
    placement = placed(described, [Part("a", 0, 2, "s0"), Part("a", 2, 4, "s0")])
    outcome = simulated(described, placement).run(load(2, 50.0, 1.0, "a"))
    count = outcome.requests.figures().answered
    assert count == len(load(2, 50.0, 1.0, "a"))
    assert outcome.servers["s0"].in_bytes == count * 100_000
    assert outcome.servers["s0"].out_bytes == count * 4000


def test_a_lost_server_costs_its_requests_time_and_nothing_else() -> None:
    """What was there begins anew once the loss is noticed; then the server is used again."""
    arrivals = load(3, 150.0, 6.0, "a")
    described = cluster(servers(2), {"a": MODELS["a"]})
    sent: list[tuple[float, str]] = []

    def hear(name: str, event: object, _: Sequence[object]) -> None:
        if isinstance(event, Arrived):
            sent.append((event.at_s, name))

    run = simulated(
        described, everywhere(described), Options(settings=ROOMY, detect_s=0.5), heard=hear
    )
    outcome = run.run(arrivals, [ServerDies(2.0, "s0", back_after_s=1.0)])
    assert outcome.requests.figures().answered == len(arrivals)
    assert outcome.requests.latencies_s().max() > 0.5
    assert not [at_s for at_s, name in sent if name == "s0" and 2.0 < at_s < 3.0]
    assert [at_s for at_s, name in sent if name == "s0" and at_s > 3.0]


def test_a_lost_enclave_keeps_its_queue() -> None:
    """The host lives: its scheduler begins anew with the next enclave, and nobody is told."""
    described = cluster(servers(1), {"a": MODELS["a"]})
    arrivals = load(4, 20.0, 4.0, "a")
    outcome = simulated(described, everywhere(described)).run(
        arrivals, [EnclaveDies(1.0, "s0", 0.7)]
    )
    assert outcome.requests.figures().answered == len(arrivals)
    assert 0.7 < outcome.requests.latencies_s().max() < 1.5


def test_a_server_that_slows_down_is_reported_and_gets_less() -> None:
    """Reports of measured over predicted times reach the balancer, whose routes follow."""
    described = cluster(servers(2), {"a": MODELS["a"]})
    arrivals = load(5, 60.0, 20.0, "a")
    counts = {}
    for factor in (1.0, 4.0):
        run = simulated(described, everywhere(described))
        outcome = run.run(arrivals, [ServerSlows(0.0, "s1", factor)])
        assert outcome.requests.figures().answered == len(arrivals)
        counts[factor] = [outcome.servers[name].tasks for name in ("s0", "s1")]
        belief = run.balancers[0].servers["s1"]
        assert belief.factor == pytest.approx(factor, rel=0.1)
    assert counts[1.0][1] > 0.3 * sum(counts[1.0])
    assert counts[4.0][1] < 0.25 * sum(counts[4.0])


def test_balancers_share_the_requests_and_learn_of_each_other_by_reports_only() -> None:
    """A balancer of several believes less of a server than is there, until the next report."""
    routed: Counter[str] = Counter()
    described = cluster(servers(2), {"a": MODELS["a"]})
    late: list[float] = []

    def hear(name: str, event: object, commands: Sequence[object]) -> None:
        routed.update(name for one in commands if isinstance(one, Dispatch))
        if isinstance(event, Reported):
            late.append(event.at_s - event.measured_s)

    arrivals = load(6, 100.0, 20.0, "a")
    options = Options(balancers=4, settings=ROOMY, report_s=0.25)
    run = simulated(described, everywhere(described), options, heard=hear)
    run.run(arrivals)
    assert sum(routed.values()) == len(arrivals)
    assert all(count == pytest.approx(len(arrivals) / 4, rel=0.1) for count in routed.values())
    assert late == pytest.approx([0.0002] * len(late))
    assert len(late) == pytest.approx(4 * 2 * 20 / 0.25, rel=0.05)


def test_stale_knowledge_costs_latency() -> None:
    """Eight balancers that hear of servers once in two seconds do worse than one that knows all."""
    described = cluster(servers(4), {"a": model(4, 0.02, max_rows=1)})
    arrivals = load(8, 160.0, 30.0, "a")

    def mean_s(balancers: int, report_s: float) -> float:
        options = Options(balancers=balancers, settings=ROOMY, report_s=report_s)
        run = simulated(described, everywhere(described), options)
        return run.run(arrivals).requests.figures().mean_s

    assert mean_s(8, 2.0) > 1.15 * mean_s(1, 0.05)


def test_limits_are_kept_by_refusing_in_time() -> None:
    """Overloaded, with admission most of what is answered is in time; without, hardly anything."""
    described = cluster(servers(1), {"a": model(4, 0.05, max_rows=1)})
    arrivals = load(9, 40.0, 20.0, "a", limits_s={"a": 0.3})
    outcomes = {}
    for admission in (True, False):
        run = simulated(
            described, everywhere(described), Options(settings=ROOMY, admission=admission)
        )
        outcomes[admission] = run.run(arrivals).requests.figures()
    assert outcomes[True].refused > 0.3 * len(arrivals)
    assert outcomes[True].late < 0.02 * outcomes[True].answered
    assert outcomes[True].goodput > 10 * outcomes[False].goodput
    assert outcomes[False].refused == 0


def test_a_full_queue_refuses_and_the_balancer_forgets() -> None:
    """A server's refusal ends the request."""
    described = cluster(servers(1), {"a": MODELS["a"]})
    run = simulated(described, everywhere(described), Options(settings=Settings(queue_rows=2)))
    outcome = run.run([Arrival(0.0, "a")] * 40)
    figures = outcome.requests.figures()
    assert figures.refused > 0
    assert figures.refused + figures.answered == 40
    assert not run.balancers[0]._routes


def test_no_servers_for_a_model_is_a_rejection() -> None:
    """Nobody waits for what can't come."""
    run = simulated(THREE, CHAINED)
    outcome = run.run([Arrival(2.0, "b")], [ServerDies(0.0, "s2"), ServerDies(0.0, "s1")])
    assert outcome.requests._fates[0] == Fate.REJECTED


def test_no_requests_take_no_time() -> None:
    """Servers would report for ever."""
    assert VirtualCluster(THREE, CHAINED, Options(settings=ROOMY)).run([]).seconds == 0.0


def test_noise_changes_times_and_loses_nothing() -> None:
    """Noise comes from the seed: the same seed gives the same latencies."""
    arrivals = load(10, 50.0, 3.0, "a", "b")

    def latencies(seed: int) -> list[float]:
        run = simulated(THREE, CHAINED, Options(settings=ROOMY, noise=0.2), seed=seed)
        return list(run.run(arrivals).requests.latencies_s())

    assert latencies(1) == latencies(1) != latencies(2)
    assert len(latencies(1)) == len(arrivals)


def test_faster_servers_compute_faster() -> None:
    """Speed is in the parts' costs, so in the plans and the times alike."""
    fast = replace(THREE.servers[0], name="fast", speed=2.0)
    seconds = []
    for server in (THREE.servers[0], fast):
        described = cluster((server,), {"a": model(1, 0.1)})
        seconds.append(simulated(described, everywhere(described)).run([Arrival(0.0, "a")]).seconds)
    assert seconds[0] - seconds[1] == pytest.approx(0.05)


def test_plans_are_worked_out_once_for_servers_of_a_kind() -> None:
    """Planning takes long, and equal servers get equal plans."""
    planner = Planner()
    described = cluster(servers(5), MODELS)
    VirtualCluster(described, everywhere(described), planner=planner).run([Arrival(0.0, "a")])
    assert planner.worked_out == 1
    slower = cluster(servers(5, replace(MACHINE, budget=50 * MB)), MODELS)
    VirtualCluster(slower, everywhere(slower), planner=planner).run([Arrival(0.0, "a")])
    assert planner.worked_out == 2


def test_a_cluster_needs_a_balancer() -> None:
    """Wrong options are told, not met later."""
    with pytest.raises(UsageError, match="needs a balancer"):
        simulated(THREE, CHAINED, Options(balancers=0))
    with pytest.raises(UsageError, match="must be above 0"):
        simulated(THREE, CHAINED, Options(report_s=0.0))
    with pytest.raises(UsageError, match="no rule"):
        simulated(THREE, CHAINED, Options("luck"))


def test_figures_are_of_what_ended() -> None:
    """Percentiles, goodput and counts from the arrays are those of the latencies."""
    outcome = simulated(THREE, CHAINED).run(load(11, 100.0, 5.0, "a", "b", limits_s={"a": 0.04}))
    figures = outcome.figures(since_s=1.0)
    assert sorted(figures) == ["a", "b"]
    latencies = outcome.requests.latencies_s("a", since_s=1.0)
    assert figures["a"].answered == len(latencies)
    assert figures["a"].late == int((latencies > 0.04).sum()) > 0
    assert figures["a"].p95_s == float(np.quantile(latencies, 0.95))
    assert figures["a"].goodput < figures["a"].throughput
    assert np.isnan(outcome.requests.figures("nobody").mean_s)
    server = outcome.servers["s2"]
    assert 0 < server.utilisation < 1
    assert 0 < server.in_share < 1
    assert server.loads_per_task > 0


def test_rates_of_a_model_end_with_its_own_requests() -> None:
    """Another one may be overloaded until the simulation is over; who is himself has that time."""
    ended = Requests()
    for second in range(10):
        ended.end("a", Fate.ANSWERED, second + 0.5, second + 1.0)
        ended.end("b", Fate.LATE, second + 0.5, second + 1.0)
    ended.end("b", Fate.UNFINISHED, 9.5, 100.0)
    assert ended.figures("a").throughput == ended.figures("a").goodput == 1.0
    assert ended.figures("a", since_s=5.0).throughput == 1.0
    assert ended.figures("b").throughput == 0.1
    assert ended.figures().throughput == 0.2
    assert ended.figures("nobody").throughput == 0.0


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.integers(1, 5), st.integers(0, 1000))
def test_tenants_of_a_saturated_cluster_get_their_shares(weight: int, seed: int) -> None:
    """Each server is fair, so the cluster is: within ten percent of the ratio of the weights."""
    whose: dict[tuple[str, int], str] = {}
    answered: Counter[str] = Counter()

    def hear(name: str, event: Any, commands: Sequence[Any]) -> None:
        if isinstance(event, Arrived):
            whose[name, event.request] = event.tenant
        for command in commands:
            if isinstance(command, Answer) and event.at_s > 4.0:  # by then queues have formed
                answered[whose[name, command.request]] += 1

    options = Options(settings=replace(ROOMY, weights={"much": float(weight), "little": 1.0}))
    run = simulated(THREE, everywhere(THREE), options, heard=hear)
    both = [
        load(seed + number, 400.0, 14.0, "a", "b", tenant=name)
        for number, name in enumerate(("much", "little"))
    ]
    run.run(merge(*both), until_s=14.0)
    assert answered["much"] / answered["little"] == pytest.approx(weight, rel=0.1)


def test_overload_with_deadlines_answers_in_time_what_is_admitted() -> None:
    """Streamed weights make large batches efficient, but they take longer than requests may."""
    big = model(10, 0.02, weight=20 * MB)  # its weights take 59 ms to load, the EPC has room for 60
    one = cluster(servers(1), {"m": big})
    limit_s = {"m": 0.4}
    good = {}
    for name, style in (("batches", Style()), ("each alone", Style(max_rows=1, pin=False))):
        options = Options(settings=replace(ROOMY, style=style), admission=True)
        run = simulated(one, everywhere(one), options)
        figures = run.run(load(5, 60.0, 30.0, "m", limits_s=limit_s)).requests.figures()
        assert figures.refused > 0
        assert figures.late <= 0.03 * figures.answered
        good[name] = figures.goodput
    assert good["batches"] > 1.3 * good["each alone"]
