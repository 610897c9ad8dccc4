"""Promise: memory is divided anew when that is worth it, not too often, and never forgotten."""

from __future__ import annotations

from dataclasses import replace

from tests.policy.machine import MACHINE, MB, linear

from lasagna.policy.arranging import REARRANGE_S, Arranger
from lasagna.policy.costs import Forms
from lasagna.policy.events import Arrange, Command, Plan, Planned
from lasagna.policy.memory import divide
from lasagna.policy.plan import Style

MODELS: dict[str, Forms] = {
    name: (linear([9 * MB] * 5, [200_000] * 5, [0.004] * 5),) for name in "ab"
}


def stepped(arranger: Arranger, now_s: float) -> list[Command]:
    out: list[Command] = []
    arranger.step(MODELS, now_s, lambda: False, out)
    return out


def test_a_division_that_is_worth_it_too_soon_is_made_when_it_is_due() -> None:
    """The load's mix is learned seconds after the start, and may stay as it is from then on."""
    arranger = Arranger(MACHINE, Style())
    first = divide(MODELS, {}, MACHINE)
    better = replace(first, request_s={name: s / 2 for name, s in first.request_s.items()})
    arranger.models_changed()
    arranger.enclave_ready()
    assert [type(command) for command in stepped(arranger, 0.0)] == [Plan]
    arranger.planned(Planned(0.0, first, None))
    assert stepped(arranger, 0.0) == [Arrange(first)]
    arranger.arranged(0.0, failed=False)

    for _ in range(20):
        arranger.arrived("a", 1, 3.0)
    assert [type(command) for command in stepped(arranger, 3.0)] == [Plan]
    arranger.planned(Planned(3.0, better, first))
    assert not stepped(arranger, 3.0)
    assert not stepped(arranger, REARRANGE_S - 1.0)
    due_s = REARRANGE_S + 2.0
    assert [type(command) for command in stepped(arranger, due_s)] == [Plan]
    arranger.planned(Planned(due_s, better, first))
    assert stepped(arranger, due_s) == [Arrange(better)]
