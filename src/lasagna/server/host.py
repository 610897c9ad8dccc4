"""One enclave and the models in it: what lies between a gateway and the enclave's socket.

All choices are made by ``policy.scheduler``; here is the input and output around it. One supervisor
starts the enclave, loads the models, and starts again when the enclave dies. Every command of the
scheduler that takes time is a task, at whose end the scheduler is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from lasagna.enclave import messages as m
from lasagna.errors import (
    BudgetError,
    EnclaveError,
    EnclaveLostError,
    InvalidInputError,
    LasagnaError,
    OverloadedError,
    PackageError,
    ProtocolError,
    TrustError,
    UsageError,
)
from lasagna.journal import JournalWriter
from lasagna.policy import events as e
from lasagna.policy.baselines import policy_named
from lasagna.policy.plan import style_for
from lasagna.policy.scheduler import Scheduler
from lasagna.policy.state import Settings
from lasagna.server.costs import machine_of
from lasagna.server.driver import Driver
from lasagna.server.hosted import HostedModel
from lasagna.server.lifecycle import (
    HostConfig,
    backoff_s,
    enclave_life,
    ends_within,
    load_model,
    may_wait,
    rows_limit,
    stop_enclave,
)
from lasagna.server.link import EnclaveLink
from lasagna.server.recording import Recording
from lasagna.server.release import KeyRelay
from lasagna.server.served import STARTING_RETRY_S, ServiceClass, State
from lasagna.server.tickets import Records, Ticket
from lasagna.tee.backend import EnclaveBackend, RunningEnclave

_log: Final = logging.getLogger(__name__)
_LASTING: Final = (BudgetError, PackageError, TrustError, UsageError)
"""What a new start would not change."""


class EnclaveHost:
    """Serves packages from one enclave.

    Use it as an asynchronous context: inside, the enclave is kept running; at the end it is gone.

    Attributes:
        models: by name.
        scheduler: decides; only ``tell`` may change it.
        tickets: requests that somebody waits for, by number.
        link: to the enclave, while one is loaded.
        process: that the enclave is, while there is one.
    """

    def __init__(
        self,
        packages: Sequence[Path],
        config: HostConfig,
        backend: EnclaveBackend,
        relay: KeyRelay,
        socket_dir: Path,
    ) -> None:
        """Read the packages' public parts; nothing is started.

        Args:
            packages: the sealed files.
            config: see ``HostConfig``.
            backend: starts the enclave.
            relay: the way to the key broker.
            socket_dir: for sockets; accessible to nobody else.

        Raises:
            PackageError: a package can't be read, or is malformed.
            UsageError: two packages have one name, the policy is unknown, or the journal can't be
                written.
        """
        self.config = config
        self.policy = policy_named(config.policy)
        self.models: dict[str, HostedModel] = {}
        self.tickets: dict[int, Ticket] = {}
        self.link: EnclaveLink | None = None
        for package in packages:
            model = HostedModel(package, self)
            if model.name in self.models:
                raise UsageError(f"two packages are called {model.name!r}")
            self.models[model.name] = model
        machine = machine_of(config.budget, config.threads, paged=self.policy.paged)
        settings = Settings(
            queue_rows=config.queue_limit,
            patience_s=config.patience_s,
            weights=config.tenant_weights,
            style=style_for(config.objective, self.policy.style),
            in_order=self.policy.in_order,
        )
        self.scheduler = Scheduler(machine, settings)
        self._journal: JournalWriter | None = None
        if config.journal is not None:
            self._journal = JournalWriter(config.journal, machine, settings)
        self._driver = Driver(self)
        self._recording: Recording | None = None
        self._backend = backend
        self._relay = relay
        self._socket_dir = socket_dir.resolve()
        self._title = ", ".join(self.models)
        self._changed = asyncio.Event()
        self.process: RunningEnclave | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_id = 0
        self._deaths = 0
        self._stopping = False
        self._supervisor: asyncio.Task[None] | None = None

    # What models are asked.

    async def infer(
        self, model: HostedModel, request: m.SealedRows, timeout_s: float, service: ServiceClass
    ) -> Records:
        """Answer one request; see ``served.ServedModel``."""
        self.require_open(model)
        if request.rows > model.facts.max_rows:
            raise InvalidInputError(
                f"{request.rows} rows in one request; this server takes up to "
                f"{model.facts.max_rows} of this model: split the request"
            )
        loop = asyncio.get_running_loop()
        self._last_id += 1
        ticket = Ticket(self._last_id, model.name, request, loop.create_future())
        self.tickets[ticket.number] = ticket
        now_s = loop.time()
        deadline_s = None if service.deadline_s is None else now_s + service.deadline_s
        arrived = e.Arrived(
            now_s,
            ticket.number,
            model.name,
            request.rows,
            service.tenant,
            deadline_s,
            service.priority,
        )
        try:
            self.tell(arrived)
            async with asyncio.timeout(timeout_s):
                return await ticket.answer
        except TimeoutError:
            raise self.too_late(model, timeout_s) from None
        finally:
            del self.tickets[ticket.number]
            if ticket.answer.cancelled() or not ticket.answer.done():
                self.tell(e.Cancelled(loop.time(), ticket.number))
            self.note_change()

    # Starting and stopping.

    async def __aenter__(self) -> Self:
        self._supervisor = asyncio.create_task(self._supervise(), name=f"host of {self._title}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop(drain_s=0.0)

    async def stop(self, drain_s: float) -> None:
        """Refuse new requests, finish those that are here, and end the enclave.

        Args:
            drain_s: how long this may take; then requests are refused and the enclave is killed.
        """
        for model in self.models.values():
            model.become(State.STOPPED, "the server is shutting down")
        self._stopping = True
        await ends_within(self._drain(), drain_s)
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            if self._all_failed:  # then it ends by itself, and sees the enclave to its grave
                await asyncio.wait([supervisor], timeout=2 * self.config.exit_timeout_s)
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        self._refuse_all(self._shutting_down())
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    async def _drain(self) -> None:
        while self.tickets and not self._all_failed:
            await self.next_change()
        if self._recording is not None:
            await self._recording.close(self.link)
        if self.link is not None:
            await stop_enclave(self.link, self.config)

    # The supervisor.

    @property
    def _all_failed(self) -> bool:
        return all(model.failure is not None for model in self.models.values())

    @property
    def _done(self) -> bool:
        return self._all_failed or (self._stopping and not self.tickets)

    async def _supervise(self) -> None:
        while not self._done:
            try:
                await self._live()
            except _LASTING as error:
                self._fail_all(error)
            except (LasagnaError, OSError) as error:
                if not self._done:
                    await self._mourn(error)
            except Exception as error:
                _log.exception("%s: a bug in the host", self._title)
                self._fail_all(EnclaveError(f"internal error of the host: {error!r}"))

    async def _live(self) -> None:
        """One life of the enclave, which always ends with an error."""
        life = enclave_life(self._backend, self.config, self._socket_dir, self._title)
        async with life as (link, self.process):
            hello = await link.hello(self.config.start_timeout_s)
            try:
                for model in self.models.values():
                    if model.failure is None:
                        await self._load(link, model, hello.block)
                if self._all_failed:
                    raise EnclaveLostError("no model can be served")
                self.link = link
                if self.config.trace is not None:
                    self._record(link, self.process)
                self.tell(e.EnclaveReady(asyncio.get_running_loop().time()))
                raise await link.ended()
            finally:
                self.link = None
                for model in self.models.values():
                    model.become(State.RESTARTING, "the enclave is gone")
                link.end(EnclaveLostError("the host lets go of the enclave"))
                await asyncio.gather(*self._tasks, return_exceptions=True)
                self.tell(e.EnclaveLost(asyncio.get_running_loop().time()))

    async def _load(self, link: EnclaveLink, model: HostedModel, block: int) -> None:
        """Bring one model into the enclave; one that can't be does not keep the others out."""
        loop = asyncio.get_running_loop()
        try:
            newer = await asyncio.to_thread(model.reread)
            if newer is not None and model.scheduled:
                model.scheduled = False
                self.tell(e.ModelRemoved(loop.time(), model.name))
            facts = newer or model.facts
            model.facts = replace(facts, max_rows=rows_limit(facts, self.config))
            loaded = await load_model(link, model.package, self._relay, self.config)
            if loaded.model != model.facts.digest:
                raise ProtocolError("the package changed while it was loaded")
            model.variant = loaded.variant
            if not model.scheduled:
                forms = await asyncio.to_thread(self._driver.forms, model, block)
                self.tell(e.ModelAdded(loop.time(), model.name, forms))
                model.scheduled = True
            _log.info("%s: keys loaded in %.2f s", model.name, loaded.load_s)
        except _LASTING as error:
            self.fail(model, error)

    def _record(self, link: EnclaveLink, process: RunningEnclave) -> None:
        assert self.config.trace is not None
        if self._recording is None:
            self._recording = Recording(
                self.config.trace,
                {name: model.facts.digest for name, model in self.models.items()},
                self.config.threads,
                emulated=self.config.traced_as,
                policy=self.policy.name,
            )
        self.spawn(self._recording.follow(link, process.pid))

    async def _mourn(self, error: Exception) -> None:
        self._deaths += 1
        pause_s = backoff_s(self._deaths)
        _log.warning(
            "%s: %s (death %d in a row; next start in %g s)",
            self._title,
            error,
            self._deaths,
            pause_s,
        )
        for model in self.models.values():
            state = State.STARTING if model.facts.plan is None else State.RESTARTING
            model.become(state, f"the enclave is being started again: {error}")
        if not may_wait(self._deaths):
            reason = EnclaveLostError(f"the enclave died {self._deaths} times in a row: {error}")
            self._refuse_all(reason)
        await asyncio.sleep(pause_s)

    # What the driver calls.

    def tell(self, event: e.Event) -> None:
        """Give the scheduler an event, and carry out what it decides."""
        commands = self.scheduler.handle(event)
        if self._journal is not None:
            self._journal.write(event, commands)
        for command in commands:
            self._driver.carry_out(command)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task that belongs to this life of the enclave."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def alive(self) -> None:
        """The enclave has answered a request."""
        self._deaths = 0

    def fail(self, model: HostedModel, error: LasagnaError) -> None:
        """A model can't be served any more; the others can."""
        if model.failure is not None:
            return
        # A model that was never ready has somebody who waits for it to settle, and is told.
        level = logging.DEBUG if model.facts.plan is None else logging.ERROR
        _log.log(level, "%s: failed: %s", model.name, error)
        model.failure = error
        for ticket in [one for one in self.tickets.values() if one.model == model.name]:
            ticket.refuse(error)
        if model.scheduled:
            model.scheduled = False
            self.tell(e.ModelRemoved(asyncio.get_running_loop().time(), model.name))
        model.become(State.FAILED, str(error))
        if self._all_failed and self.link is not None:
            self.link.end(EnclaveLostError("no model can be served"))

    def note_change(self) -> None:
        """Wake whoever waits in ``next_change``."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def next_change(self) -> None:
        """Wait until a model's state or the queue is another one."""
        await self._changed.wait()

    # Small steps.

    def _fail_all(self, error: LasagnaError) -> None:
        for model in self.models.values():
            self.fail(model, error)

    def require_open(self, model: HostedModel) -> None:
        """Refuse what can't be served now, not even after waiting a little."""
        if self._stopping:
            raise self._shutting_down()
        if model.failure is not None:
            raise model.failure.again()
        if self.link is None and not may_wait(self._deaths):
            raise EnclaveLostError(f"{model.name}: {model.status.reason}")
        if model.facts.plan is None:
            raise OverloadedError(f"{model.name} is still starting", STARTING_RETRY_S)

    def _refuse_all(self, error: LasagnaError) -> None:
        for ticket in list(self.tickets.values()):
            ticket.refuse(error)
            self.tell(e.Cancelled(asyncio.get_running_loop().time(), ticket.number))

    def _shutting_down(self) -> OverloadedError:
        return OverloadedError("the server is shutting down", STARTING_RETRY_S)

    def too_late(self, model: HostedModel, timeout_s: float) -> LasagnaError:
        """What somebody is told who would not wait longer."""
        late = f"{model.name}: no answer within {timeout_s:g} s"
        if self.link is None:
            return EnclaveLostError(f"{late}: {model.status.reason}")
        waiting = self.scheduler.waiting_rows
        wait_s = self.scheduler.backlog_s(asyncio.get_running_loop().time())
        return OverloadedError(f"{late}; {waiting} rows wait", wait_s)
