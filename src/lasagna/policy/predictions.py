"""How long a run will take: from the package's profile, corrected by what was measured.

A run computes, it needs weights decrypted, and at the model's ends it opens and seals rows. Each of
the three has a profile and a correction of its own, and a record of how far it was off.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from statistics import median
from typing import Final

from lasagna.policy.costs import Correction
from lasagna.policy.events import Ran
from lasagna.policy.stages import (
    SLICE_S,
    Machine,
    alone_s,
    copy_s,
    exposed_s,
    sealing_s,
    visit_s,
)
from lasagna.policy.state import ModelState, StageState

ERRORS_KEPT: Final = 1000
"""Of the last predictions."""
TELLING_BYTES: Final = 4 << 20
"""A report of less loaded says more of who else was on the core than of the rate."""

REMEMBERED: Final = 0.98
"""Share that each run leaves of what was measured before it in ``slowness``: some 50 runs count."""


@dataclass(frozen=True, slots=True)
class PredictionErrors:
    """Half of the last predictions of each kind were off by less than this share; 0 before any."""

    compute: float = 0.0
    load: float = 0.0
    seal: float = 0.0


class _Record:
    """Shares by which the last predictions were off, in a ring.

    Of numbers, not of objects: a simulated cluster has thousands of these, and its speed is that of
    the caches.
    """

    __slots__ = ("_next", "_shares")

    def __init__(self) -> None:
        self._shares = array("f")
        self._next = 0

    def note(self, predicted_s: float, measured_s: float) -> None:
        share = abs(predicted_s / measured_s - 1.0)
        if len(self._shares) < ERRORS_KEPT:
            self._shares.append(share)
        else:
            self._shares[self._next] = share
            self._next = (self._next + 1) % ERRORS_KEPT

    @property
    def middle(self) -> float:
        return median(self._shares) if self._shares else 0.0


class Predictions:
    """What is known of the times of runs on one machine.

    Attributes:
        machine: in the shape that its plan is for.
    """

    def __init__(self, machine: Machine) -> None:
        """Nothing was measured."""
        self.machine = machine
        self._loading = Correction()
        self._compute_errors = _Record()
        self._load_errors = _Record()
        self._seal_errors = _Record()
        self._measured_s = self._expected_s = 0.0

    @property
    def slowness(self) -> float:
        """Measured over predicted seconds of computing of late, of all runs; 1 before any."""
        return self._measured_s / self._expected_s if self._expected_s > 0.0 else 1.0

    @property
    def errors(self) -> PredictionErrors:
        """How far they were off of late."""
        return PredictionErrors(
            self._compute_errors.middle, self._load_errors.middle, self._seal_errors.middle
        )

    def compute_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds of computing on one lane: by what batches of this size took, else by all."""
        known = stage.by_rows.get(rows, stage.correction)
        return known.factor * self._profile_s(model, stage, rows)

    def load_s(self, stage: StageState) -> float:
        """Seconds in which one thread decrypts what the stage has to load."""
        return self._loading.factor * stage.load_s

    def seal_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds of opening rows that come in here, and of sealing those that leave."""
        return stage.sealing.factor * self._sealing_s(model, stage, rows)

    def alone_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds from the start of a run to its end."""
        found = stage.alone_s.get(rows)
        if found is None:
            found = alone_s(*self._times(model, stage, rows), self.machine)
            stage.alone_s[rows] = found
        return found

    def visit_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds of the server for one run of a gang."""
        found = stage.visit_s.get(rows)
        if found is None:
            found = visit_s(*self._times(model, stage, rows), self.machine)
            stage.visit_s[rows] = found
        return found

    def _times(self, model: ModelState, stage: StageState, rows: int) -> tuple[float, float, float]:
        """Seconds of computing with both ends, of loading, and of loading that is not hidden."""
        busy_s = self.compute_s(model, stage, rows) + self.seal_s(model, stage, rows)
        return busy_s, self.load_s(stage), self._exposed_s(model, stage, rows)

    def note(self, model: ModelState, stage: StageState, rows: int, ran: Ran) -> bool:
        """A run has ended, and took so long.

        Returns:
            Whether that says something of all models: what was predicted of them is out of date.
        """
        changed = self._note_compute(model, stage, rows, ran.compute_s)
        seal_s = self._sealing_s(model, stage, rows)
        if seal_s > 0.0:
            changed |= _correct(stage.sealing, self._seal_errors, seal_s, ran.seal_s)
        if changed:
            model.learn((stage,))
        if ran.load_bytes < TELLING_BYTES:
            return False
        load_s = ran.load_bytes / self.machine.load_rate
        return _correct(self._loading, self._load_errors, load_s, ran.load_s)

    def _note_compute(
        self, model: ModelState, stage: StageState, rows: int, measured_s: float
    ) -> bool:
        """Whether predictions of the stage are out of date."""
        own = stage.by_rows.get(rows)
        if own is None:
            own = stage.by_rows[rows] = Correction(stage.correction.factor)
        profile_s = self._profile_s(model, stage, rows)
        if profile_s <= 0.0 or measured_s <= 0.0:
            return False
        first, last = stage.plan.first, stage.plan.last
        calls_s = SLICE_S * (last - first) + copy_s(model.costs, first, rows)
        self._measured_s = REMEMBERED * self._measured_s + measured_s
        self._expected_s = REMEMBERED * self._expected_s + profile_s + calls_s
        if stage.correction.measured:
            self._compute_errors.note(own.factor * profile_s, measured_s)
        changed = own.note(profile_s, measured_s)
        return stage.correction.note(profile_s, measured_s) or changed

    def _exposed_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        """Seconds of loading that computing does not hide, by the profile's measure of both."""
        found = stage.exposed_s.get(rows)
        if found is None:
            first, last = stage.plan.first, stage.plan.last
            found = exposed_s(model.costs, first, last, rows, stage.pinned, self.machine)
            stage.exposed_s[rows] = found
        return self._loading.factor * found

    def _sealing_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        found = stage.sealing_s.get(rows)
        if found is None:
            found = sealing_s(model.costs, stage.plan.first, stage.plan.last, rows)
            stage.sealing_s[rows] = found
        return found

    def _profile_s(self, model: ModelState, stage: StageState, rows: int) -> float:
        found = stage.profile_s.get(rows)
        if found is None:
            first, last = stage.plan.first, stage.plan.last
            found = self.machine.batch_s(
                model.costs.compute_at(first, last, rows), model.costs.compute_at(first, last, 1)
            )
            stage.profile_s[rows] = found
        return found


def _correct(factor: Correction, record: _Record, profile_s: float, measured_s: float) -> bool:
    """Whether the factor is another one."""
    if profile_s <= 0.0 or measured_s <= 0.0:
        return False
    if factor.measured:
        record.note(factor.factor * profile_s, measured_s)
    return factor.note(profile_s, measured_s)
