"""Carries out what the scheduler decides: its commands as messages to the enclave, and back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias, assert_never

from lasagna.enclave import messages as m
from lasagna.enclave.frames import ERRORS
from lasagna.errors import (
    BudgetError,
    EnclaveError,
    EnclaveLostError,
    InvalidInputError,
    LasagnaError,
    OverloadedError,
    PackageError,
    ProtocolError,
)
from lasagna.package.forms import choose_variant
from lasagna.package.reader import Package
from lasagna.policy import events as e
from lasagna.policy.costs import Forms
from lasagna.policy.memory import divide_best, repin
from lasagna.server.costs import arrange_message, forms_of
from lasagna.server.plan_facts import plan_facts
from lasagna.server.served import State
from lasagna.server.tickets import parts_of

if TYPE_CHECKING:
    from lasagna.server.host import EnclaveHost
    from lasagna.server.hosted import HostedModel
    from lasagna.server.link import EnclaveLink

_Work: TypeAlias = Coroutine[Any, Any, None]
_log: Final = logging.getLogger(__name__)


class Driver:
    """One host's hands."""

    def __init__(self, host: EnclaveHost) -> None:
        """Work for this host."""
        self._host = host

    def forms(self, model: HostedModel, block: int) -> Forms:
        """A model's costs, from its package."""
        with Package(model.package) as package:
            variant = choose_variant(package.manifest.variants, block)
        return forms_of(variant, model.facts.max_rows, paged=self._host.policy.paged)

    def carry_out(self, command: e.Command) -> None:
        """Begin one command; what takes time ends with an event."""
        host = self._host
        match command:
            case e.Run():
                if host.link is not None:
                    host.spawn(self._run(host.link, command, self._message(host.link, command)))
            case e.Answer(request):
                if (ticket := host.tickets.get(request)) is not None:
                    self._finish(ticket.number)
            case e.Refuse(request, retry_after_s, reason):
                if (ticket := host.tickets.get(request)) is not None:
                    ticket.refuse(OverloadedError(f"{ticket.model}: {reason}", retry_after_s))
            case e.GiveUp(request, reason):
                if (ticket := host.tickets.get(request)) is not None:
                    ticket.refuse(ticket.error or EnclaveLostError(reason))
            case e.Forget(request):
                self._send(self._forget(request))
            case e.Plan():
                host.spawn(self._plan(command))
            case e.Arrange():
                self._send(self._arrange(command))
            case e.Pin() | e.Unpin():
                self._send(self._move(command))
            case _:
                assert_never(command)

    def _send(self, work: _Work) -> None:
        if self._host.link is not None:
            self._host.spawn(work)
        else:
            work.close()  # the enclave is gone, and the scheduler is about to be told

    def _finish(self, number: int) -> None:
        try:
            self._host.tickets[number].finish()
        except ProtocolError as error:
            self._lose(error)

    def _lose(self, error: EnclaveError) -> None:
        """The enclave is no longer to be relied on; the supervisor sees the link's end."""
        if self._host.link is not None:
            self._host.link.end(error)

    @property
    def _link(self) -> EnclaveLink:
        link = self._host.link
        if link is None:
            raise EnclaveLostError("the enclave is gone")
        return link

    async def _run(self, link: EnclaveLink, command: e.Run, message: m.Run) -> None:
        host = self._host
        model = host.models[command.model]
        try:
            reply = await link.call(message, m.Ran, host.config.answer_timeout_s)
            if len(reply.results) != len(command.batch):
                raise ProtocolError(f"{len(reply.results)} results for {len(command.batch)} parts")
            self._note(command, reply)
        except (EnclaveLostError, ProtocolError) as error:
            self._lose(error)
        except LasagnaError as error:
            if isinstance(error, InvalidInputError):  # a batch that should not have been made
                _log.error("%s: run %d: %s", command.model, command.run, error)
            for rows in command.batch:
                if (ticket := host.tickets.get(rows.request)) is not None:
                    ticket.error = error
            if isinstance(error, PackageError):
                host.fail(model, error)
            host.tell(e.RunFailed(_now(), command.run))

    def _message(self, link: EnclaveLink, command: e.Run) -> m.Run:
        host = self._host
        _log.debug(
            "%s: batch %d, slices %d to %d, of %s",
            *(command.model, command.run, command.first, command.last, command.batch),
        )
        plan = host.scheduler.plan
        assert plan is not None
        tickets = [host.tickets[rows.request] for rows in command.batch]
        return m.Run(
            link.next_id(),
            host.models[command.model].facts.digest,
            command.first,
            command.last,
            parts_of(tickets, command.batch, sealed=command.first == 0),
            command.last < len(plan.costs[command.model].slices),
        )

    def _note(self, command: e.Run, reply: m.Ran) -> None:
        """Hand out what came back, then tell the scheduler."""
        host = self._host
        host.alive()
        for rows, result in zip(command.batch, reply.results, strict=True):
            ticket = host.tickets.get(rows.request)
            if ticket is None:
                continue
            if result.kind:
                ticket.refuse(ERRORS.get(result.kind, EnclaveError)(result.error))
                host.tell(e.Cancelled(_now(), rows.request))
            elif result.records:
                ticket.collect(rows, result)
        times = reply.timings
        host.tell(
            e.Ran(
                _now(),
                command.run,
                times.compute_s,
                times.load_bytes,
                times.load_s,
                times.open_s + times.seal_s,
            )
        )

    async def _forget(self, request: int) -> None:
        try:
            link = self._link
            await link.call(
                m.Forget(link.next_id(), request), m.Done, self._host.config.answer_timeout_s
            )
        except EnclaveError as error:
            self._lose(error)

    async def _plan(self, command: e.Plan) -> None:
        """Work it out on a thread: requests go on meanwhile."""
        start = time.perf_counter()

        def work() -> e.Planned:
            best = divide_best(command.models, command.demand, command.machines, command.style)
            kept = command.present
            if kept is not None:
                kept = repin(kept, command.demand, command.machines[0])
            return e.Planned(0.0, best, kept)

        try:
            planned = await asyncio.to_thread(work)
        except BudgetError as error:
            for name in command.models:
                self._host.fail(self._host.models[name], error)
            return
        _log.info("memory planned in %.2f s", time.perf_counter() - start)
        self._host.tell(replace(planned, at_s=_now()))

    async def _arrange(self, command: e.Arrange) -> None:
        host, plan = self._host, command.plan
        names = () if plan is None else tuple(plan.costs)
        digests = {name: model.facts.digest for name, model in host.models.items()}
        try:
            link = self._link
            message = arrange_message(link.next_id(), plan, digests)
            done = await link.call(message, m.Arranged, host.config.load_timeout_s)
        except (EnclaveLostError, ProtocolError) as error:
            self._lose(error)
            return
        except LasagnaError as error:
            for name in names:
                host.fail(host.models[name], error)
            return
        if done.refused:
            refused = next(
                model for model in host.models.values() if digests[model.name] == done.refused
            )
            host.fail(refused, ERRORS.get(done.kind, EnclaveError)(done.error))
            host.tell(e.Arranged(_now(), failed=True))
            return
        _log.info("%s: memory arranged in %.2f s", ", ".join(names), done.arrange_s)
        for name in names:
            model = host.models[name]
            if model.failure is None and plan is not None:
                facts = plan_facts(plan, name, model.variant)
                model.facts = replace(model.facts, plan=facts)
                model.become(State.READY)
        host.tell(e.Arranged(_now()))

    async def _move(self, command: e.Pin | e.Unpin) -> None:
        host = self._host
        digest = host.models[command.model].facts.digest
        try:
            link = self._link
            kind = m.Pin if isinstance(command, e.Pin) else m.Unpin
            message = kind(link.next_id(), digest, command.slice)
            await link.call(message, m.Done, host.config.answer_timeout_s)
        except (EnclaveLostError, ProtocolError) as error:
            self._lose(error)
        except LasagnaError as error:
            _log.warning("%s: slice %d stays: %s", command.model, command.slice, error)
            host.tell(e.Moved(_now(), failed=True))
        else:
            host.tell(e.Moved(_now()))


def _now() -> float:
    return asyncio.get_running_loop().time()
