"""Running the gateway's application with uvicorn, under the control of somebody else.

What a request of 600 KB costs before it is in our hands depends on how that is done (milliseconds
of processor time, bare Starlette application, EPYC 7003, one core):

==========================================  ====
asyncio, h11, glibc's malloc as it is       3.2
... with ``keep_large_buffers``             1.9
... and httptools, if it is installed       1.5
... and uvloop, if it is installed          0.5
==========================================  ====
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.loops.auto import auto_loop_factory

from lasagna.units import MIB

_M_TRIM_THRESHOLD: Final = -1  # malloc.h
_M_MMAP_THRESHOLD: Final = -3
_GRACE_S: Final = 5
"""For connections to close, once nothing is being answered any more."""


class _Server(uvicorn.Server):
    """Leaves signals to its caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


def keep_large_buffers() -> None:
    """Have malloc reuse the memory of bodies, instead of returning it and faulting it in again.

    For the whole process, which then keeps up to 128 MiB that it doesn't need at the moment. Where
    the C library has no mallopt(3), nothing happens.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * MIB)  # the largest that glibc allows
        mallopt(_M_TRIM_THRESHOLD, 128 * MIB)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """How to make the event loop: uvloop's if it is installed, else asyncio's own."""
    return auto_loop_factory()


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve inside the block; at its end connections are closed when they have their answers.

    Args:
        app: the application.
        listener: bound; closed in the end.
    """
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=_GRACE_S,
    )
    server = _Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]), name="gateway")
    try:
        yield
    finally:
        server.should_exit = True
        await running
