"""What the enclave's threads did when, for whoever asks. Public facts: times and numbers."""

from __future__ import annotations

from collections import deque
from typing import Final

from lasagna.enclave.messages import Span

KEPT: Final = 100_000


class Recorder:
    """Keeps the last spans while it is on. ``add`` may be called from any thread."""

    def __init__(self) -> None:
        """Off."""
        self.on = False
        self._spans: deque[Span] = deque()
        self._lost = 0

    def add(self, span: Span) -> None:
        """Note one, if recording; the newest are lost when there are too many."""
        if not self.on:
            return
        if len(self._spans) >= KEPT:
            self._lost += 1
            return
        self._spans.append(span)

    def take(self, *, record: bool) -> tuple[tuple[Span, ...], int]:
        """What was noted since the last time, and how many were lost; then go on, or stop."""
        self.on = record
        taken = []
        while self._spans:
            taken.append(self._spans.popleft())
        lost, self._lost = self._lost, 0
        return tuple(taken), lost
