"""Promise: no sequence of commands that are well formed but otherwise without sense ends the
enclave, and in between it answers honest requests rightly."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from lasagna.bench.direct import InsecureDirectEnclave
from lasagna.enclave import messages as m
from lasagna.package.forms import Form

from .asking import BUDGET, HELD, assert_answer, client, give, in_stages, part, results, slices
from .conftest import Sealed

pytestmark = pytest.mark.integration

COMMANDS = 40
TURNS = 4


class Chaos:
    """Draws commands from values that are right, almost right, or at the end of their range."""

    def __init__(self, seed: int, enclave: InsecureDirectEnclave, sealed: Sealed) -> None:
        self._chance = random.Random(seed)  # noqa: S311 - a test's
        self._enclave, self._sealed = enclave, sealed
        (self._variant,) = sealed.manifest.variants
        self._requests = [client(enclave, sealed, rows, rows)[1] for rows in (1, 2, 4)]

    def command(self) -> m.Command:
        draw, id_ = self._chance.random(), self._enclave.next_id()
        digest = self._enclave.digest if self._chance.random() < 0.98 else bytes(32)
        if draw < 0.06:
            return self._arrange(id_, digest)
        if draw < 0.4:
            return self._walk(id_)
        if draw < 0.7:
            return self._run(id_, digest)
        if draw < 0.75:
            return m.Forget(id_, self._chance.randrange(4))
        if draw < 0.85:
            return m.Pin(id_, digest, self._slice())
        if draw < 0.95:
            return m.Unpin(id_, digest, self._slice())
        others: list[m.Command] = [
            m.TakeSpans(id_, draw < 0.97),
            m.GetStats(id_),
            m.Load(id_, b""),
            m.Attest(id_, digest),
            m.Unload(id_, digest),
            m.RequestKeys(id_, self._chance.choice(["/nowhere", "/tmp", "/dev/null", "\0"])),  # noqa: S108
        ]
        return self._chance.choice([one for one in others if self._may(one)])

    def _may(self, command: m.Command) -> bool:
        """All but unload the model when nothing is arranged: it would not come again."""
        return not isinstance(command, m.Unload) or command.model != self._enclave.digest

    def _walk(self, id_: int) -> m.Run:
        """A row through a stage, as it should be if it stands there."""
        end = len(self._variant.slices)
        first, last = self._chance.choice(list(pairwise([0, 3, 6, end])))
        number = self._chance.randrange(3)
        request = self._requests[number]
        row = self._chance.randrange(request.rows.rows)
        one = m.Part(number, row, 1) if first else part(number, request, row, 1)
        return m.Run(id_, self._enclave.digest, first, last, (one,), last < end)

    def _run(self, id_: int, digest: bytes) -> m.Run:
        first, last = self._slice(), self._slice()
        if self._chance.random() < 0.8:
            first, last = min(first, last), max(first, last)
        parts = [self._part() for _ in range(self._chance.choice([1, 1, 2, 3]))]
        if self._chance.random() < 0.8:
            kind = parts[0].sealed is None
            parts = [one for one in parts if (one.sealed is None) == kind]
        keep = self._chance.random() < 0.6
        return m.Run(id_, digest, first, max(1, last), tuple(parts), keep)

    def _slice(self) -> int:
        count = len(self._variant.slices)
        return self._chance.choice([0, 0, 3, 3, 6, 6, count, count, count - 1, count + 1, 2**20])

    def _part(self) -> m.Part:
        number = self._chance.randrange(4)
        request = self._requests[min(number, 2)]
        first = self._chance.choice([0, 0, 0, 1, 2, 4095])
        count = self._chance.choice([1, 1, 1, 2, 4, 4096])
        if self._chance.random() < 0.5:
            return m.Part(number, first, count)
        return part(number, request, first, count)

    def _arrange(self, id_: int, digest: bytes) -> m.Arrange:
        """Right, but for one or two things."""
        wrong = self._chance.sample(range(13), self._chance.choice([0, 0, 1, 2]))

        def one(number: int, right: Any, *others: Any) -> Any:
            return self._chance.choice(others) if number in wrong else right

        good = in_stages(self._sealed, digest, (3, 6), threads=2)
        form = self._chance.choice([Form.SLICED] * 4 + [Form.WHOLE, Form.FROZEN, Form.VANILLA])
        end = len(self._variant.slices) if form is Form.SLICED else 1
        cuts = one(0, (3, 6), (3,), (), (6, 3)) if end > 1 else ()
        stages = tuple(
            m.StageWish(first, max(last, 1), one(1, 4, 1, 8, 4096), one(2, HELD, 0, 1, 2**16))
            for first, last in pairwise([0, *cuts, one(3, end, end + 1)])
        )
        pinned = tuple(self._slice() for _ in range(self._chance.choice([0, 0, 3, 20])))
        wish = m.ModelWish(digest, form, stages, pinned)

        def size(number: int, right: int) -> int:
            found = one(number, right, right // 2, right // 4, 2 * right, 0, 1, 2**53)
            return int(found)

        return m.Arrange(
            id_,
            (wish,) * one(4, 1, 0, 2),
            one(12, 2, 1, 3, 1024),
            one(5, 2, 1, 0, 64),
            size(6, good.slot_bytes),
            one(7, 2, 0, 256),
            size(8, good.input_bytes),
            size(9, good.activation_bytes),
            size(10, good.workspace_bytes * (1 if end > 1 else 4)),
        )


@pytest.fixture(scope="module")
def running(squeezenet: Sealed) -> Iterator[InsecureDirectEnclave]:
    with InsecureDirectEnclave(squeezenet.path, squeezenet.keys, BUDGET, threads=2) as enclave:
        yield enclave


class Answers:
    """Reads them as they come, for a host that only ever sends would wait for itself."""

    def __init__(self, enclave: InsecureDirectEnclave) -> None:
        self._enclave = enclave
        self.kinds: Counter[str] = Counter()

    def until(self, commands: set[int]) -> None:
        while commands:
            reply = self._enclave._receive()
            commands.remove(reply.id)
            self.kinds[reply.kind if isinstance(reply, m.Failed) else type(reply).__name__] += 1


@pytest.mark.parametrize("seed", range(6))
def test_every_command_is_answered_and_honest_requests_rightly(
    running: InsecureDirectEnclave, squeezenet: Sealed, seed: int
) -> None:
    chaos, answers = Chaos(seed, running, squeezenet), Answers(running)
    give(running, in_stages(squeezenet, running.digest, (3, 6), threads=2))
    for turn in range(TURNS):
        commands = [chaos.command() for _ in range(COMMANDS)]
        reader = threading.Thread(
            target=answers.until, args=({command.id for command in commands},), daemon=True
        )
        reader.start()
        for command in commands:
            running.send(command)
        reader.join(60)
        assert not reader.is_alive(), "a command is not answered"
        give(running, in_stages(squeezenet, running.digest, (3, 6), threads=2))
        running.call(m.Forget(running.next_id(), 9), m.Done)
        values, request = client(running, squeezenet, 2, turn)
        (found,) = results(running, [part(9, request)], 0, slices(squeezenet))
        assert_answer(running, squeezenet, values, request, found)
    assert min(answers.kinds[kind] for kind in ("Ran", "Done", "Arranged")) > 1, answers.kinds
