"""``lasagna serve``."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from lasagna.cli.broker import default_state
from lasagna.cli.options import listen
from lasagna.errors import LasagnaError, UsageError
from lasagna.tee.epc_profiles import End, end_named
from lasagna.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from lasagna.server.host import EnclaveHost
    from lasagna.server.hosted import HostedModel
    from lasagna.server.lifecycle import HostConfig
    from lasagna.server.plan_facts import PlanFacts
    from lasagna.server.release import BrokerRelay

DEFAULT_PORT: Final = 8000


class LogLevel(StrEnum):
    """What is logged, and all that is graver."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


_QUIT_AT_ONCE: Final = 130


@dataclass(frozen=True, slots=True)
class _Plan:
    """What was asked for on the command line."""

    packages: Sequence[Path]
    config: HostConfig
    listener: socket.socket
    broker: str | None
    local_keys: Sequence[Path]
    broker_state: Path
    socket_dir: Path | None
    drain_s: float
    emulated_epc: str | None
    epc_end: End


def serve(
    packages: Annotated[
        list[Path], typer.Argument(help="Sealed packages; one enclave serves them all.")
    ],
    budget: Annotated[
        str, typer.Option(help="Enclave memory for all models, such as 12MB or 93.5MiB.")
    ],
    broker: Annotated[
        str | None, typer.Option(help="URL of the key broker, such as http://keys:8100.")
    ] = None,
    insecure_local_broker: Annotated[
        list[Path] | None,
        typer.Option(
            "--insecure-local-broker",
            metavar="KEYFILE",
            help="Start a key broker here with this model's key file; may be repeated.",
        ),
    ] = None,
    broker_state: Annotated[
        Path | None, typer.Option(help="Folder of the local broker's own secrets.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that compute.")] = 1,
    max_batch: Annotated[
        int,
        typer.Option(
            min=1, max=4096, help="Rows of one request; and of one batch, if the budget allows it."
        ),
    ] = 32,
    queue_limit: Annotated[int, typer.Option(min=1, help="Rows that may wait.")] = 256,
    policy: Annotated[
        str,
        typer.Option(
            help="What decides what runs when; lasagna, dynamic-batch, on-demand or vanilla."
        ),
    ] = "lasagna",
    objective: Annotated[
        str,
        typer.Option(
            help="What counts most: throughput; or latency, where all threads compute one batch."
        ),
    ] = "throughput",
    tenant_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TENANT=WEIGHT",
            help="A tenant's share when the server is busy; others have 1. May be repeated.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 for any.")] = DEFAULT_PORT,
    socket_dir: Annotated[
        Path | None, typer.Option(help="Private folder for sockets; a temporary one by default.")
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for requests to finish when the server stops.")
    ] = 30.0,
    trace: Annotated[
        Path | None,
        typer.Option(help="Record what runs when in this file; see lasagna trace."),
    ] = None,
    insecure_emulate_epc: Annotated[
        str | None,
        typer.Option(
            metavar="PROFILE",
            help="Limit and slow the enclaves as an SGX platform would; see lasagna epc profiles.",
        ),
    ] = None,
    epc_end: Annotated[
        str, typer.Option(help="Of each range that PROFILE has: low, typical or high.")
    ] = "typical",
    log_level: Annotated[LogLevel, typer.Option(help="What is logged.")] = LogLevel.INFO,
) -> None:
    """Serve sealed models from enclaves, over the Open Inference Protocol v2.

    On this machine's backend an enclave is an ordinary process: everything works as under SGX, but
    nothing is protected. Ctrl-C finishes the requests that are here and stops; a second one quits.
    """
    from lasagna.gateway.run import keep_large_buffers, loop_factory
    from lasagna.policy.baselines import policy_named
    from lasagna.policy.plan import objective_named
    from lasagna.server.lifecycle import HostConfig

    if (broker is None) == (not insecure_local_broker):
        raise UsageError("name one key broker: --broker URL, or --insecure-local-broker KEYFILE")
    config = HostConfig(
        budget=parse_bytes(budget),
        threads=threads,
        max_batch=max_batch,
        queue_limit=queue_limit,
        policy=policy_named(policy).name,
        objective=objective_named(objective),
        tenant_weights=_weights(tenant_weight or ()),
        trace=trace,
        traced_as=insecure_emulate_epc or "",
    )
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    for noisy in ("asyncio", "httpcore", "httpx", "uvicorn"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with listen(host, port) as listener:
        plan = _Plan(
            packages=packages,
            config=config,
            listener=listener,
            broker=broker,
            local_keys=[path.resolve() for path in insecure_local_broker or ()],
            broker_state=(broker_state or default_state()).resolve(),
            socket_dir=socket_dir,
            drain_s=drain,
            emulated_epc=insecure_emulate_epc,
            epc_end=end_named(epc_end, "--epc-end"),
        )
        keep_large_buffers()
        gc.freeze()  # modules stay: collections then look at requests only
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(_serve(plan))
        except asyncio.CancelledError:
            raise typer.Exit(_QUIT_AT_ONCE) from None


async def _serve(plan: _Plan) -> None:
    from lasagna.gateway.app import gateway_app
    from lasagna.gateway.run import serving

    stop = asyncio.Event()
    _catch_signals(stop)
    async with contextlib.AsyncExitStack() as stack:
        folder = plan.socket_dir or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="lasagna-"))
        )
        _require_private(folder)
        host = await stack.enter_async_context(_host(plan, folder))
        async with serving(gateway_app(host.models), plan.listener), asyncio.TaskGroup() as tasks:
            shown = [tasks.create_task(_show(model)) for model in host.models.values()]
            await stop.wait()
            for task in shown:
                task.cancel()
            waiting = "finishing the requests that are here; Ctrl-C again quits at once"
            typer.echo(waiting, err=True)
            await host.stop(plan.drain_s)


