"""Promise: a journal holds all that a scheduler decides by; replayed, it decides the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.sim.cases import MACHINE, MB, load, model

from lasagna.errors import UsageError
from lasagna.journal import Journal, JournalWriter
from lasagna.policy.events import Arrived, Cancelled
from lasagna.policy.state import Settings
from lasagna.sim.clock import Clock
from lasagna.sim.enclave import VirtualEnclave
from lasagna.sim.planner import Planner
from lasagna.sim.replay import replay

SETTINGS = Settings(queue_rows=10, weights={"t": 2.0})


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A journal with models, plans, moves of pins, refusals, cancellations and a death."""
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    models = {name: (model(6, 0.05, weight=12 * MB, max_rows=4),) for name in "ab"}
    clock = Clock()
    with JournalWriter(path, MACHINE, SETTINGS) as writer:
        enclave = VirtualEnclave(
            clock, MACHINE, SETTINGS, Planner(), lambda _: None, heard=writer.write
        )
        enclave.start(models)

        def arrive(facts: tuple[int, Any]) -> None:
            number, one = facts
            deadline_s = clock.now_s + 1.0 if number % 5 == 0 else None
            enclave.tell(Arrived(clock.now_s, number, one.model, 1, "t", deadline_s))
            if number % 7 == 0:
                enclave.tell(Cancelled(clock.now_s, number))

        arrivals = [*load(1, 20.0, 6.0, "a"), *load(2, 20.0, 6.0, "b")]
        for number, one in enumerate(sorted(arrivals), 1):
            clock.at(one.at_s + (6.0 if one.model == "b" else 0.0), arrive, (number, one))
        clock.at(3.0, enclave.die, 0.4)
        clock.run()
    return path.read_bytes().splitlines(keepends=True)


@pytest.fixture
def journal(lines: list[bytes], tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"".join(lines))
    return path


def test_a_fresh_scheduler_decides_the_same(journal: Path) -> None:
    """Every command is the recorded one, over plans, deaths and refusals."""
    assert replay(journal) is None
    kinds = {type(one).__name__ for entry in Journal(journal) for one in entry.commands}
    kinds |= {type(entry.event).__name__ for entry in Journal(journal)}
    assert kinds >= {"Run", "Answer", "Refuse", "Plan", "Planned", "Arrange", "EnclaveLost"}


@pytest.mark.parametrize("kind", ["Arrived", "Ran", "Planned"])
def test_an_altered_event_is_found(journal: Path, lines: list[bytes], kind: str) -> None:
    """Replay is a check: it notices what happened otherwise, at the line or after it."""
    changes: dict[str, dict[str, Any]] = {
        "Arrived": {"request": 10**9},
        "Ran": {"run": 10**9},
        "Planned": {},
    }
    number = next(n for n, line in enumerate(lines) if f'"kind":"{kind}"'.encode() in line[:40])
    altered = json.loads(lines[number])
    altered["event"]["facts"].update(changes[kind])
    if kind == "Planned":
        altered["event"]["facts"]["best"]["pinned"]["a"] = []
    journal.write_bytes(
        b"".join([*lines[:number], json.dumps(altered).encode() + b"\n", *lines[number + 1 :]])
    )
    found = replay(journal)
    assert found is not None
    assert found.line >= number + 1
    assert found.error or found.recorded != found.replayed


def test_a_missing_command_is_found(journal: Path, lines: list[bytes]) -> None:
    """And what the recorded scheduler did not say, the fresh one does."""
    number = next(n for n, line in enumerate(lines) if b'"kind":"Run"' in line)
    altered = json.loads(lines[number])
    altered["commands"] = []
    journal.write_bytes(b"".join([*lines[:number], json.dumps(altered).encode() + b"\n"]))
    found = replay(journal)
    assert found is not None
    assert (found.line, found.recorded) == (number + 1, ())
    assert found.replayed


def test_a_torn_last_line_is_left_out(journal: Path, lines: list[bytes]) -> None:
    """Whoever kills the recorder loses the last line at most."""
    journal.write_bytes(b"".join([*lines[:20], lines[20][:-9]]))
    assert replay(journal) is None
    assert [entry.line for entry in Journal(journal)] == list(range(2, 21))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{}\n", "event"),
        (b'{"event": {"kind": "Nap", "facts": {}}, "commands": []}\n', "Nap"),
        (b'{"event": {"kind": "Moved", "facts": {}}, "commands": []}\n', "at_s"),
        (b"\xff\n", "line 2"),
    ],
)
def test_a_bad_line_is_named(journal: Path, lines: list[bytes], line: bytes, why: str) -> None:
    """A journal from outside is not trusted to be one."""
    journal.write_bytes(lines[0] + line)
    with pytest.raises(UsageError, match=why):
        replay(journal)


def test_what_is_no_journal_is_refused(tmp_path: Path, lines: list[bytes]) -> None:
    """Another file, another format, no file."""
    path = tmp_path / "file"
    with pytest.raises(UsageError, match="can't read"):
        replay(path)
    path.write_bytes(b"[]\n")
    with pytest.raises(UsageError, match="line 1"):
        replay(path)
    path.write_bytes(lines[0].replace(b'"format":1', b'"format":9'))
    with pytest.raises(UsageError, match="format 9"):
        replay(path)
    with pytest.raises(UsageError, match="can't write"):
        JournalWriter(tmp_path / "no" / "folder", MACHINE, SETTINGS)
