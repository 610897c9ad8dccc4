"""Child processes of the host, and the backend that runs an enclave as one. It protects nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self

from lasagna.tee import die_with_host
from lasagna.tee.backend import EnclaveSpec
from lasagna.tee.measurement import measure_code, source_root
from lasagna.units import KIB, Bytes

_log: Final = logging.getLogger(__name__)
_LINE_LIMIT: Final = 2000
"""Longer lines of a child are cut in the log."""
_THREAD_LIMITS: Final = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class ChildProcess:
    """A process of its own session that the kernel kills when the host dies.

    Ctrl-C in the host's terminal doesn't reach it. What it writes to standard error goes to the
    host's log, line by line.
    """

    def __init__(self, process: asyncio.subprocess.Process, title: str) -> None:
        """Use :meth:`start`."""
        self._process = process
        self._title = title
        self._last_words = ""
        self._listening = asyncio.create_task(self._listen(), name=f"log of {title}")

    @classmethod
    async def start(
        cls,
        title: str,
        arguments: Sequence[str],
        *,
        pass_fds: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Start this Python with other arguments, in a minimal environment.

        Args:
            title: what log lines call it.
            arguments: of the interpreter, such as ``-m`` and a module's name.
            pass_fds: file descriptors that stay open in the child.
            environment: variables beside the minimal ones; no secrets, since they stand on a
                command line for a moment.

        Raises:
            OSError: it can't be started.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-S",
            str(Path(die_with_host.__file__)),
            str(os.getpid()),
            *(f"{name}={value}" for name, value in (environment or {}).items()),
            "--",
            sys.executable,
            "-P",  # the current folder is no place to import from
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=minimal_environment(),
            cwd="/",
            start_new_session=True,
            pass_fds=pass_fds,
        )
        return cls(process, title)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The last line that it wrote to standard error; empty if there is none."""
        return self._last_words

    @property
    def peak_bytes(self) -> Bytes:
        """Most memory of it that was resident at once (``VmHWM`` of proc(5)); 0 if it has ended."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return Bytes(0)
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
        return Bytes(int(peak[1]) * KIB if peak else 0)

    def kill(self) -> None:
        """Send SIGKILL; nothing happens if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def wait(self) -> int:
        """Wait for its end and its last line; the exit code, negative for a signal's number."""
        code = await self._process.wait()
        await asyncio.shield(self._listening)
        return code

    async def _listen(self) -> None:
        stream = self._process.stderr
        assert stream is not None
        rest = b""
        while part := await stream.read(2**16):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                self._note(line)
            if len(rest) > _LINE_LIMIT:
                self._note(rest)
                rest = b""
        self._note(rest)

    def _note(self, line: bytes) -> None:
        text = line[:_LINE_LIMIT].decode(errors="backslashreplace").rstrip()
        if text:
            self._last_words = "".join(char if char.isprintable() else " " for char in text)
            _log.info("%s [%d]: %s", self._title, self.pid, self._last_words)


def minimal_environment() -> dict[str, str]:
    """A child's environment: no secret of the host's, and what this interpreter imports from.

    Folders that the child finds by itself (of the interpreter and its virtual environment) aren't
    named again.
    """
    own = {Path(prefix).resolve() for prefix in (sys.prefix, sys.base_prefix)}
    elsewhere = [
        entry
        for entry in dict.fromkeys((str(source_root().parent), *sys.path))
        if Path(entry).is_absolute() and not own.intersection(Path(entry).resolve().parents)
    ]
    environment = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return environment | _THREAD_LIMITS | {"PYTHONPATH": os.pathsep.join(elsewhere)}


def enclave_arguments(spec: EnclaveSpec, measurement: bytes) -> tuple[str, ...]:
    """Of the interpreter, to become an enclave that claims this measurement."""
    claimed = f"--insecure-measurement={measurement.hex()}"
    return ("-m", "lasagna.enclave", *spec.arguments(), claimed)


class InsecureProcessBackend:
    """Enclaves as ordinary processes: whoever owns the machine can read them."""

    name = "insecure-process"
    insecure = True

    def measurement(self) -> bytes:
        """The hash of the enclave's code, see :mod:`lasagna.tee.measurement`."""
        return measure_code(source_root())

    async def start(self, spec: EnclaveSpec) -> ChildProcess:
        """Start ``python -m lasagna.enclave``.

        Raises:
            OSError: it can't be started.
        """
        return await ChildProcess.start("enclave", enclave_arguments(spec, self.measurement()))
