"""When the enclave's memory is divided anew, and which pins move. Pure; part of the scheduler.

A plan is made when the set of models changes, and again when the load's mix does. If other pins are
enough they move one at a time, while service goes on. If another division promises much more, or
the models have changed, nothing more is taken in until the enclave is empty, which takes a few
visits; then it is arranged anew.

=========  ==========  ============================================================================
enclave    plan        what is done
=========  ==========  ============================================================================
absent     any         nothing until EnclaveReady
ready      wanted      wait until nothing is inside; Arrange: to arranging
arranging  any         wait for Arranged: to open
open       present     runs; a Pin or Unpin at a time
open       wanted      runs of what is inside, then as ready
=========  ==========  ============================================================================
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum, auto
from typing import Final

from lasagna.policy.costs import Forms
from lasagna.policy.events import Arrange, Command, Pin, Plan, Planned, Unpin
from lasagna.policy.plan import MemoryPlan, Style, mean_s, shares
from lasagna.policy.stages import Machine
from lasagna.units import whole_pages

MEMORY_S: Final = 10.0
"""After so long a request counts for 1/e of a new one in the mix."""
LOOK_S: Final = 2.0
"""Between two looks at the mix."""
SHIFT: Final = 0.1
"""Share of the load that must have moved from some models to others to look for another plan."""
REARRANGE_S: Final = 20.0
"""Between two arrangements because of the mix: each holds requests up for some 100 ms."""
REARRANGE_GAIN: Final = 0.15
MOVE_GAIN: Final = 0.02
"""Predicted gains that are worth an arrangement, and moving pins."""


class Enclave(Enum):
    """What the enclave is ready for."""

    ABSENT = auto()
    READY = auto()
    ARRANGING = auto()
    OPEN = auto()


_NEXT: Final[Mapping[tuple[Enclave, str], Enclave]] = {
    (Enclave.ABSENT, "EnclaveReady"): Enclave.READY,
    (Enclave.READY, "Arrange"): Enclave.ARRANGING,
    (Enclave.OPEN, "Arrange"): Enclave.ARRANGING,
    (Enclave.ARRANGING, "Arranged"): Enclave.OPEN,
    (Enclave.ARRANGING, "refused"): Enclave.READY,
    **{(state, "EnclaveLost"): Enclave.ABSENT for state in Enclave},
}
"""What the enclave becomes by an event or a command. Whatever is not here can't happen."""


