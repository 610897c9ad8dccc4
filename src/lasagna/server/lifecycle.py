"""One life of an enclave: started, connected, loaded, and in the end buried."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lasagna.enclave.frames import DEFAULT_FRAME_LIMIT
from lasagna.enclave.messages import (
    KeysRequested,
    Load,
    Loaded,
    RequestKeys,
    Stop,
    Stopped,
)
from lasagna.errors import (
    BudgetError,
    EnclaveLostError,
    KeyRefusedError,
    LasagnaError,
    TrustError,
    UsageError,
)
from lasagna.package.reader import Package
from lasagna.policy.plan import Objective
from lasagna.server.link import EnclaveLink, accept_enclave
from lasagna.server.release import KeyRelay
from lasagna.server.served import ModelFacts
from lasagna.tee.backend import EnclaveBackend, EnclaveSpec, RunningEnclave
from lasagna.trust.records import RECORD_OVERHEAD
from lasagna.units import KIB, Bytes

_log: Final = logging.getLogger(__name__)
_MAX_SOCKET_PATH: Final = 107
"""``sun_path`` of unix(7) without its last byte."""
_MESSAGE_BYTES: Final = 8 * KIB
"""More than MessagePack, capsule, id and error text add to a record and to a request."""
FIRST_BACKOFF_S: Final = 0.1
MAX_BACKOFF_S: Final = 30.0
PATIENCE: Final = 3
"""So many deaths without an answer between them, and requests no longer wait for a restart."""
_numbers: Final = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """How one enclave is run.

    Attributes:
        budget: bytes of enclave memory, for all its models.
        threads: that compute; the plan says whether each has a batch of its own.
        max_batch: rows of one request at most, and of one batch; the plan may allow fewer of these.
        queue_limit: rows that may wait.
        patience_s: who has waited so long for the enclave goes before all priorities and shares.
        policy: name of the scheduling policy, one of ``policy.baselines.POLICIES``.
        objective: what counts most; for ``latency`` all threads compute one batch.
        tenant_weights: shares of tenants at saturation; those that are not named have 1.
        trace: file to record what runs when in, and traced_as: what that says of the enclave's EPC.
        journal: file for the scheduler's events and commands, to be replayed (``lasagna.sim``).
        frame_limit: longest frame between host and enclave, in bytes.
        start_timeout_s: for an enclave to connect and say hello.
        load_timeout_s: for it to decrypt and prepare the model.
        answer_timeout_s: an enclave that takes longer over one batch is taken for dead.
        exit_timeout_s: for it to end by itself, before it is killed.
    """

    budget: Bytes
    threads: int = 1
    max_batch: int = 32
    queue_limit: int = 256
    patience_s: float = 10.0
    policy: str = "lasagna"
    objective: Objective = "throughput"
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    trace: Path | None = None
    traced_as: str = ""
    journal: Path | None = None
    frame_limit: int = DEFAULT_FRAME_LIMIT
    start_timeout_s: float = 30.0
    load_timeout_s: float = 120.0
    answer_timeout_s: float = 60.0
    exit_timeout_s: float = 5.0


def read_facts(package: Path) -> tuple[str, ModelFacts]:
    """A package's name and public facts, which nobody has vouched for yet.

    Raises:
        PackageError: it can't be read, or is malformed.
    """
    with Package(package) as opened:
        manifest = opened.manifest
        facts = ModelFacts(
            opened.model_digest, manifest.inputs, manifest.outputs, manifest.batchable
        )
    return manifest.name, facts


@contextlib.asynccontextmanager
async def enclave_life(
    backend: EnclaveBackend, config: HostConfig, socket_dir: Path, title: str
) -> AsyncIterator[tuple[EnclaveLink, RunningEnclave]]:
    """Start an enclave and connect to it; at the end of the block it is gone.

    Args:
        backend: starts it.
        config: see ``HostConfig``.
        socket_dir: an absolute path.
        title: for the log.

    Raises:
        EnclaveLostError: it did not start; or, out of the block, how it died.
        ProtocolError: it speaks another protocol.
        UsageError: the path of the socket is too long for the system.
        OSError: the process or the socket can't be made.
    """
    path = socket_dir / f"{os.getpid()}-{next(_numbers)}.sock"
    if len(bytes(path)) > _MAX_SOCKET_PATH:
        raise UsageError(
            f"the socket's path {path} has {len(bytes(path))} bytes; the system allows "
            f"{_MAX_SOCKET_PATH}: choose a shorter --socket-dir"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(str(path))
        try:
            listener.listen(1)
            process = await backend.start(
                EnclaveSpec(
                    socket=path,
                    budget=config.budget,
                    threads=config.threads,
                    frame_limit=config.frame_limit,
                )
            )
            _log.info("%s: enclave started as process %d", title, process.pid)
            try:
                link = await _connected(listener, process, config)
            except BaseException:
                await _bury(process, 0.0)
                raise
        finally:
            path.unlink(missing_ok=True)
    try:
        await link.hello(config.start_timeout_s)
        yield link, process
    except EnclaveLostError as error:
        raise EnclaveLostError(await _post_mortem(link, process, config, str(error))) from None
    finally:
        link.end(EnclaveLostError("the host closed the connection"))
        await _bury(process, config.exit_timeout_s if link.closed_by_enclave else 0.0)


async def load_model(
    link: EnclaveLink, package: Path, relay: KeyRelay, config: HostConfig
) -> Loaded:
    """Have the package's keys released to the enclave. The model has no memory there yet.

    Args:
        link: to the enclave.
        package: an absolute path.
        relay: the way to the key broker.
        config: see ``HostConfig``.

    Raises:
        KeyRefusedError: the keys were refused, by the broker or by the enclave.
        PackageError: the package is malformed or was tampered with.
        ServiceError: the broker can't be reached.
        EnclaveError: the enclave died or failed.
    """
    limit_s = config.load_timeout_s
    asked = await link.call(RequestKeys(link.next_id(), str(package)), KeysRequested, limit_s)
    grant = await relay.release(asked.request)
    try:
        return await link.call(Load(link.next_id(), grant), Loaded, limit_s)
    except TrustError as error:
        raise KeyRefusedError(f"the enclave refuses the key broker's answer: {error}") from None


async def stop_enclave(link: EnclaveLink, config: HostConfig) -> None:
    """Let the enclave finish what it runs, and close the connection."""
    try:
        await link.call(Stop(link.next_id()), Stopped, config.answer_timeout_s)
        async with asyncio.timeout(config.exit_timeout_s):
            await link.ended()
    except LasagnaError as error:
        _log.warning("an enclave did not stop in order: %s", error)
    except TimeoutError:
        _log.warning("an enclave stays connected after it said that it stopped")


def rows_limit(facts: ModelFacts, config: HostConfig) -> int:
    """Rows that one request may have: what was wished for, and fits a frame sealed.

    Raises:
        BudgetError: not even one row fits a frame.
    """
    row = max(
        sum(spec.row_bytes + RECORD_OVERHEAD + _MESSAGE_BYTES for spec in specs)
        for specs in (facts.inputs, facts.outputs)
    )
    wish = config.max_batch if facts.batchable else 1
    rows = min(wish, config.frame_limit // (row + _MESSAGE_BYTES))
    if rows < 1:
        raise BudgetError(
            f"one row takes {row} bytes sealed, a frame between host and enclave "
            f"{config.frame_limit}: raise the frame limit"
        )
    return rows


def backoff_s(deaths: int) -> float:
    """How long to wait before the enclave is started again: doubling, up to a limit.

    Args:
        deaths: in a row, without an answer to a request between them; at least 1.
    """
    assert deaths >= 1
    return min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(deaths - 1, 30))


def may_wait(deaths: int) -> bool:
    """Whether requests may wait for an enclave that died so many times in a row."""
    return deaths < PATIENCE


async def _connected(
    listener: socket.socket, process: RunningEnclave, config: HostConfig
) -> EnclaveLink:
    """The link, or an error as soon as the process ends."""
    accepting = asyncio.create_task(
        accept_enclave(listener, config.start_timeout_s, config.frame_limit)
    )
    ending = asyncio.create_task(process.wait())
    try:
        await asyncio.wait({accepting, ending}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (accepting, ending):
            task.cancel()
        link, code = await asyncio.gather(accepting, ending, return_exceptions=True)
    if isinstance(link, EnclaveLink):
        return link
    if isinstance(code, int):
        raise EnclaveLostError(f"the enclave ended before it connected: {_ending(code, process)}")
    raise EnclaveLostError(str(link))


async def _post_mortem(
    link: EnclaveLink, process: RunningEnclave, config: HostConfig, reason: str
) -> str:
    """The reason of a death, with what the system knows of it."""
    if not link.closed_by_enclave:
        return reason  # it hangs
    try:
        async with asyncio.timeout(config.exit_timeout_s):
            return f"{reason}: {_ending(await process.wait(), process)}"
    except TimeoutError:
        return reason


def _ending(code: int, process: RunningEnclave) -> str:
    if code < 0:
        try:
            how = f"killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"killed by signal {-code}"
    else:
        how = f"exit code {code}"
    return f"{how}, after {process.last_words!r}" if process.last_words else how


async def _bury(process: RunningEnclave, grace_s: float) -> None:
    """Make sure that the process is gone."""
    try:
        await ends_within(process.wait(), grace_s)
    finally:
        process.kill()
    await process.wait()


async def ends_within(work: Coroutine[Any, Any, object], limit_s: float) -> bool:
    """Run something for so long at most; tell whether it ended by itself.

    Unlike ``asyncio.timeout`` also on the way out of a task that was cancelled: there that raises
    CancelledError instead of TimeoutError in Python 3.11.2, which is Debian 12's, and whatever was
    to follow does not happen.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=limit_s)
    finally:
        ended = task.done()
        task.cancel()
    if ended:
        await task
    else:
        await asyncio.gather(task, return_exceptions=True)
    return ended