@contextlib.asynccontextmanager
async def _host(plan: _Plan, folder: Path) -> AsyncIterator[EnclaveHost]:
    from lasagna.server.host import EnclaveHost
    from lasagna.server.local_broker import insecure_local_broker
    from lasagna.server.release import BrokerRelay
    from lasagna.tee.emulated import choose_backend
    from lasagna.tee.epc_profiles import profile

    costs = None if plan.emulated_epc is None else profile(plan.emulated_epc).costs(plan.epc_end)
    if costs is not None and plan.config.budget > costs.epc_bytes:
        raise UsageError(
            f"a budget of {format_bytes(plan.config.budget)} is more than the EPC of "
            f"{plan.emulated_epc}, {format_bytes(costs.epc_bytes)}"
        )
    backend, reason = choose_backend(costs)
    measurement = backend.measurement()
    async with contextlib.AsyncExitStack() as stack:
        url = plan.broker
        if url is None:
            url = await stack.enter_async_context(
                insecure_local_broker(plan.local_keys, measurement, plan.broker_state)
            )
        relay = BrokerRelay(url)
        host = EnclaveHost(plan.packages, plan.config, backend, relay, folder)
        address = plan.listener.getsockname()
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        typer.echo(f"serving on http://{shown}:{address[1]} (Open Inference Protocol v2)")
        typer.echo(f"backend {backend.name}: an EMULATED enclave, which protects nothing")
        if reason is not None:
            typer.echo(f"no EPC is emulated, memory is accounted for but not limited: {reason}")
        elif costs is not None:
            typer.echo(
                f"it has {format_bytes(costs.epc_bytes)} of emulated EPC as of "
                f"{plan.emulated_epc}, {plan.epc_end} costs; lasagna epc top shows how it is used"
            )
        typer.echo(f"clients need --allow-measurement {measurement.hex()}")
        typer.echo(f"             --broker-key {await _broker_key(relay)}")
        typer.echo("             --insecure-allow-emulated")
        yield await stack.enter_async_context(host)


async def _broker_key(relay: BrokerRelay) -> str:
    try:
        return (await relay.public_key()).hex()
    except LasagnaError as error:
        return f"(unknown: {error})"


def _require_private(folder: Path) -> None:
    """Make the folder of the sockets if need be; whoever reaches a socket can play the enclave.

    Raises:
        UsageError: others may enter it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"others may enter {folder}, the folder of the sockets (mode {mode:04o}): run chmod 700"
        )


async def _show(host: HostedModel) -> None:
    """Say how a model is, as soon as that is certain."""
    status, plan = await host.settled(), host.facts.plan
    if not status.ready or plan is None:
        typer.echo(f"model {host.name}: {status.state}: {status.reason}")
        return
    typer.echo(
        f"model {host.name}: ready: {format_bytes(plan.weight_bytes)} of weights in "
        f"{plan.slices} slice{'s' * (plan.slices != 1)}, "
        f"{format_bytes(plan.pinned_bytes)} pinned; {format_bytes(plan.total_bytes)} of enclave "
        f"memory; batches of {_batches(plan)}"
    )


def _batches(plan: PlanFacts) -> str:
    """Batch sizes of the stages, first to last: ``2, then 32 rows``."""
    sizes = [stage.rows for stage in plan.stages]
    return ", then ".join(map(str, sizes)) + " row" + "s" * (sizes[-1] != 1)


def _weights(texts: Sequence[str]) -> dict[str, float]:
    """Read ``TENANT=WEIGHT``.

    Raises:
        UsageError: one is something else.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, separator, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not separator or not 0 < weight < float("inf"):
            raise UsageError(
                f"--tenant-weight {text!r}: write TENANT=WEIGHT with a weight above 0, such as "
                "gold=3"
            )
        found[name] = weight
    return found


def _catch_signals(stop: asyncio.Event) -> None:
    """The first signal asks to stop, the second quits; whatever is left dies with the host."""
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None

    def caught() -> None:
        if not stop.is_set():
            stop.set()
        elif not main.cancelling():
            main.cancel()
        else:
            os._exit(_QUIT_AT_ONCE)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, caught)
