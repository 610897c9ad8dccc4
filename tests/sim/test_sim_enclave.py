"""Promise: the virtual enclave takes what the profile says, and relies on what a real one does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.machine import check
from tests.sim.cases import MACHINE, MB, model

from lasagna.policy.costs import ModelCosts
from lasagna.policy.events import Answer, Arrange, Arrived, Command, Event, Pin, Ran, Run
from lasagna.policy.paging import Paging
from lasagna.policy.plan import Style
from lasagna.policy.stages import APART_LOSS, Machine, Stage
from lasagna.policy.staging import Staging
from lasagna.policy.state import Settings
from lasagna.sim.calibration import Calibration, drawn, noise
from lasagna.sim.clock import Clock
from lasagna.sim.enclave import End, VirtualEnclave
from lasagna.sim.planner import Planner
from lasagna.sim.runs import stall_s

PLANNER = Planner()
"""For all tests: their models are few."""


class Rig:
    """One virtual enclave, and what came of its requests."""

    def __init__(
        self,
        models: dict[str, ModelCosts],
        machine: Machine = MACHINE,
        settings: Settings | None = None,
        **facts: Any,
    ) -> None:
        self.clock = Clock()
        self.ends: list[tuple[float, End]] = []
        self.log: list[tuple[Event, Sequence[Command]]] = []
        self.enclave = VirtualEnclave(
            self.clock,
            machine,
            settings or Settings(queue_rows=10_000),
            PLANNER,
            lambda end: self.ends.append((self.clock.now_s, end)),
            heard=self.hear,
            **facts,
        )
        self.count = 0
        self.enclave.start({name: (costs,) for name, costs in models.items()}, prepared=True)
        self.clock.run(until_s=0.0)

    def hear(self, event: Event, commands: Sequence[Command]) -> None:
        check(self.enclave.scheduler)
        self.log.append((event, commands))

    def arrive(self, name: str, rows: int = 1) -> None:
        self.count += 1
        self.enclave.tell(Arrived(self.clock.now_s, self.count, name, rows))

    def answers(self, name: str, count: int) -> float:
        """Seconds that so many requests at once take."""
        begin_s = self.clock.now_s
        for _ in range(count):
            self.arrive(name)
        self.clock.run()
        return self.clock.now_s - begin_s

    @property
    def runs(self) -> list[Run]:
        return [one for _, commands in self.log for one in commands if isinstance(one, Run)]

    @property
    def rans(self) -> list[Ran]:
        return [event for event, _ in self.log if isinstance(event, Ran)]


STREAMED = model(10, 0.05, weight=20 * MB)
SMALL = model(3, 0.03)


def test_a_saturated_enclave_takes_what_its_plan_promises() -> None:
    """Simulated throughput is ``MemoryPlan.request_s`` when all batches are full."""
    rig = Rig({"a": STREAMED})
    plan = rig.enclave.scheduler.plan
    assert plan is not None
    seconds = rig.answers("a", 640)
    assert seconds / 640 == pytest.approx(plan.request_s["a"], rel=0.05)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 0.5), st.sampled_from(["a", "b"]), st.integers(1, 9)),
        min_size=1,
        max_size=40,
    ),
    st.sampled_from([MACHINE, replace(MACHINE, lanes=2), replace(MACHINE, lanes=2, cores=4)]),
    st.lists(st.floats(0.01, 0.6), max_size=2),
)
def test_every_request_ends_once_in_memory_that_is_there(
    load: list[tuple[float, str, int]], machine: Machine, deaths: list[float]
) -> None:
    """Whatever comes and dies; the scheduler's own invariants hold after every event."""
    rig = Rig({"a": STREAMED, "b": SMALL}, machine)
    for at_s, name, rows in load:
        rig.clock.at(at_s, lambda one: rig.arrive(*one), (name, rows))
    for at_s in deaths:
        rig.clock.at(at_s, rig.enclave.die, 0.05)
    rig.clock.run()
    assert sorted(end.request for _, end in rig.ends) == list(range(1, len(load) + 1))
    if not deaths:
        assert all(isinstance(end, Answer) for _, end in rig.ends)
    for arranged in (c for _, commands in rig.log for c in commands if isinstance(c, Arrange)):
        assert arranged.plan is not None
        assert arranged.plan.total_bytes <= machine.budget


