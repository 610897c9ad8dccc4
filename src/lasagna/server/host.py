"""One model in one enclave: what a server does between its gateway and the enclave's socket.

All choices are made in ``fcfs``; here is the input and output around them. Two kinds of tasks run:
one supervisor, which starts the enclave, loads the model, and starts again when the enclave dies;
and one for each batch in the enclave, which sends it and hands out the answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

from lasagna.enclave.messages import (
    ERRORS,
    Attest,
    Attested,
    Command,
    GetStats,
    Infer,
    Inferred,
    Reply,
    SealedRows,
    Stats,
)
from lasagna.errors import (
    BudgetError,
    EnclaveError,
    EnclaveLostError,
    LasagnaError,
    OverloadedError,
    PackageError,
    ProtocolError,
    TrustError,
    UsageError,
)
from lasagna.server.fcfs import Batch, Fcfs, Places, backoff_s, may_wait
from lasagna.server.lifecycle import (
    HostConfig,
    enclave_life,
    ends_within,
    load_model,
    loaded_facts,
    read_facts,
    stop_enclave,
)
from lasagna.server.link import EnclaveLink
from lasagna.server.release import KeyRelay
from lasagna.server.served import ModelFacts, State, Statistics, Status
from lasagna.tee.backend import EnclaveBackend, RunningEnclave
from lasagna.units import Bytes

_log: Final = logging.getLogger(__name__)
_LASTING: Final = (BudgetError, PackageError, TrustError, UsageError)
"""What a new start would not change."""
_STARTING_RETRY_S: Final = 1.0

Records = tuple[tuple[bytes, ...], ...]
_R = TypeVar("_R", bound=Reply)


@dataclass(frozen=True, slots=True)
class _Ticket:
    """A request that somebody waits for."""

    request: SealedRows
    answer: asyncio.Future[Records]


class ModelHost:
    """Serves one package from one enclave; implements ``served.ServedModel``.

    Use it as an asynchronous context: inside, the enclave is kept running; at the end it is gone.
    """

    def __init__(
        self,
        package: Path,
        config: HostConfig,
        backend: EnclaveBackend,
        relay: KeyRelay,
        socket_dir: Path,
    ) -> None:
        """Read the package's public part; nothing is started.

        Args:
            package: the sealed file.
            config: see ``HostConfig``.
            backend: starts the enclave.
            relay: the way to the key broker.
            socket_dir: for sockets; accessible to nobody else.

        Raises:
            PackageError: the package can't be read, or is malformed.
        """
        self.name, self._facts = read_facts(package)
        self._package = package.resolve()
        self._config = config
        self._backend = backend
        self._relay = relay
        self._socket_dir = socket_dir.resolve()
        self._status = Status(State.STARTING, "the enclave is being started")
        self._changed = asyncio.Event()
        self._failure: LasagnaError | None = None
        self._link: EnclaveLink | None = None
        self._process: RunningEnclave | None = None
        self._queue = Fcfs(Places(rows=1, batches=1), config.queue_limit)
        self._tickets: dict[int, _Ticket] = {}
        self._batches: set[asyncio.Task[None]] = set()
        self._last_id = 0
        self._deaths = 0
        self._stopping = False
        self._supervisor: asyncio.Task[None] | None = None

    # What the gateway asks.

    @property
    def status(self) -> Status:
        """How the model is now."""
        return self._status

    @property
    def facts(self) -> ModelFacts:
        """What anybody may know of it."""
        return self._facts

    async def infer(self, request: SealedRows, timeout_s: float) -> Records:
        """Answer one request; see ``served.ServedModel``."""
        self._require_open()
        self._last_id += 1
        number = self._last_id
        self._queue.arrived(number, request.rows)
        answer: asyncio.Future[Records] = asyncio.get_running_loop().create_future()
        self._tickets[number] = _Ticket(request, answer)
        self._start_batches()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise self._too_late(timeout_s) from None
        finally:
            del self._tickets[number]
            self._queue.withdrawn(number)
            self._note_change()

    async def attest(self, nonce: bytes, timeout_s: float) -> bytes:
        """The enclave's evidence for a client; see ``served.ServedModel``."""
        link = self._require_link()
        return (await self._call(Attest(link.next_id(), nonce), Attested, timeout_s)).document

    async def statistics(self, timeout_s: float) -> Statistics:
        """Plan and counters of the enclave; see ``served.ServedModel``."""
        link = self._require_link()
        counters = await self._call(GetStats(link.next_id()), Stats, timeout_s)
        plan = self._facts.plan
        assert plan is not None  # or there would be no link
        peak = self._process.peak_bytes if self._process is not None else Bytes(0)
        return Statistics(self._config.budget, plan, counters, peak)

    # Starting and stopping.

    async def __aenter__(self) -> Self:
        self._supervisor = asyncio.create_task(self._supervise(), name=f"host of {self.name}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop(drain_s=0.0)

    async def settled(self) -> Status:
        """Wait until the model is ready or will never be; tell which."""
        return await self.until(State.READY, State.FAILED, State.STOPPED)

    async def until(self, *states: State) -> Status:
        """Wait until the model is in one of these states; tell which."""
        while self._status.state not in states:
            await self._next_change()
        return self._status

    async def stop(self, drain_s: float) -> None:
        """Refuse new requests, finish those that are here, and end the enclave.

        Args:
            drain_s: how long this may take; then requests are refused and the enclave is killed.
        """
        self._set_status(State.STOPPED, "the server is shutting down")
        self._stopping = True
        await ends_within(self._drain(), drain_s)
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        self._refuse(list(self._tickets), self._shutting_down())

    async def _drain(self) -> None:
        while not self._queue.idle and self._failure is None:
            await self._next_change()
        if self._link is not None:
            await stop_enclave(self._link, self._config)

    # The supervisor.

    @property
    def _done(self) -> bool:
        return self._failure is not None or (self._stopping and self._queue.idle)

    async def _supervise(self) -> None:
        while not self._done:
            try:
                await self._live()
            except _LASTING as error:
                self._failure = error
            except (LasagnaError, OSError) as error:
                if not self._done:
                    await self._mourn(error)
            except Exception as error:
                _log.exception("%s: a bug in the host", self.name)
                self._failure = EnclaveError(f"internal error of the host: {error!r}")
        if self._failure is not None:
            # A model that was never ready has somebody who waits for it to settle, and is told.
            level = logging.DEBUG if self._facts.plan is None else logging.ERROR
            _log.log(level, "%s: failed: %s", self.name, self._failure)
            self._refuse(self._queue.abandon(), self._failure)
            self._set_status(State.FAILED, str(self._failure))

    async def _live(self) -> None:
        """One life of the enclave, which always ends with an error."""
        name, public = await asyncio.to_thread(read_facts, self._package)
        if name != self.name:
            raise PackageError(f"the package is now called {name!r}; it was {self.name!r}")
        life = enclave_life(self._backend, self._config, self._socket_dir, self.name)
        async with life as (link, self._process):
            loaded = await load_model(link, self._package, self._relay, self._config)
            self._facts = loaded_facts(public, loaded, self._config.frame_limit)
            self._queue.places = Places(self._facts.max_rows, self._config.threads + 1)
            _log.info("%s: loaded in %.2f s", self.name, loaded.load_s)
            self._set_status(State.READY)
            self._link = link
            try:
                self._start_batches()
                raise await link.ended()
            finally:
                self._link = None
                self._set_status(State.RESTARTING, "the enclave is gone")
                link.end(EnclaveLostError("the host lets go of the enclave"))
                await asyncio.gather(*self._batches, return_exceptions=True)
                self._refuse(
                    self._queue.enclave_died(),
                    EnclaveLostError("the enclave died twice with this request in it"),
                )

    async def _mourn(self, error: Exception) -> None:
        self._deaths += 1
        pause_s = backoff_s(self._deaths)
        _log.warning(
            "%s: %s (death %d in a row; next start in %g s)",
            self.name,
            error,
            self._deaths,
            pause_s,
        )
        state = State.STARTING if self._facts.plan is None else State.RESTARTING
        self._set_status(state, f"the enclave is being started again: {error}")
        if not may_wait(self._deaths):
            reason = EnclaveLostError(f"the enclave died {self._deaths} times in a row: {error}")
            self._refuse(self._queue.abandon(), reason)
        await asyncio.sleep(pause_s)

    # Batches.

    def _start_batches(self) -> None:
        link = self._link
        if link is None:
            return
        while batch := self._queue.next_batch(asyncio.get_running_loop().time()):
            requests = tuple(self._tickets[number].request for number in batch.ids)
            command = Infer(link.next_id(), self._facts.digest, requests)
            _log.debug("%s: batch %d: requests %s", self.name, batch.number, batch.ids)
            task = asyncio.create_task(self._run(link, batch, command))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)

    async def _run(self, link: EnclaveLink, batch: Batch, command: Infer) -> None:
        try:
            reply = await link.call(command, Inferred, self._config.answer_timeout_s)
            if len(reply.results) != len(batch.ids):
                raise ProtocolError(f"{len(reply.results)} results for {len(batch.ids)} requests")
        except (EnclaveLostError, ProtocolError) as error:
            link.end(error)  # the supervisor sees it, and decides what becomes of the requests
            return
        except EnclaveError as error:  # perhaps over the values of one request
            given_up = self._queue.failed(batch.number, asyncio.get_running_loop().time())
            self._note_change()
            self._refuse(given_up, error)
        except LasagnaError as error:
            self._finished(batch)
            self._refuse(batch.ids, error)
            if isinstance(error, PackageError):
                self._failure = error
                link.end(EnclaveLostError("the package is no longer good"))
        else:
            self._deaths = 0
            self._finished(batch)
            for number, result in zip(batch.ids, reply.results, strict=True):
                if result.kind:
                    self._refuse([number], ERRORS.get(result.kind, EnclaveError)(result.error))
                elif (ticket := self._waiting(number)) is not None:
                    ticket.answer.set_result(result.records)
        self._start_batches()

    def _finished(self, batch: Batch) -> None:
        self._queue.finished(batch.number, asyncio.get_running_loop().time())
        self._note_change()

    # Small steps.

    def _require_open(self) -> None:
        if self._stopping:
            raise self._shutting_down()
        if self._failure is not None:
            raise self._failure.again()
        if self._link is None and not may_wait(self._deaths):
            raise EnclaveLostError(f"{self.name}: {self._status.reason}")
        if self._facts.plan is None:
            raise OverloadedError(f"{self.name} is still starting", _STARTING_RETRY_S)

    def _require_link(self) -> EnclaveLink:
        if self._link is None:
            self._require_open()
            raise EnclaveLostError(f"{self.name}: {self._status.reason}")
        return self._link

    async def _call(self, command: Command, expected: type[_R], timeout_s: float) -> _R:
        """Ask the enclave something; an impatient caller doesn't make it dead."""
        link = self._require_link()
        try:
            async with asyncio.timeout(timeout_s):
                return await link.call(command, expected, self._config.answer_timeout_s)
        except TimeoutError:
            raise self._too_late(timeout_s) from None

    def _refuse(self, numbers: Iterable[int], error: LasagnaError) -> None:
        for number in numbers:
            if (ticket := self._waiting(number)) is not None:
                ticket.answer.set_exception(error.again())

    def _waiting(self, number: int) -> _Ticket | None:
        ticket = self._tickets.get(number)
        return None if ticket is None or ticket.answer.done() else ticket

    def _shutting_down(self) -> OverloadedError:
        return OverloadedError("the server is shutting down", _STARTING_RETRY_S)

    def _too_late(self, timeout_s: float) -> LasagnaError:
        if self._link is None:
            return EnclaveLostError(
                f"{self.name}: no answer within {timeout_s:g} s: {self._status.reason}"
            )
        return OverloadedError(
            f"{self.name}: no answer within {timeout_s:g} s; {self._queue.waiting} requests wait",
            self._queue.retry_after_s(),
        )

    def _set_status(self, state: State, reason: str = "") -> None:
        if not self._stopping:
            self._status = Status(state, reason)
        self._note_change()

    def _note_change(self) -> None:
        """Wake whoever waits in ``_next_change``."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _next_change(self) -> None:
        await self._changed.wait()
