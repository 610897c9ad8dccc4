"""Promise: idle links take what planners reckon with; busy ones carry in order, at their rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.cases import MACHINE

from lasagna.policy.cluster import Server, carry_s
from lasagna.sim.clock import Clock
from lasagna.sim.network import Network

FAST = Server("fast", MACHINE, bandwidth=100e6, delay_s=0.001)
SLOW = Server("slow", MACHINE, bandwidth=1e6, delay_s=0.02)
ENDS: list[Server | None] = [FAST, SLOW, None]
sizes = st.integers(0, 10**7)


def name(server: Server | None) -> str | None:
    return None if server is None else server.name


@given(sizes, st.sampled_from(ENDS), st.sampled_from(ENDS))
def test_an_idle_network_takes_what_is_reckoned(
    size: int, sender: Server | None, receiver: Server | None
) -> None:
    """The same as ``carry_s``, which the balancer and the placement use."""
    clock, arrived = Clock(), list[float]()
    Network(clock, (FAST, SLOW)).send(
        size, name(sender), name(receiver), lambda _: arrived.append(clock.now_s)
    )
    clock.run()
    assert arrived == [pytest.approx(carry_s(size, sender, receiver), rel=1e-12)]


@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 2.0),
            sizes,
            st.sampled_from(["fast", "slow", None]),
            st.sampled_from(["fast", "slow", None]),
        ),
        max_size=30,
    )
)
def test_links_are_queues_of_their_bandwidth(
    sends: list[tuple[float, int, str | None, str | None]],
) -> None:
    """Between two ends nothing overtakes; no link carries more than it can; nothing is lost."""
    clock = Clock()
    network = Network(clock, (FAST, SLOW))
    arrived: list[tuple[int, float]] = []
    ordered = sorted(sends, key=lambda one: one[0])

    def send(number: int) -> None:
        _, size, sender, receiver = ordered[number]
        network.send(
            size, sender, receiver, lambda _: arrived.append((number, clock.now_s)), number
        )

    for number, (at_s, *_) in enumerate(ordered):
        clock.at(at_s, send, number)
    clock.run()
    assert sorted(number for number, _ in arrived) == list(range(len(ordered)))
    for ends in {one[2:] for one in ordered}:
        on_it = [number for number, _ in arrived if ordered[number][2:] == ends]
        assert on_it == sorted(on_it)
    for server in (FAST, SLOW):
        down = [n for n, _ in arrived if ordered[n][3] == server.name != ordered[n][2]]
        carried = sum(ordered[n][1] for n in down)
        assert network.down[server.name].done(clock.now_s)[0] == carried
        if down:
            first_s = min(ordered[n][0] for n in down)
            last_s = max(at_s for n, at_s in arrived if n in down)
            assert last_s - first_s >= carried / server.bandwidth * (1 - 1e-9)


def test_a_server_sends_and_receives_at_once_and_the_switch_blocks_nobody() -> None:
    """A long transfer to a slow server delays what it sends itself, and no transfer to others."""
    clock, arrived = Clock(), dict[str, float]()
    network = Network(clock, (FAST, SLOW))
    size = 10**6

    def note(what: str) -> None:
        arrived[what] = clock.now_s

    network.send(size, "fast", "slow", note, "to slow")
    network.send(size, "fast", None, note, "to client")
    network.send(size, "slow", None, note, "from slow")
    clock.run()
    assert arrived["to slow"] == pytest.approx(1.021)
    assert arrived["to client"] == pytest.approx(0.021)  # 10 ms behind the first on its uplink
    assert arrived["from slow"] == pytest.approx(1.02)


def test_time_only_goes_forward_and_ties_are_in_order() -> None:
    """The clock is what makes a simulation repeatable."""
    clock, order = Clock(), list[int]()
    for number in (1, 2, 3):
        clock.at(1.0, order.append, number)
    clock.at(0.5, order.append, 0)
    clock.run(until_s=0.7)
    assert (clock.now_s, order) == (0.7, [0])
    with pytest.raises(AssertionError):
        clock.at(0.6, order.append)
    clock.at(1.0, lambda _: clock.stop())
    clock.at(1.0, order.append, 4)
    clock.run()
    assert (clock.now_s, order) == (1.0, [0, 1, 2, 3])


def test_what_still_waits_for_a_link_is_not_carried() -> None:
    """Who looks in the middle of a transfer sees what has gone, and a link never over-busy."""
    clock = Clock()
    network = Network(clock, (SLOW,))
    for _ in range(3):
        network.send(1_000_000, None, "slow", lambda _: None)
    clock.run(until_s=1.5)
    assert network.down["slow"].done(1.5) == (1_500_000, 1.5)
    assert network.down["slow"].done(9.0) == (3_000_000, 3.0)