def test_a_gang_shares_a_load() -> None:
    """With two lanes each weight is decrypted once for two batches, and each lane waits for it."""
    machine = Machine(60 * MB, 2, 4, 3.4e9, 0.0002)
    rig = Rig({"a": STREAMED}, machine, Settings(queue_rows=10_000, style=Style(together=False)))
    rig.answers("a", 64)
    loaded = sum(ran.load_bytes for ran in rig.rans)
    plan = rig.enclave.scheduler.plan
    assert plan is not None
    alone = sum(
        STREAMED.slices[n].weight_bytes
        for run in rig.runs
        for n in range(run.first, run.last)
        if n not in plan.pinned["a"]
    )
    assert 0 < loaded <= 0.6 * alone
    loaded += plan.pinned_bytes  # before the first run
    assert loaded == pytest.approx(rig.enclave.counters.loaded_bytes, rel=1e-3)
    assert rig.enclave.counters.loads * 20 * MB == rig.enclave.counters.loaded_bytes


def test_measured_factors_are_in_the_times_that_are_reported() -> None:
    """So a scheduler's corrections settle at the calibration, as they would at a real machine's."""
    rig = Rig(
        {"a": STREAMED},
        calibration=Calibration(compute=2.0, of_models={"a": 1.5}, load=1.3, seal=4.0),
    )
    rig.answers("a", 200)
    model_state = rig.enclave.scheduler._models["a"]
    assert rig.enclave.scheduler._predictions._loading.factor == pytest.approx(1.3)
    assert rig.enclave.scheduler.slowness == pytest.approx(3.0, rel=0.05)
    assert model_state.stages[0].sealing.factor == pytest.approx(4.0)
    measured = {("a", 0, 4, 0, False): 5.0, ("a", 0, 4, 1, False): 6.0, ("a", 0, 4, 1, True): 4.5}
    first = Calibration(of_batches=measured, compute=2.0)
    assert first.compute_factor("a", 0, 4) == 5.0
    assert first.compute_factor("a", 0, 4, beside=1) == 6.0
    assert first.compute_factor("a", 0, 4, beside=3) == 6.0
    assert first.compute_factor("a", 0, 4, beside=2, in_step=True) == 4.5
    assert first.compute_factor("a", 0, 3) == 2.0


def test_what_is_loaded_while_computing_is_hidden_where_a_core_is_left() -> None:
    """One more core hides the decryption of weights that compute long enough."""
    costs = model(10, 0.2, weight=10 * MB, max_rows=1)  # 20 ms a slice, 3 ms to load it
    stage = Stage(0, 10, 1)
    machine = replace(MACHINE, budget=40 * MB)
    alone = {
        cores: Rig({"a": costs}, replace(machine, cores=cores)).answers("a", 1) for cores in (1, 2)
    }
    assert alone[2] == pytest.approx(
        Staging(costs, machine, 1).request_s([stage], frozenset(range(2))), rel=0.1
    )
    assert alone[1] - alone[2] > 0.02


steps = st.lists(
    st.tuples(st.floats(0.001, 0.1), st.one_of(st.just(0.0), st.floats(0.001, 0.1))), min_size=1
)


@given(steps, st.integers(1, 8), st.integers(1, 3))
def test_waits_for_weights_are_within_what_can_be(
    steps: list[tuple[float, float]], slots: int, threads: int
) -> None:
    """No less than all threads need to decrypt, no more than one; a longer ring waits less."""
    compute_s, load_s = (sum(each) for each in zip(*steps, strict=True))
    found = stall_s(steps, slots, threads)
    assert found >= max(0.0, (load_s / threads - compute_s)) - 1e-9
    assert found <= load_s + 1e-9
    assert found >= stall_s(steps, slots + 1, threads) - 1e-9
    assert found >= stall_s(steps, slots, threads + 1) - 1e-9


