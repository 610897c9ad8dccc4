"""Promise: an error that nobody expected ends the enclave at once, in whichever thread it happens,
and takes no value out of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lasagna.tee.process import minimal_environment

pytestmark = pytest.mark.integration

# What ``main`` does with its hooks, with a service that has a bug. The main thread of the first
# would wait for ever for the one that ended.
ENCLAVE = """
import sys, threading
import lasagna.enclave.__main__ as enclave

class Broken:
    def __init__(self, *_):
        pass

    def serve(self):
        if "{where}" == "main":
            self.fail()
        threading.Thread(target=self.fail, daemon=True).start()
        threading.Event().wait()

    def fail(self):
        raise ZeroDivisionError("pixel 31337")

class Socket:
    def __init__(self, *_): pass
    def connect(self, _): pass
    def close(self): pass

enclave.Enclave = Broken
enclave.socket.socket = Socket
sys.argv = ["enclave", "--socket=x", "--budget=1", "--insecure-measurement=" + "00" * 32]
sys.exit(enclave.main())
"""


@pytest.mark.parametrize("where", ["main", "thread"])
def test_a_bug_ends_the_process_and_only_its_kind_is_told(where: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ENCLAVE.replace("{where}", where)],
        env=minimal_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "enclave: a bug: ZeroDivisionError\n"
