"""What the host asks of whatever runs enclaves: a plain process, the emulator or Gramine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lasagna.enclave.frames import DEFAULT_FRAME_LIMIT
from lasagna.units import Bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EnclaveSpec:
    """One enclave to start.

    Attributes:
        socket: absolute path of the Unix socket on which the host listens already.
        budget: bytes of enclave memory that it may use.
        threads: that compute.
        frame_limit: longest frame that it accepts from the host, in bytes.
    """

    socket: Path
    budget: Bytes
    threads: int = 1
    frame_limit: int = DEFAULT_FRAME_LIMIT

    def arguments(self) -> tuple[str, ...]:
        """As ``python -m lasagna.enclave`` reads them."""
        return (
            f"--socket={self.socket}",
            f"--budget={self.budget}",
            f"--threads={self.threads}",
            f"--frame-limit={self.frame_limit}",
        )


class RunningEnclave(Protocol):
    """A started enclave. It dies with the host, whatever kills the host."""

    @property
    def pid(self) -> int:
        """Its process id on this machine."""
        ...

    @property
    def last_words(self) -> str:
        """The last line that it wrote to its standard error; empty if there is none."""
        ...

    @property
    def peak_bytes(self) -> Bytes:
        """Most memory of it that was resident at once, code and all; 0 if nobody can tell."""
        ...

    def kill(self) -> None:
        """End it at once (SIGKILL); nothing happens if it has ended."""
        ...

    async def wait(self) -> int:
        """Wait for its end; the exit code, negative for a signal's number."""
        ...


class EnclaveBackend(Protocol):
    """A way to run enclaves."""

    @property
    def name(self) -> str:
        """What people call it; one that protects nothing says ``insecure``."""
        ...

    @property
    def insecure(self) -> bool:
        """Whether its enclaves protect nothing."""
        ...

    def measurement(self) -> bytes:
        """32 bytes: what evidence of its enclaves will say their code is."""
        ...

    async def start(self, spec: EnclaveSpec) -> RunningEnclave:
        """Start an enclave, which connects to the socket.

        Raises:
            OSError: the process can't be started.
        """
        ...