@given(steps)
def test_an_endless_ring_hides_all_that_computing_covers(steps: list[tuple[float, float]]) -> None:
    """Then the longer of computing and loading counts: nothing else is left of either."""
    compute_s, load_s = (sum(each) for each in zip(*steps, strict=True))
    found = stall_s(steps, 1000, 1)
    assert found == pytest.approx(max(0.0, load_s - compute_s), abs=1e-9)


def test_one_slot_overlaps_nothing_and_two_overlap_neighbours() -> None:
    """Equal slices, loads as long as computing: all of it shows, or none."""
    steps = [(0.01, 0.01)] * 10
    assert stall_s(steps, 1, 1) == pytest.approx(0.1)
    assert stall_s(steps, 2, 1) == pytest.approx(0.0)


def test_slow_servers_compute_longer_and_recover() -> None:
    """Only computing is slower, and its prediction follows."""
    rig = Rig({"a": SMALL})
    usual_s = rig.answers("a", 1)
    rig.enclave.slow(3.0)
    assert rig.answers("a", 1) == pytest.approx(usual_s + 2 * 0.03, rel=1e-6)
    rig.enclave.slow(1.0)
    assert rig.answers("a", 1) == pytest.approx(usual_s)


def test_noise_has_mean_one_and_is_the_seeds() -> None:
    """Noise widens times and does not shift them."""
    factors = noise(np.random.default_rng(5), 0.2)
    drawn = np.array([next(factors) for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(1.0, abs=0.01)
    assert np.log(drawn).std() == pytest.approx(0.2, abs=0.01)
    rigs = [Rig({"a": SMALL}, noise=noise(np.random.default_rng(5), 0.2)) for _ in range(2)]
    assert rigs[0].answers("a", 50) == rigs[1].answers("a", 50)


def test_measured_factors_are_drawn_as_often_as_they_were_measured() -> None:
    """Rare slow runs stay as rare, and a run's whole time is as much longer."""
    rigs = [Rig({"a": SMALL}), Rig({"a": SMALL}, noise=drawn(np.random.default_rng(5), [2.0]))]
    plain_s, slow_s = (rig.answers("a", 1) for rig in rigs)
    assert slow_s == pytest.approx(2 * plain_s)
    factors = drawn(np.random.default_rng(5), [1.0, 1.0, 1.0, 9.0])
    slow = sum(next(factors) == 9.0 for _ in range(20_000))
    assert slow == pytest.approx(5_000, rel=0.05)


def test_runs_in_step_are_slow_together() -> None:
    """Two that begin at once wait for the same and end at once; the next two draw anew."""
    apart = Settings(queue_rows=10_000, style=Style(together=False))
    two = replace(MACHINE, lanes=2, cores=4)
    rig = Rig({"a": SMALL}, two, apart, noise=noise(np.random.default_rng(5), 0.3))
    for seconds in range(4):
        rig.clock.run(until_s=seconds)
        rig.arrive("a")
        rig.arrive("a")
    rig.clock.run()
    ends_s = [ran.at_s % 1.0 for ran in rig.rans]
    assert ends_s[0::2] == ends_s[1::2]
    assert len({round(end_s, 6) for end_s in ends_s}) == 4


def test_a_drawn_factor_is_not_handed_on_for_ever() -> None:
    """Of four lanes that begin one after the other, with a ring of a quarter of a run, half draw.

    Handed on from run to run, one draw would make a server slow or fast for good.
    """
    draws = 0

    def counted() -> Iterator[float]:
        nonlocal draws
        for factor in noise(np.random.default_rng(5), 0.3):
            draws += 1
            yield factor

    apart = Settings(queue_rows=10_000, style=Style(together=False))
    four = Machine(20 * MB, 4, 4, 3.4e9, 0.0002)
    rig = Rig({"a": model(4, 0.05, weight=6 * MB)}, four, apart, noise=counted())
    rig.answers("a", 400)
    plan = rig.enclave.scheduler.plan
    assert plan is not None
    assert plan.slots == 1
    assert not plan.pinned["a"]
    assert draws > 0.4 * len(rig.rans)  # 0.51; a third if they are handed on


def test_arranging_and_planning_take_their_time() -> None:
    """Requests wait while what is pinned is loaded, except for the first time of all."""
    calibration = Calibration(arrange_s=0.5, plan_s=0.25)
    rig = Rig({"a": SMALL}, calibration=calibration)
    usual_s = rig.answers("a", 1) - 0.25  # the first plan; its arrangement was prepared
    rig.enclave.die(1.0)
    loads_s = 3 * MB / MACHINE.load_rate
    assert rig.answers("a", 1) == pytest.approx(1.0 + 0.5 + loads_s + usual_s, rel=1e-3)


def test_a_closed_enclave_hears_nothing_any_more() -> None:
    """A plan that was being worked out for it begins no run of a server that is gone."""
    rig = Rig({"a": SMALL}, calibration=Calibration(plan_s=0.25))
    rig.arrive("a")
    assert not rig.runs, "it is still being planned for"
    heard = len(rig.log)
    rig.enclave.close()
    rig.clock.run()
    assert rig.clock.now_s >= 0.25
    assert len(rig.log) == heard
    assert not rig.ends


def test_pins_follow_the_mix() -> None:
    """A scheduler that sees another mix moves pins, and what was loaded for them is counted."""
    costs = dict.fromkeys("ab", model(8, 0.02, weight=10 * MB, max_rows=1))
    rig = Rig(costs, replace(MACHINE, budget=100 * MB, cores=1))
    for step in range(600):
        name = "a" if step < 200 else "b"
        rig.clock.at(step * 0.05, rig.arrive, name)
    rig.clock.run()
    moves = [one for _, commands in rig.log for one in commands if isinstance(one, Pin)]
    assert len(rig.ends) == 600
    assert moves
    assert rig.enclave.counters.loads >= len(moves)


def test_a_model_larger_than_the_epc_is_paged_in_for_every_pass() -> None:
    """Vanilla: a cyclic scan defeats the kernel; threads that run together share the pages."""
    whole = replace(model(1, 0.1, weight=120 * MB, max_rows=1), form="vanilla")
    paging = Paging(epc_bytes=98 * MB, page_s=20e-6)
    machine = Machine(1 << 60, 1, 2, 3e9, 0.0)
    rig = Rig({"a": whole}, machine, paging=paging)
    pages = -(-(120 * MB + whole.bytes_at(0, 1, 1)) // 4096)
    one_s = rig.answers("a", 1)
    assert one_s == pytest.approx(0.1 + pages * 20e-6, rel=0.01)
    assert rig.enclave.counters.pages == pages
    pair = Rig({"a": whole}, replace(machine, lanes=2, cores=2), paging=paging)
    assert pair.answers("a", 2) == pytest.approx(one_s, rel=0.01)
    assert pair.enclave.counters.pages == pages


def test_models_that_fit_one_by_one_page_each_other_out() -> None:
    """What fits stays, until another model needs the room."""
    halves = {name: model(1, 0.01, weight=60 * MB, max_rows=1) for name in "ab"}
    rig = Rig(halves, Machine(1 << 60, 1, 2, 3e9, 0.0), paging=Paging(98 * MB, 20e-6))
    rig.answers("a", 1)
    cold = rig.enclave.counters.pages
    rig.answers("a", 3)
    assert rig.enclave.counters.pages == cold
    rig.answers("b", 1)
    rig.answers("a", 1)
    assert rig.enclave.counters.pages == 3 * cold


def test_lanes_lose_what_was_measured_where_they_share_loads() -> None:
    """Two lanes with streamed weights take ``APART_LOSS`` more than their computing."""
    apart = Settings(style=Style(together=False))
    rig = Rig({"a": STREAMED}, Machine(60 * MB, 2, 4, 3.4e9, 0.0), apart)
    rig.answers("a", 2)
    ran = [ran for ran in rig.rans if ran.load_bytes]
    shared = [one for key, one in rig.enclave._takes.items() if one.loads and key[-2][0] > 1]
    assert ran
    assert shared
    assert all(one.total_s >= (1 + APART_LOSS) * one.compute_s for one in shared)
