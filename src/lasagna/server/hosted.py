"""One model of an enclave's host, as a gateway sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lasagna.enclave import messages as m
from lasagna.errors import EnclaveLostError, LasagnaError, OverloadedError, PackageError
from lasagna.server.lifecycle import read_facts
from lasagna.server.link import EnclaveLink
from lasagna.server.served import (
    DEFAULT_SERVICE,
    STARTING_RETRY_S,
    ModelFacts,
    ServiceClass,
    State,
    Statistics,
    Status,
)
from lasagna.server.tickets import Records
from lasagna.units import Bytes

if TYPE_CHECKING:
    from lasagna.server.host import EnclaveHost

_R = TypeVar("_R", bound=m.Reply)


class HostedModel:
    """A package that an ``EnclaveHost`` serves; implements ``served.ServedModel``.

    Attributes:
        name: what clients call it.
        package: the sealed file.
        facts: what anybody may know of it.
        variant: that runs on this processor; empty before it was loaded.
        scheduled: whether the scheduler knows of it.
        failure: why it can't be served.
    """

    def __init__(self, package: Path, host: EnclaveHost) -> None:
        """Read the package's public part.

        Raises:
            PackageError: it can't be read, or is malformed.
        """
        self.name, self.facts = read_facts(package)
        self.package = package.resolve()
        self.variant = ""
        self.scheduled = False
        self.failure: LasagnaError | None = None
        self._host = host
        self._status = Status(State.STARTING, "the enclave is being started")

    @property
    def status(self) -> Status:
        """How it is now."""
        return self._status

    def become(self, state: State, reason: str = "") -> None:
        """It is in another state now. Failed and stopped are final."""
        if self._status.state not in (State.FAILED, State.STOPPED) or state is State.STOPPED:
            self._status = Status(state, reason)
        self._host.note_change()

    def reread(self) -> ModelFacts | None:
        """The package's facts as the file has them now; None if they are the same.

        Raises:
            PackageError: it can't be read any more, or is another model.
        """
        name, facts = read_facts(self.package)
        if name != self.name:
            raise PackageError(f"the package is now called {name!r}; it was {self.name!r}")
        return None if facts.digest == self.facts.digest else facts

    async def infer(
        self, request: m.SealedRows, timeout_s: float, service: ServiceClass = DEFAULT_SERVICE
    ) -> Records:
        """Answer one request; see ``served.ServedModel``."""
        return await self._host.infer(self, request, timeout_s, service)

    async def attest(self, nonce: bytes, timeout_s: float) -> bytes:
        """The enclave's evidence for a client; see ``served.ServedModel``."""
        link = self._link()
        command = m.Attest(link.next_id(), self.facts.digest, nonce)
        return (await self._ask(link, command, m.Attested, timeout_s)).document

    async def statistics(self, timeout_s: float) -> Statistics:
        """Plan and counters of the enclave; see ``served.ServedModel``."""
        host, link = self._host, self._link()
        counters = await self._ask(link, m.GetStats(link.next_id()), m.Stats, timeout_s)
        plan = self.facts.plan
        if plan is None:
            raise OverloadedError(f"{self.name} is still starting", STARTING_RETRY_S)
        peak = host.process.peak_bytes if host.process is not None else Bytes(0)
        errors = host.scheduler.prediction_errors
        return Statistics(host.config.budget, plan, counters, peak, errors)

    def _link(self) -> EnclaveLink:
        link = self._host.link
        if link is None or self.failure is not None:
            self._host.require_open(self)
            raise EnclaveLostError(f"{self.name}: {self._status.reason}")
        return link

    async def _ask(
        self, link: EnclaveLink, command: m.Command, expected: type[_R], timeout_s: float
    ) -> _R:
        """Ask the enclave something; an impatient caller doesn't make it dead."""
        try:
            async with asyncio.timeout(timeout_s):
                return await link.call(command, expected, self._host.config.answer_timeout_s)
        except TimeoutError:
            raise self._host.too_late(self, timeout_s) from None

    async def settled(self) -> Status:
        """Wait until the model is ready or will never be; tell which."""
        return await self.until(State.READY, State.FAILED, State.STOPPED)

    async def until(self, *states: State) -> Status:
        """Wait until the model is in one of these states; tell which."""
        while self._status.state not in states:
            await self._host.next_change()
        return self._status
