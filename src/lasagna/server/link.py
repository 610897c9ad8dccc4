"""The host's end of the socket to one enclave: commands out, replies matched by their id.

An asyncio protocol rather than coroutines on a socket: writing never waits, so a cancelled caller
can't leave half a frame behind, and a reply reaches its caller without waking a task in between.
What is written and not yet read by the enclave is bounded by the host, which has few commands in
flight.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any, Final, TypeVar, cast

from lasagna.enclave.frames import (
    DEFAULT_FRAME_LIMIT,
    ERRORS,
    LENGTH,
    decode_reply,
    encode_frame,
    frame_length,
)
from lasagna.enclave.messages import PROTOCOL_VERSION, Command, Failed, Hello, Reply
from lasagna.errors import EnclaveError, EnclaveLostError, ProtocolError
from lasagna.units import MIB

_log: Final = logging.getLogger(__name__)
_SOCKET_BUFFER: Final = MIB
"""Asked of the kernel, so that a request of an image goes out in one call."""
_R = TypeVar("_R", bound=Reply)
_T = TypeVar("_T")


class EnclaveLink(asyncio.BufferedProtocol):
    """A connection to an enclave. Make it with :func:`accept_enclave`.

    It ends once, with an ``EnclaveLostError`` or a ``ProtocolError`` that all pending and later
    calls raise.

    Attributes:
        closed_by_enclave: whether it was the other side that ended it.
    """

    def __init__(self, frame_limit: int) -> None:
        """Bytes longer than ``frame_limit`` in one frame end the link."""
        self.closed_by_enclave = False
        self._frame_limit = frame_limit
        self._transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[Hello] = loop.create_future()
        self._ended: asyncio.Future[EnclaveError] = loop.create_future()
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._last_id = 0
        self._head = memoryview(bytearray(LENGTH.size))
        self._body = bytearray()
        self._in_body = False
        self._target = self._head
        self._got = 0

    # What the host calls.

    async def hello(self, timeout_s: float) -> Hello:
        """The enclave's first message.

        Raises:
            EnclaveLostError: it did not come in time, or the connection ended.
            ProtocolError: it was something else, or of another protocol version.
        """
        return await self._within(timeout_s, self._hello, "say hello")

    def next_id(self) -> int:
        """A fresh id for a command."""
        self._last_id += 1
        return self._last_id

    async def call(self, command: Command, expected: type[_R], timeout_s: float) -> _R:
        """Send a command and wait for its reply.

        A caller may be cancelled; the reply is then dropped when it comes.

        Args:
            command: its id comes from :meth:`next_id`.
            expected: the class of the reply.
            timeout_s: an enclave that has not answered for so long is taken for dead.

        Raises:
            EnclaveLostError: the enclave died, or did not answer in time; the link is closed.
            ProtocolError: it sent something malformed or unexpected; the link is closed.
            LasagnaError: what the enclave answered, as a class of ``messages.ERRORS``.
        """
        if self._ended.done():
            raise self._ended.result().again()
        assert self._transport is not None
        waiter: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[command.id] = waiter
        try:
            self._transport.write(memoryview(encode_frame(command)))
            what = f"answer {type(command).__name__}"
            reply = await self._within(timeout_s, waiter, what)
        finally:
            self._pending.pop(command.id, None)
        if isinstance(reply, Failed):
            raise ERRORS.get(reply.kind, EnclaveError)(reply.message)
        if not isinstance(reply, expected):
            self.end(
                ProtocolError(
                    f"the enclave answered {type(command).__name__} with {type(reply).__name__}"
                )
            )
            raise self._ended.result().again()
        return reply

    async def ended(self) -> EnclaveError:
        """Wait for the end of the link and return its reason."""
        return await asyncio.shield(self._ended)

    def end(self, reason: EnclaveError) -> None:
        """Close the connection; all calls raise the reason. Only the first reason counts."""
        if self._ended.done():
            return
        self._ended.set_result(reason)
        waiters: list[asyncio.Future[Any]] = [self._hello, *self._pending.values()]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(reason.again())
                waiter.exception()  # somebody may have stopped waiting: that is no news
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where to write."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: straight to their place in the frame."""
        return self._target[self._got :]

    def buffer_updated(self, nbytes: int) -> None:
        """Go on when a head or a body is complete."""
        self._got += nbytes
        if self._got < len(self._target):
            return
        self._got = 0
        try:
            if not self._in_body:
                self._body = bytearray(frame_length(bytes(self._head), self._frame_limit))
                if not self._body:
                    raise ProtocolError("the enclave sent an empty frame")
                self._target, self._in_body = memoryview(self._body), True
                return
            body, self._body = self._body, bytearray()
            self._target, self._in_body = self._head, False
            self._dispatch(decode_reply(body))
        except ProtocolError as error:
            self.end(error)

    def eof_received(self) -> None:
        """The enclave has closed its side; ``connection_lost`` follows."""

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is closed, by either side."""
        self.closed_by_enclave = not self._ended.done()
        self.end(EnclaveLostError("the enclave closed its connection" + _because(error)))

    def _dispatch(self, reply: Reply) -> None:
        if isinstance(reply, Hello):
            if self._hello.done():
                raise ProtocolError("the enclave said hello twice")
            if reply.version != PROTOCOL_VERSION:
                raise ProtocolError(
                    f"the enclave speaks protocol {reply.version}, this host {PROTOCOL_VERSION}"
                )
            self._hello.set_result(reply)
            return
        if not 1 <= reply.id <= self._last_id:
            raise ProtocolError(f"the enclave answered command {reply.id}, which was never sent")
        waiter = self._pending.pop(reply.id, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(reply)

    async def _within(self, timeout_s: float, waiter: asyncio.Future[_T], what: str) -> _T:
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            self.end(EnclaveLostError(f"the enclave did not {what} within {timeout_s:g} s"))
            raise self._ended.result().again() from None


async def accept_enclave(
    listener: socket.socket, timeout_s: float, frame_limit: int = DEFAULT_FRAME_LIMIT
) -> EnclaveLink:
    """Take the first connection to a listening Unix socket.

    Args:
        listener: non-blocking.
        timeout_s: how long an enclave may take to start and connect.
        frame_limit: longest frame that is accepted from the enclave, in bytes.

    Raises:
        EnclaveLostError: nobody connected in time.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            connection, _ = await loop.sock_accept(listener)
    except TimeoutError:
        raise EnclaveLostError(f"the enclave did not connect within {timeout_s:g} s") from None
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
    try:
        _, link = await loop.connect_accepted_socket(lambda: EnclaveLink(frame_limit), connection)
    except BaseException:
        connection.close()
        raise
    return link


def _because(error: Exception | None) -> str:
    return f": {error}" if error else ""
