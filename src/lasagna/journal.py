"""A scheduler's journal, JSON lines: each event that it was told, and the commands that followed.

The first line is the `Header`; with it and the events, `lasagna.sim.replay` lets a fresh scheduler
decide everything once more. Events that carry plans are written in full, so nothing has to be
worked out again. Floats are written so that they read back as the same ones.

It holds names, sizes, tenants and times, which the server's owner sees anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, get_args

import msgspec

from lasagna.errors import UsageError
from lasagna.policy.events import Command, Event
from lasagna.policy.stages import Machine
from lasagna.policy.state import Settings

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Header:
    """What the scheduler was made with.

    Attributes:
        machine: that it schedules.
        settings: what the operator chose.
        format: of the file.
    """

    machine: Machine
    settings: Settings
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Entry:
    """An event, and the commands that it led to.

    Attributes:
        line: of the file, counted from 1.
        event: that the scheduler was told.
        commands: in order.
    """

    line: int
    event: Event
    commands: tuple[Command, ...]


class _Fact(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    kind: str
    facts: msgspec.Raw


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    event: _Fact
    commands: tuple[_Fact, ...]


_EVENTS: Final[dict[str, Any]] = {one.__name__: one for one in get_args(Event)}
_COMMANDS: Final[dict[str, Any]] = {one.__name__: one for one in get_args(Command)}
_ENCODER: Final = msgspec.json.Encoder()


class JournalWriter:
    """Writes a journal. What `write` was given is with the kernel when it returns."""

    def __init__(self, path: Path, machine: Machine, settings: Settings) -> None:
        """Begin a file; one that is there already is overwritten.

        Args:
            path: of the file.
            machine: that the scheduler was made with, as settings.
            settings: see there.

        Raises:
            UsageError: it can't be written.
        """
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise UsageError(f"can't write the journal {path}: {error.strerror}") from None
        self._write(Header(machine, settings))

    def write(self, event: Event, commands: Sequence[Command]) -> None:
        """Append what a scheduler was told, and what it said.

        Raises:
            OSError: the file can't be written any more; the disk is full, for example.
        """
        self._write(_Line(_fact(event), tuple(map(_fact, commands))))

    def close(self) -> None:
        """End the file; a second time it does nothing."""
        self._file.close()

    def _write(self, item: Header | _Line) -> None:
        self._file.write(_ENCODER.encode(item) + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Journal:
    """A journal that is read, an entry at a time; a torn last line is left out."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            UsageError: there is no such file, or it is no journal.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                self.header = msgspec.json.decode(file.readline(), type=Header)
        except OSError as error:
            raise UsageError(f"can't read the journal {path}: {error.strerror}") from None
        except ValueError as error:  # msgspec's errors, and UnicodeDecodeError
            raise UsageError(f"{path}, line 1: expected a journal's header: {error}") from None
        if self.header.format != FORMAT:
            raise UsageError(
                f"{path}: the journal has format {self.header.format}, expected {FORMAT}"
            )

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in order.

        Raises:
            UsageError: a line is not what it should be.
        """
        with self._path.open("rb") as file:
            file.readline()
            for number, line in enumerate(file, 2):
                try:
                    found = msgspec.json.decode(line, type=_Line)
                    event = _of(found.event, _EVENTS)
                    commands = tuple(_of(one, _COMMANDS) for one in found.commands)
                except ValueError as error:
                    if not line.endswith(b"\n"):
                        return
                    where = f"{self._path}, line {number}"
                    raise UsageError(f"{where}: expected an event and commands: {error}") from None
                yield Entry(number, event, commands)


def _fact(what: Event | Command) -> _Fact:
    return _Fact(type(what).__name__, msgspec.Raw(_ENCODER.encode(what)))


def _of(fact: _Fact, kinds: dict[str, Any]) -> Any:
    if fact.kind not in kinds:
        raise ValueError(f"there is no {fact.kind!r}; there are {', '.join(kinds)}")
    return msgspec.json.decode(fact.facts, type=kinds[fact.kind])
