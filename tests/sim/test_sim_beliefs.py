"""Promise: what a balancer believes of a server is the last report, and what it sent since then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.sim.cases import servers

from lasagna.policy.beliefs import Belief

WORK_S = 1.0


@given(st.lists(st.floats(0.0, 9.0), max_size=8), st.floats(0.0, 9.0))
def test_a_report_counts_each_send_once_whatever_the_order(
    arrivals: list[float], measured_s: float
) -> None:
    """A send that arrives late, by a long route, does not hide that later sends have arrived."""
    belief = Belief(servers(1)[0])
    for arrives_s in arrivals:
        belief.send(arrives_s, WORK_S)
    belief.report(measured_s, 100.0, 1.0)
    coming = sum(arrives_s > measured_s for arrives_s in arrivals)
    last_s = max([measured_s, *arrivals])
    # Everything that was sent is there by then, and some of it is done.
    assert belief.backlog_s(last_s) <= 100.0 + coming * WORK_S
    assert belief.backlog_s(last_s) >= 100.0 + coming * WORK_S - (last_s - measured_s) - 1e-9
