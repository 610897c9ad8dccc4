"""A key broker beside the host, as its child: for trying things out on one machine.

The host's machine then holds the keys that it must not have, hence the name. They are at least not
in the host's own memory.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from lasagna.errors import KeyRefusedError, ServiceError
from lasagna.server.release import BrokerRelay
from lasagna.tee.process import ChildProcess


@contextlib.asynccontextmanager
async def insecure_local_broker(
    keys: Sequence[Path], measurement: bytes, state: Path
) -> AsyncIterator[str]:
    """Run ``lasagna insecure-broker`` on a free port of the loopback interface.

    Args:
        keys: the models' key files.
        measurement: of the enclaves that may have them; emulated ones are allowed.
        state: folder of the broker's own secrets.

    Yields:
        Its URL.

    Raises:
        ServiceError: it did not start; the message has its last words.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        child = await ChildProcess.start(
            "insecure broker",
            (
                *("-m", "lasagna.cli.main", "insecure-broker"),
                *(str(path) for path in keys),
                f"--allow-measurement={measurement.hex()}",
                "--insecure-allow-emulated",
                f"--state={state}",
                f"--listen-fd={listener.fileno()}",
            ),
            pass_fds=(listener.fileno(),),
        )
    url = f"http://127.0.0.1:{port}"
    try:
        await _answers(url, child)
        yield url
    finally:
        child.kill()
        await child.wait()


async def _answers(url: str, child: ChildProcess) -> None:
    """Wait until the broker answers: its socket listens already, so connections wait there."""
    try:
        await BrokerRelay(url, timeout_s=30.0).public_key()
    except (KeyRefusedError, ServiceError) as error:
        child.kill()
        await child.wait()
        raise ServiceError(
            f"the local key broker did not start: {child.last_words or error}", 0
        ) from None
