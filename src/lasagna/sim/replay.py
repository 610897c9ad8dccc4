"""A recorded scheduler's events once more: does it decide the same?

A policy that depends on anything but its events would not; nor would one that was changed since.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lasagna.journal import Journal
from lasagna.policy.events import Command, Event
from lasagna.policy.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a fresh scheduler decided otherwise.

    Attributes:
        line: of the journal, counted from 1.
        event: that it was told.
        recorded: the commands that followed then.
        replayed: those that followed now.
        error: that came instead of commands; "" for none.
    """

    line: int
    event: Event
    recorded: tuple[Command, ...]
    replayed: tuple[Command, ...]
    error: str = ""


def replay(path: Path) -> Divergence | None:
    """Tell a fresh scheduler all events of a journal; the first difference, if there is any.

    Raises:
        UsageError: the journal can't be read.
    """
    journal = Journal(path)
    scheduler = Scheduler(journal.header.machine, journal.header.settings)
    for entry in journal:
        try:
            commands = tuple(scheduler.handle(entry.event))
        except Exception as error:  # whatever an event does that can't come here
            return Divergence(entry.line, entry.event, entry.commands, (), repr(error))
        if commands != entry.commands:
            return Divergence(entry.line, entry.event, entry.commands, commands)
    return None
