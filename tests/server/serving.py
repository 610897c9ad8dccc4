"""``lasagna`` as people run it: commands, and a server in a process of its own."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.server.conftest import INPUT, NAME, OUTPUT, Array, Model
from typer.testing import CliRunner, Result

from lasagna import Client
from lasagna.cli.main import app
from lasagna.trust.policy import MeasurementIn

COMMAND = [sys.executable, "-m", "lasagna.cli.main"]
SOON = 30


def lasagna(*arguments: str | Path, code: int = 0) -> Result:
    """Run a command in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def lasagna_process(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command that sets up the process that it runs in."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert done.returncode == code, done.stderr
    return done


class Server:
    """A running ``lasagna serve``."""

    def __init__(self, *arguments: str | Path) -> None:
        # What a killed server leaves behind goes with this. Paths of sockets must be short.
        self._folder = tempfile.TemporaryDirectory(prefix="lasagna-test-")
        self.process = subprocess.Popen(
            [*COMMAND, "serve", *arguments, "--port=0", "--budget=64MiB", "--log-level=debug"],
            env=os.environ | {"TMPDIR": self._folder.name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.log = ""
        self._logged = threading.Condition()
        self._listening = threading.Thread(target=self._listen)
        self._listening.start()
        self.said = ""
        while line := self.process.stdout.readline():
            self.said += line
            if line.startswith("model "):
                break

    @property
    def url(self) -> str:
        return self.find(r"serving on (\S+)")

    @property
    def broker_key(self) -> str:
        return self.find(r"--broker-key (\w+)")

    @property
    def measurement(self) -> str:
        return self.find(r"--allow-measurement (\w+)")

    def find(self, pattern: str) -> str:
        found = re.search(pattern, self.said)
        assert found, self.said + self.log
        return found[1]

    def _listen(self) -> None:
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            with self._logged:
                self.log += line
                self._logged.notify_all()

    def wait_for_log(self, text: str, after: int = 0) -> None:
        """Wait until it has logged something, behind so many characters."""
        with self._logged:
            assert self._logged.wait_for(lambda: text in self.log[after:], SOON), self.log

    def children(self) -> list[int]:
        """All processes that it has started and that live."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in children.split()]

    def enclave(self) -> int:
        """The enclave that runs now."""
        pids = re.findall(r"enclave started as process (\d+)", self.log)
        return int(pids[-1])

    def client(self, **changes: Any) -> Client:
        arguments: dict[str, Any] = {
            "policy": MeasurementIn(frozenset({bytes.fromhex(self.measurement)})),
            "brokers": [bytes.fromhex(self.broker_key)],
            "insecure_allow_emulated": True,
            "timeout_s": SOON,
        }
        return Client(self.url, **(arguments | changes))

    def trust_options(self) -> list[str]:
        return [
            f"--allow-measurement={self.measurement}",
            f"--broker-key={self.broker_key}",
            "--insecure-allow-emulated",
        ]

    def close(self) -> None:
        self.process.kill()
        self._listening.join()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        self._folder.cleanup()


@contextlib.contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.close()


def local(model: Model, folder: Path) -> list[str | Path]:
    return [
        "--insecure-local-broker",
        model.key_file,
        "--broker-state",
        folder / "state",
    ]


class Asking:
    """A request in a thread, that the stopped enclave has and can't answer."""

    def __init__(self, server: Server, client: Client, image: Array) -> None:
        client.verify(NAME)
        before = len(server.log)
        os.kill(server.enclave(), signal.SIGSTOP)
        self._answers: list[Array] = []
        self._thread = threading.Thread(
            target=lambda: self._answers.append(client.infer(NAME, {INPUT: image})[OUTPUT])
        )
        self._thread.start()
        server.wait_for_log("batch", before)

    def answer(self) -> Array:
        self._thread.join(SOON)
        return self._answers[0]


@contextlib.contextmanager
def watching(pids: list[int]) -> Iterator[None]:
    """See to it that these processes are gone soon after the block."""
    watches = {os.pidfd_open(pid): pid for pid in pids}
    yield
    for watch, pid in watches.items():
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        assert poll.poll(10_000), f"process {pid} lives on"
        os.close(watch)
