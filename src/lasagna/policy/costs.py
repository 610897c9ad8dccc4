"""What a step costs: predicted from a package's profile, corrected by what was measured.

A profile was measured on the sealing machine, on one thread that had it to itself. Here other
threads compete for memory and cache, and the processor is another one. So every prediction is the
profile's figure times a factor, which follows what is measured.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, TypeAlias

SLICED: Final = "sliced"
"""The form that is run slice by slice (package.forms.Form)."""
BATCHES: Final = (1, 2, 4, 8)
"""Batch sizes of a profile's curves, as in ``package.format.PROFILE_BATCHES``."""
_WEIGHT: Final = 0.2
"""Of the newest measurement in a factor: halves an error in three steps."""
_TELLING: Final = 0.005
"""Share by which a factor has to differ to be another one."""


@dataclass(frozen=True, slots=True)
class SliceCosts:
    """What one slice takes. Curves have a value for each of ``BATCHES``.

    Attributes:
        weight_bytes: to load.
        compute_s: seconds on one thread.
        workspace_bytes: that the kernels allocate meanwhile.
    """

    weight_bytes: int
    compute_s: tuple[float, ...]
    workspace_bytes: tuple[int, ...]

    def compute_at(self, rows: int) -> float:
        """Seconds for a batch: between measured sizes on a straight line, beyond by its slope."""
        return _compute_s(self.compute_s, rows)

    def workspace_at(self, rows: int) -> int:
        """Bytes for a batch, never less than for the next smaller size that was measured."""
        return _workspace_bytes(self.workspace_bytes, rows)


@dataclass(frozen=True, slots=True)
class ModelCosts:
    """A model as a scheduler sees it: public facts only.

    Attributes:
        slices: in order.
        cut_bytes: a row's tensors that cross each cut; the inputs at 0, the outputs at the end.
        running_bytes: a row's tensors that exist while each slice runs.
        max_rows: of one batch; 1 for a model that can't be batched.
        form: name of the way in which the model is run so; ``sliced`` ones can be streamed.
        copies_bytes: that sessions hold of the weights, beside the weights.
    """

    slices: tuple[SliceCosts, ...]
    cut_bytes: tuple[int, ...]
    running_bytes: tuple[int, ...]
    max_rows: int
    form: str = SLICED
    copies_bytes: int = 0

    def __post_init__(self) -> None:
        assert self.slices
        assert len(self.cut_bytes) == len(self.slices) + 1
        assert len(self.running_bytes) == len(self.slices)

    @property
    def weight_bytes(self) -> int:
        """Of all slices."""
        return sum(one.weight_bytes for one in self.slices)

    def compute_at(self, first: int, last: int, rows: int) -> float:
        """Seconds for slices ``first`` to ``last``, exclusive, on one batch."""
        return sum(one.compute_at(rows) for one in self.slices[first:last])

    def activations_at(self, first: int, last: int, rows: int) -> int:
        """Bytes of a batch's activations while it goes through these slices."""
        return max(self.running_bytes[first:last]) * rows

    def workspace_at(self, first: int, last: int, rows: int) -> int:
        """Bytes that the kernels of these slices allocate at most at once."""
        return max(one.workspace_at(rows) for one in self.slices[first:last])

    def bytes_at(self, first: int, last: int, rows: int) -> int:
        """Activations and workspace of a batch while it goes through these slices."""
        return self.activations_at(first, last, rows) + self.workspace_at(first, last, rows)


Forms: TypeAlias = tuple[ModelCosts, ...]
"""One model in each form that it can be run in, the sliced one first; the later the better, for who
has the memory."""


# Dividing memory asks the same of the same slices, a million times for seven models.
@lru_cache(maxsize=1 << 16)
def _compute_s(curve: tuple[float, ...], rows: int) -> float:
    return max(0.0, _on_curve(curve, rows))


@lru_cache(maxsize=1 << 16)
def _workspace_bytes(curve: tuple[int, ...], rows: int) -> int:
    at = min(bisect_left(BATCHES, rows), len(BATCHES) - 1)
    if rows <= BATCHES[-1]:
        return curve[at]
    return max(curve[-1], int(_on_curve(curve, rows) + 1))


def _on_curve(values: tuple[float, ...] | tuple[int, ...], rows: int) -> float:
    at = min(max(bisect_left(BATCHES, rows), 1), len(BATCHES) - 1)
    left, right = BATCHES[at - 1], BATCHES[at]
    slope = (values[at] - values[at - 1]) / (right - left)
    return values[at - 1] + slope * (rows - left)


class Correction:
    """A factor that follows measurements.

    Attributes:
        factor: measured seconds over the profile's, of late.
        measured: whether there was a measurement.
    """

    __slots__ = ("_follows", "factor", "measured")

    def __init__(self, factor: float = 1.0) -> None:
        """Begin with a factor; the first measurement replaces it."""
        self.factor = self._follows = factor
        self.measured = False

    def note(self, profile_s: float, measured_s: float) -> bool:
        """A step took so long, for which the profile has so much.

        What is too short to be measured, or not in the profile, changes nothing.

        Returns:
            Whether the factor is another one: small differences are gathered before it changes,
            since what was reckoned with it is out of date then.
        """
        if profile_s <= 0.0 or measured_s <= 0.0:
            return False
        ratio = measured_s / profile_s
        self._follows += (_WEIGHT if self.measured else 1.0) * (ratio - self._follows)
        if self.measured and abs(self._follows - self.factor) <= _TELLING * self.factor:
            return False
        self.factor, self.measured = self._follows, True
        return True
