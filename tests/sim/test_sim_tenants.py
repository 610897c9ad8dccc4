"""Promise: EPC that other tenants take is not used, and what they give back is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.sim.cases import MACHINE, MB, cluster, everywhere, load, model, placed, servers

from lasagna.policy.cluster import Part
from lasagna.policy.plan import Style
from lasagna.policy.state import Settings
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.options import EpcTaken, Options, ServerDies, Trouble

ROOMY = Settings(queue_rows=100_000)
OPTIONS = Options(settings=ROOMY)


@pytest.mark.parametrize("dead", [False, True])
def test_epc_that_is_taken_is_not_used(dead: bool) -> None:
    """The server begins anew with the rest, sooner or later, and loses no request."""
    big = model(8, 0.02, weight=5 * MB)
    described = cluster(servers(1), {"a": big})
    arrivals = load(4, 20.0, 6.0, "a")
    troubles: list[Trouble] = [EpcTaken(1.5, "s0", 40 * MB, 0.5)]
    if dead:
        troubles.append(ServerDies(1.0, "s0", 2.0))
    run = VirtualCluster(described, everywhere(described), OPTIONS)
    outcome = run.run(arrivals, troubles)
    plan = run.servers["s0"].enclave.scheduler.plan
    assert plan is not None
    assert plan.total_bytes <= 20 * MB
    figures = outcome.requests.figures()
    assert figures.answered + figures.refused == len(arrivals)
    assert figures.refused < (40 if dead else 15)  # while nobody serves the model


def test_what_fits_is_what_its_scheduler_takes() -> None:
    """Threads with a batch each need more than all on one: then it begins without the part."""
    apart = Settings(queue_rows=100_000, style=Style(together=False))
    lanes = replace(MACHINE, lanes=4, cores=4)
    described = cluster(servers(1, lanes), {"a": model(4, 0.02, weight=2 * MB)})
    kept = []
    for settings in (ROOMY, apart):
        run = VirtualCluster(described, everywhere(described), Options(settings=settings))
        server = run.servers["s0"]
        server.take_epc(lanes.budget - 6 * MB, 0.5)
        run.clock.run(until_s=2.0)
        assert server.alive
        kept.append(len(server.models))
    assert kept == [1, 0]


def test_what_tenants_give_back_is_used_again() -> None:
    """Some weights are pinned while much is taken, all of them afterwards."""
    big = model(8, 0.02, weight=5 * MB)
    described = cluster(servers(1), {"a": big})
    troubles = [EpcTaken(1.0, "s0", 40 * MB, 0.5), EpcTaken(3.0, "s0", 0, 0.5)]
    pinned = []
    for until_s in (2.9, 9.0):
        run = VirtualCluster(described, everywhere(described), OPTIONS)
        run.run(load(4, 20.0, 6.0, "a"), troubles, until_s=until_s)
        plan = run.servers["s0"].enclave.scheduler.plan
        assert plan is not None
        pinned.append(sum(map(len, plan.pinned.values())))
    assert pinned[0] < 4
    assert pinned[1] == 8


def test_what_does_not_fit_any_more_is_refused_and_nothing_is_lost() -> None:
    """Also where the server is back before anybody has noticed that it was away."""
    described = cluster(
        servers(2), {"a": model(2, 0.02, weight=9 * MB), "b": model(6, 0.03, weight=15 * MB)}
    )
    placement = placed(described, [Part("a", 0, 2, "s0"), Part("b", 0, 6, "s1")])
    arrivals = load(4, 40.0, 6.0, "a", "b")
    run = VirtualCluster(described, placement, Options(settings=ROOMY, detect_s=1.0))
    outcome = run.run(arrivals, [EpcTaken(2.0, "s0", 52 * MB, 0.1)])
    figures = {name: outcome.requests.figures(name) for name in "ab"}
    assert figures["a"].refused > 30
    assert figures["a"].refused + figures["a"].answered == figures["a"].count
    assert figures["b"].answered == figures["b"].count
