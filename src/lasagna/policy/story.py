"""What became of each request, to be printed when somebody asks why.

Every event that is about a request and every command that it led to is a line of its story: when,
by what cause, and what. The last stories are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from lasagna.policy.events import (
    Answer,
    Arrived,
    Cancelled,
    Command,
    Event,
    Forget,
    GiveUp,
    Refuse,
    Run,
)


class Stories:
    """The stories of the last requests."""

    def __init__(self, kept: int) -> None:
        """Keep so many."""
        self._kept = kept
        self._lines: OrderedDict[int, list[tuple[float, str, Event | Command]]] = OrderedDict()

    def record(self, event: Event, commands: Iterable[Command]) -> None:
        """An event was handled and led to these commands."""
        if not self._kept:
            return
        cause = type(event).__name__
        if isinstance(event, Arrived | Cancelled):
            self._note(event.request, event.at_s, cause, event)
        for command in commands:
            for request in _about(command):
                self._note(request, event.at_s, cause, command)

    def of(self, request: int) -> tuple[str, ...]:
        """The lines of a story, oldest first; none if it is unknown or was too long ago."""
        return tuple(
            f"{at_s:.6f} s, {cause}: {_words(what, request)}"
            for at_s, cause, what in self._lines.get(request, ())
        )

    def _note(self, request: int, at_s: float, cause: str, what: Event | Command) -> None:
        lines = self._lines.get(request)
        if lines is None:
            lines = self._lines[request] = []
            if len(self._lines) > self._kept:
                self._lines.popitem(last=False)
        lines.append((at_s, cause, what))


def _about(command: Command) -> Iterator[int]:
    if isinstance(command, Run):
        yield from {part.request: None for part in command.batch}
    elif isinstance(command, Answer | Refuse | GiveUp | Forget):
        yield command.request


def _words(what: Event | Command, request: int) -> str:
    match what:
        case Arrived():
            return f"{what.rows} rows for {what.model} arrive from {what.tenant or 'nobody named'}"
        case Cancelled():
            return "nobody waits for it any more"
        case Run():
            rows = sum(part.count for part in what.batch)
            own = sum(part.count for part in what.batch if part.request == request)
            return f"run {what.run} takes {own} rows, of {rows}, to slices {what.first}-{what.last}"
        case Answer():
            return "it is answered"
        case Refuse():
            return f"it is refused: {what.reason}; try again in {what.retry_after_s:.3g} s"
        case GiveUp():
            return f"it is given up: {what.reason}"
        case Forget():
            return "the enclave forgets it"
        case _:
            return type(what).__name__
