"""Virtual time: actions in order of their times, and of their making where times are alike."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

NEVER: Final = float("inf")
"""A time that does not come."""


class Clock:
    """Seconds since the beginning, which pass only from one action to the next.

    Attributes:
        now_s: the time.
    """

    __slots__ = ("_actions", "_made", "_stopped", "now_s")

    def __init__(self) -> None:
        """It is 0, and nothing is to happen."""
        self.now_s = 0.0
        self._actions: list[tuple[float, int, Callable[[Any], object], Any]] = []
        self._made = 0
        self._stopped = False

    def at(self, time_s: float, action: Callable[[Any], object], facts: Any = None) -> None:
        """Call ``action(facts)`` then, which is not before now."""
        assert time_s >= self.now_s, f"{time_s} s is over, it is {self.now_s} s"
        self._made += 1
        heappush(self._actions, (time_s, self._made, action, facts))

    def stop(self) -> None:
        """Let ``run`` return after the present action, or the next ``run`` at once."""
        self._stopped = True

    def run(self, until_s: float = NEVER) -> None:
        """Let time pass, until nothing is left to happen or somebody stops it.

        Args:
            until_s: what is due later stays; then it is this time.
        """
        actions = self._actions
        while actions and not self._stopped:
            if actions[0][0] > until_s:
                self.now_s = until_s
                return
            self.now_s, _, action, facts = heappop(actions)
            action(facts)
        if until_s < NEVER and not self._stopped:
            self.now_s = max(self.now_s, until_s)
        self._stopped = False
