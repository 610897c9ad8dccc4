"""Start of an enclave process: ``python -m lasagna.enclave --socket PATH --budget BYTES ...``."""

from __future__ import annotations

import argparse
import gc
import os
import socket
import sys
import threading
from typing import Final, NoReturn

from lasagna.enclave.frames import DEFAULT_FRAME_LIMIT
from lasagna.enclave.service import Enclave, Limits
from lasagna.errors import LasagnaError
from lasagna.trust.evidence import InsecureEmulatedQuoter

SWITCH_INTERVAL_S: Final = 1e-4
"""How long a thread may keep Python from the others: a compute thread must not wait 5 ms, the
default, for the main thread to finish opening a request."""


def die(error: type[BaseException]) -> NoReturn:
    """End the process at once over an error that nobody expected, in whichever thread.

    The other threads would wait for the one that ended; the host starts another enclave instead.
    The host reads what is written here, so only the error's type is: its text may hold a plaintext.
    """
    sys.stderr.write(f"enclave: a bug: {error.__name__}\n")
    sys.stderr.flush()
    os._exit(1)


def main() -> int:
    """Connect to the host and serve it until it says Stop or goes away."""
    sys.excepthook = lambda kind, error, trace: die(kind)
    threading.excepthook = lambda failed: die(failed.exc_type)
    parser = argparse.ArgumentParser(prog="lasagna.enclave", description=__doc__)
    parser.add_argument("--socket", required=True, help="Unix socket that the host listens on")
    parser.add_argument("--budget", type=int, required=True, help="bytes of enclave memory")
    parser.add_argument("--threads", type=int, default=1, help="compute threads")
    parser.add_argument("--frame-limit", type=int, default=DEFAULT_FRAME_LIMIT)
    parser.add_argument(
        "--insecure-measurement",
        required=True,
        help="what emulated evidence claims this code to be, in hex; protects nothing",
    )
    arguments = parser.parse_args()
    measurement = bytes.fromhex(arguments.insecure_measurement)
    quoter = InsecureEmulatedQuoter(measurement, signer=bytes(32))
    limits = Limits(arguments.budget, arguments.threads, arguments.frame_limit)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(arguments.socket)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.freeze()
        Enclave(connection, limits, quoter).serve()
    except (OSError, LasagnaError) as error:
        sys.stderr.write(f"enclave: {error}\n")
        return 1
    finally:
        connection.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