class Arranger:
    """The plan in force, the one to come, and the pins on their way."""

    def __init__(self, machine: Machine, style: Style) -> None:
        """No enclave, no plan.

        Args:
            machine: with a lane for each of its threads.
            style: what plans may make use of.
        """
        self.present: MemoryPlan | None = None
        self._every = style.shapes(machine)
        self.shapes = self._every
        self._style = style
        self._enclave = Enclave.ABSENT
        self._wanted: MemoryPlan | None = None
        self._empty = False  # wanted: no model at all
        self._stale = False
        self._planning = False
        self._planned_for: Mapping[str, float] = {}
        self._looked_s = 0.0
        self._postponed = False  # another division was worth it, but too soon after the last
        self._arranged_s = -REARRANGE_S
        self._demand: dict[str, float] = {}
        self._noted_s = 0.0
        self._moves: deque[Pin | Unpin] = deque()
        self._moving: Pin | Unpin | None = None

    @property
    def machine(self) -> Machine:
        """In the shape that the enclave has taken, or may take."""
        return self.shapes[0]

    @property
    def open(self) -> bool:
        """Whether runs may be sent."""
        return self._enclave is Enclave.OPEN

    @property
    def admits(self) -> bool:
        """Whether they may take in rows from outside."""
        return self.open and self._wanted is None and not self._empty

    def arrived(self, model: str, rows: int, now_s: float) -> None:
        """Count a request into the mix."""
        if now_s > self._noted_s:
            decay = math.exp((self._noted_s - now_s) / MEMORY_S)
            self._demand = {name: was * decay for name, was in self._demand.items()}
            self._noted_s = now_s
        self._demand[model] = self._demand.get(model, 0.0) + rows

    def models_changed(self) -> None:
        """A model came or went."""
        self._stale = True

    def enclave_ready(self) -> None:
        """An enclave runs, and has nothing: the last plan's division, unless models have changed.

        In the shape of that there may be no room for those that came meanwhile.
        """
        self._become("EnclaveReady")
        self._wanted = None if self._stale else self._wanted or self.present
        if self._stale:
            self.present = None

    def enclave_lost(self) -> None:
        """It is gone, with its pins and moves."""
        self._become("EnclaveLost")
        self.shapes = self._every
        self._moves.clear()
        self._moving = None

    def arranged(self, now_s: float, *, failed: bool) -> None:
        """The last Arrange is done, or refused: then another plan is needed."""
        if failed:
            self._become("refused")
            self.present, self._stale = None, True
            return
        self._become("Arranged")
        self._arranged_s = now_s

    def planned(self, event: Planned) -> None:
        """Choose between the plan as it is, other pins, and another plan."""
        self._planning = False
        if not any(_has_shape(event.best, shape) for shape in self.shapes):
            self._stale = True  # the enclave has taken another one meanwhile
        if self._stale:
            return  # or the models have changed
        present, kept = self.present, event.kept
        if kept is None or present is None or set(event.best.costs) != set(present.costs):
            self._wanted = event.best
            return
        demand = self._planned_for
        worth_it = mean_s(event.best, demand) < (1 - REARRANGE_GAIN) * mean_s(kept, demand)
        due = self._due(event.at_s)
        self._postponed = worth_it and not due
        if worth_it and due:
            self._wanted = event.best
            self._moves.clear()
        elif not self._moving and mean_s(kept, demand) < (1 - MOVE_GAIN) * mean_s(present, demand):
            self._moves = _moves(present, kept, self.machine)

    def moved(self, *, failed: bool) -> str | None:
        """The last move is done; the model of which other slices are pinned now."""
        move, self._moving = self._moving, None
        present = self.present
        if move is None or failed or present is None:
            return None
        was = present.pinned[move.model]
        now = was | {move.slice} if isinstance(move, Pin) else was - {move.slice}
        size = whole_pages(present.costs[move.model].slices[move.slice].weight_bytes)
        self.present = replace(
            present,
            pinned={**present.pinned, move.model: now},
            pinned_bytes=present.pinned_bytes + (size if isinstance(move, Pin) else -size),
        )
        return move.model

    def step(
        self,
        models: Mapping[str, Forms],
        now_s: float,
        inside: Callable[[], bool],
        out: list[Command],
    ) -> bool:
        """Say what is to be done about memory now.

        Args:
            models: that are served.
            now_s: the time.
            inside: whether the enclave has rows or runs.
            out: takes the commands.

        Returns:
            Whether the plan in force is another one now.
        """
        if self._wishes_plan(models, now_s):
            self._planning, self._stale, self._looked_s = True, False, now_s
            self._planned_for = shares(models, self._demand)
            present = self._comparable(models)
            out.append(Plan(models, self._planned_for, self.shapes, self._style, present))
        wants = self._wanted is not None or self._empty
        if self._moving is not None or self._enclave not in (Enclave.READY, Enclave.OPEN):
            return False
        if wants and not inside():
            self.present, self._wanted, self._empty = self._wanted, None, False
            self._become("Arrange")
            self._moves.clear()
            self._take_shape()
            out.append(Arrange(self.present))
            return True
        if self._enclave is Enclave.OPEN and self._moves and not wants:
            self._moving = self._moves.popleft()
            out.append(self._moving)
        return False

    def _take_shape(self) -> None:
        """The first plan of an enclave's life fixes how its threads share the work."""
        if self.present is not None:
            plan = self.present
            self.shapes = tuple(shape for shape in self.shapes if _has_shape(plan, shape))
            assert self.shapes

    def _due(self, now_s: float) -> bool:
        return now_s - self._arranged_s >= REARRANGE_S

    def _become(self, by: str) -> None:
        following = _NEXT.get((self._enclave, by))
        assert following is not None, f"{by} while the enclave is {self._enclave.name}"
        self._enclave = following

    def _comparable(self, models: Mapping[str, Forms]) -> MemoryPlan | None:
        """The present plan, if it is for these models."""
        present = self.present
        return present if present is not None and set(present.costs) == set(models) else None

    def _wishes_plan(self, models: Mapping[str, Forms], now_s: float) -> bool:
        if self._stale and not models:
            self._stale, self._wanted, self._empty = False, None, self.present is not None
            return False
        if self._planning or not models or self._enclave is Enclave.ABSENT:
            return False
        if self._stale:
            return True
        if not self.open or now_s - self._looked_s < LOOK_S or len(models) < 2:
            return False
        self._looked_s = now_s
        if self._postponed and self._due(now_s):
            return True
        now, then = shares(models, self._demand), self._planned_for
        return _distance(now, then) > SHIFT


def _has_shape(plan: MemoryPlan, machine: Machine) -> bool:
    return (plan.lanes, plan.width) == (machine.lanes, machine.width)


def _distance(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Share of the load that differs."""
    a, b = sum(one.values()) or 1.0, sum(other.values()) or 1.0
    names = {**one, **other}
    return sum(abs(one.get(n, 0.0) / a - other.get(n, 0.0) / b) for n in names) / 2


def _moves(present: MemoryPlan, kept: MemoryPlan, machine: Machine) -> deque[Pin | Unpin]:
    """From one set of pins to the other, never with more memory than there is."""

    def size(name: str, number: int) -> int:
        return whole_pages(present.costs[name].slices[number].weight_bytes)

    room = machine.budget - present.total_bytes
    leaving = deque(
        (name, n)
        for name in present.pinned
        for n in sorted(present.pinned[name] - kept.pinned[name])
    )
    moves: deque[Pin | Unpin] = deque()
    for name in kept.pinned:
        for number in sorted(kept.pinned[name] - present.pinned[name]):
            while leaving and room < size(name, number):
                gone = leaving.popleft()
                moves.append(Unpin(*gone))
                room += size(*gone)
            if room >= size(name, number):
                moves.append(Pin(name, number))
                room -= size(name, number)
    return moves
