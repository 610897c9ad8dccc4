"""Promise: the ciphertext of batches lies in memory that the plan knows, and is never overwritten
while somebody reads it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from lasagna.enclave import frames
from lasagna.enclave import messages as m
from lasagna.enclave.channel import Channel, Frame
from lasagna.enclave.pool import Pool
from lasagna.errors import BudgetError, ProtocolError
from lasagna.units import KIB

LONG = 100 * KIB


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    host, enclave = socket.socketpair()
    for one in (host, enclave):
        one.settimeout(20)
    with host, enclave:
        yield host, enclave


def put(host: socket.socket, *bodies: bytes) -> threading.Thread:
    """Send frames from a thread of their own: a socket holds less than one."""

    def work() -> None:
        for body in bodies:
            host.sendall(frames.LENGTH.pack(len(body)) + body)

    sender = threading.Thread(target=work, daemon=True)
    sender.start()
    return sender


def test_large_frames_take_turns_in_the_memory_set_aside(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, enclave = ends
    channel, memory = Channel(enclave, 2 * LONG), bytearray(LONG)
    channel.provide([memory])
    sender = put(host, b"a" * LONG, b"b" * (LONG - 1), b"c")
    first = channel.receive()
    assert first is not None
    assert first.body.obj is memory
    found: list[Frame | None] = []
    waiting = threading.Thread(target=lambda: found.append(channel.receive()), daemon=True)
    waiting.start()
    assert bytes(first.body) == b"a" * LONG  # whatever the next one does
    first.release()
    waiting.join(20)
    (second,) = found
    assert second is not None
    assert second.body.obj is memory
    assert bytes(second.body) == b"b" * (LONG - 1)
    small = channel.receive()  # though the memory is taken: it needs none of it
    assert small is not None
    assert bytes(small.body) == b"c"
    sender.join(20)


def test_a_frame_that_is_given_back_twice_is_there_once(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, enclave = ends
    channel = Channel(enclave, LONG)
    channel.provide([bytearray(LONG), bytearray(LONG)])
    sender = put(host, b"a" * LONG, b"b" * LONG, b"c" * LONG)
    first = channel.receive()
    assert first is not None
    first.release()
    first.release()
    second, third = channel.receive(), channel.receive()
    assert second is not None
    assert third is not None
    assert second.body.obj is not third.body.obj
    sender.join(20)


def test_a_frame_larger_than_the_memory_has_its_own(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, enclave = ends
    channel, memory = Channel(enclave, 2 * LONG), bytearray(LONG)
    channel.provide([memory])
    sender = put(host, b"a" * (LONG + 1))
    frame = channel.receive()
    assert frame is not None
    assert frame.body.obj is not memory
    assert len(frame.body) == LONG + 1
    sender.join(20)


def test_a_frame_longer_than_the_limit_is_refused(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, enclave = ends
    host.sendall(frames.LENGTH.pack(LONG + 1))
    with pytest.raises(ProtocolError, match="the limit is 102400"):
        Channel(enclave, LONG).receive()


def test_a_host_that_stops_within_a_frame_ends_the_connection(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, enclave = ends
    host.sendall(frames.LENGTH.pack(10) + b"half")
    host.shutdown(socket.SHUT_WR)
    assert Channel(enclave, LONG).receive() is None


def test_a_reply_to_a_host_that_is_gone_is_no_error(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, enclave = ends
    host.close()
    Channel(enclave, LONG).send(m.Done(1))


def test_records_of_a_frame_are_views_of_its_memory(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """What opens them takes them only from bytes that nobody else can write to."""
    host, enclave = ends
    rows = m.SealedRows(bytes(16), b"capsule", 1, ((memoryview(bytes(LONG)),),))
    run = m.Run(1, bytes(32), 0, 1, (m.Part(1, 0, 1, rows),))
    channel, memory = Channel(enclave, 2 * LONG), bytearray(2 * LONG)
    channel.provide([memory])
    sender = put(host, msgspec.msgpack.encode(run))
    frame = channel.receive()
    assert frame is not None
    got = frames.decode_command(frame.body)
    assert isinstance(got, m.Run)
    assert got.parts[0].sealed is not None
    assert got.parts[0].sealed.records[0][0].obj is memory
    sender.join(20)


def test_memory_for_frames_counts() -> None:
    pool = Pool(3 * 4096)
    assert len(pool.buffer(4097)) == 4097
    with pytest.raises(BudgetError, match=r"has 4\.10 kB of its 12\.3 kB left"):
        pool.buffer(4097)
