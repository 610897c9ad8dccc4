"""The link against a scripted enclave at the other end of a real Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from lasagna.enclave.frames import LENGTH, decode_command, encode_frame
from lasagna.enclave.messages import (
    PROTOCOL_VERSION,
    Attest,
    Attested,
    Command,
    Failed,
    GetStats,
    Hello,
    Part,
    PartResult,
    Ran,
    Reply,
    Run,
    SealedRows,
    Stop,
    Stopped,
    Timings,
)
from lasagna.errors import (
    BudgetError,
    EnclaveError,
    EnclaveLostError,
    ProtocolError,
)
from lasagna.server.link import EnclaveLink, accept_enclave

pytestmark = pytest.mark.anyio

SOON = 5.0
HELLO = Hello(
    id=0,
    version=PROTOCOL_VERSION,
    budget_bytes=1,
    compute_threads=1,
    block=8,
    insecure_emulated=True,
)


class Peer:
    """The enclave's end, moved by the test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def say(self, reply: Reply) -> None:
        await self.say_bytes(bytes(encode_frame(reply)))

    async def say_bytes(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hear(self) -> Command:
        (length,) = LENGTH.unpack(await self.reader.readexactly(LENGTH.size))
        return decode_command(await self.reader.readexactly(length))

    async def hang_up(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


Connect = Callable[..., Awaitable[tuple[EnclaveLink, Peer]]]


@pytest.fixture
async def connect(tmp_path: Path) -> AsyncIterator[Connect]:
    made: list[tuple[EnclaveLink, Peer]] = []

    async def make(frame_limit: int = 2**20) -> tuple[EnclaveLink, Peer]:
        path = tmp_path / f"{len(made)}.sock"
        with listening(path) as listener:
            streams = await asyncio.open_unix_connection(path)
            link = await accept_enclave(listener, SOON, frame_limit)
        made.append((link, Peer(*streams)))
        return made[-1]

    yield make
    for link, peer in made:
        link.end(EnclaveLostError("the test is over"))
        await peer.hang_up()


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    listener.setblocking(False)
    return listener


def attest(link: EnclaveLink, timeout_s: float = SOON) -> asyncio.Task[Attested]:
    return asyncio.create_task(link.call(Attest(link.next_id(), b"m" * 32), Attested, timeout_s))


async def test_hello_comes_first(connect: Connect) -> None:
    link, peer = await connect()
    await peer.say(HELLO)
    assert await link.hello(SOON) == HELLO


async def test_replies_find_their_callers_in_any_order(connect: Connect) -> None:
    link, peer = await connect()
    calls = [attest(link) for _ in range(3)]
    ids = [(await peer.hear()).id for _ in calls]
    for number in reversed(ids):
        await peer.say(Attested(number, b"document %d" % number))
    assert [(await call).document for call in calls] == [b"document %d" % n for n in ids]


async def test_frames_may_come_in_any_pieces(connect: Connect) -> None:
    link, peer = await connect()
    call = attest(link)
    data = bytes(encode_frame(Attested((await peer.hear()).id, b"x" * 100)))
    for byte in data:
        await peer.say_bytes(bytes([byte]))
        await asyncio.sleep(0)
    assert (await call).document == b"x" * 100


async def test_two_frames_may_come_in_one_piece(connect: Connect) -> None:
    link, peer = await connect()
    calls = [attest(link), attest(link)]
    ids = [(await peer.hear()).id for _ in calls]
    await peer.say_bytes(b"".join(bytes(encode_frame(Attested(n, b"d"))) for n in ids))
    assert [(await call).document for call in calls] == [b"d", b"d"]


async def test_a_large_request_arrives_whole(connect: Connect) -> None:
    link, peer = await connect()
    record = memoryview(bytes(range(256)) * 40_000)  # 10 MB: more than any socket buffer
    rows = SealedRows(b"r" * 16, b"c" * 81, 1, ((record,),))
    command = Run(link.next_id(), b"m" * 32, 0, 1, (Part(1, 0, 1, rows),))
    call = asyncio.create_task(link.call(command, Ran, SOON))
    heard = await peer.hear()
    assert isinstance(heard, Run)
    assert heard.parts[0].sealed is not None
    assert heard.parts[0].sealed.records[0][0] == record
    answer = Ran(heard.id, (PartResult(((b"out",),)),), Timings(0, 0, 0, 0, 0, 0, 0, 0))
    await peer.say(answer)
    assert await call == answer


@pytest.mark.parametrize(
    ("kind", "expected"), [("BudgetError", BudgetError), ("NoSuchError", EnclaveError)]
)
async def test_a_failed_command_raises_its_error_and_the_link_goes_on(
    connect: Connect, kind: str, expected: type[Exception]
) -> None:
    link, peer = await connect()
    call = attest(link)
    await peer.say(Failed((await peer.hear()).id, kind, "too small"))
    with pytest.raises(expected, match="too small"):
        await call
    again = attest(link)
    await peer.say(Attested((await peer.hear()).id, b"fine"))
    assert (await again).document == b"fine"


async def test_the_enclaves_death_ends_all_calls_and_later_ones(connect: Connect) -> None:
    link, peer = await connect()
    calls = [attest(link), attest(link)]
    await peer.hear()
    await peer.hang_up()
    for call in calls:
        with pytest.raises(EnclaveLostError, match="closed its connection"):
            await call
    with pytest.raises(EnclaveLostError):
        await attest(link)
    assert isinstance(await link.ended(), EnclaveLostError)
    assert link.closed_by_enclave


async def test_death_before_hello(connect: Connect) -> None:
    link, peer = await connect()
    await peer.hang_up()
    with pytest.raises(EnclaveLostError, match="closed its connection"):
        await link.hello(SOON)


async def test_silence_is_taken_for_death(connect: Connect) -> None:
    link, _ = await connect()
    patient = attest(link)
    with pytest.raises(EnclaveLostError, match=r"did not answer Attest within 0\.01 s"):
        await attest(link, timeout_s=0.01)
    with pytest.raises(EnclaveLostError, match=r"did not answer Attest within 0\.01 s"):
        await patient
    assert not link.closed_by_enclave
    with pytest.raises(EnclaveLostError):
        await link.hello(0.01)


async def test_a_cancelled_caller_disturbs_nobody(connect: Connect) -> None:
    link, peer = await connect()
    leaving, staying = attest(link), attest(link)
    ids = [(await peer.hear()).id for _ in range(2)]
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    for number in ids:
        await peer.say(Attested(number, b"late"))
    assert (await staying).document == b"late"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LENGTH.pack(2**20 + 1), "the limit is 1048576"),
        (LENGTH.pack(0), "an empty frame"),
        (LENGTH.pack(3) + b"\xc1\xc1\xc1", "malformed reply"),
        (bytes(encode_frame(GetStats(1))), "malformed reply"),
        (bytes(encode_frame(Attested(2, b""))), "which was never sent"),
        (bytes(encode_frame(Attested(0, b""))), "which was never sent"),
        (bytes(encode_frame(HELLO)) * 2, "said hello twice"),
        (bytes(encode_frame(Stopped(1))), "answered Attest with Stopped"),
    ],
)
async def test_nonsense_ends_the_link(connect: Connect, data: bytes, message: str) -> None:
    link, peer = await connect()
    call = attest(link)
    await peer.hear()
    await peer.say_bytes(data)
    with pytest.raises(ProtocolError, match=message):
        await call
    assert await peer.reader.read() == b""  # the host has hung up


async def test_another_protocol_version_is_refused(connect: Connect) -> None:
    link, peer = await connect()
    other = Hello(
        id=0,
        version=PROTOCOL_VERSION + 1,
        budget_bytes=1,
        compute_threads=1,
        block=8,
        insecure_emulated=True,
    )
    await peer.say(other)
    with pytest.raises(ProtocolError, match=f"speaks protocol {PROTOCOL_VERSION + 1}"):
        await link.hello(SOON)


async def test_nobody_connects(tmp_path: Path) -> None:
    with (
        listening(tmp_path / "lonely.sock") as listener,
        pytest.raises(EnclaveLostError, match=r"did not connect within 0\.01 s"),
    ):
        await accept_enclave(listener, 0.01)


async def test_stop_is_a_command_like_any_other(connect: Connect) -> None:
    link, peer = await connect()
    call = asyncio.create_task(link.call(Stop(link.next_id()), Stopped, SOON))
    await peer.say(Stopped((await peer.hear()).id))
    await call
