"""Promise: any program runs in the emulated EPC as outside, in so much memory and no more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lasagna.tee.epc import emulator_environment, stats_folder, why_not
from lasagna.tee.epc_profiles import profile
from lasagna.tee.epc_stats import processes
from lasagna.units import MIB, PAGE

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(why_not() is not None, reason=f"no emulator here: {why_not()}"),
]
LASAGNA = (sys.executable, "-m", "lasagna.cli.main", "epc")
TIMEOUT_S = 60.0

ARRAYS = """
import hashlib, os, threading
import numpy as np
random = np.random.default_rng(1)
arrays = [random.standard_normal((512, 1024)) for _ in range(10)]
def work(number):
    for _ in range(3):
        arrays[number] = arrays[number][::-1] * 1.5 + arrays[number]
threads = [threading.Thread(target=work, args=(n,)) for n in range(10)]
[t.start() for t in threads]
[t.join() for t in threads]
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    arrays[0] += 1
    os.write(writing, hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest().encode())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(os.read(reading, 64).decode(), hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest())
"""
"""40 MB of arrays, ten threads, and a forked child that sees and changes them."""


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LASAGNA, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_numpy_with_threads_and_fork_computes_the_same_in_16_mb() -> None:
    plain = subprocess.run(
        [sys.executable, "-c", ARRAYS], capture_output=True, text=True, check=True
    )
    done = run(
        *("run", "--profile", "none", "--limit", "16MiB", "--json", "--"),
        *(sys.executable, "-c", ARRAYS),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == plain.stdout
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["emulated"] is True
    assert report["peak_resident_bytes"] <= report["limit_bytes"] == 16 * MIB
    assert report["pages_loaded"] > 40 * MIB // PAGE
    assert report["pages_evicted"] > 0
    assert report["transitions"] > 0
    brought = report["pages_added"] + report["pages_loaded"]
    assert sum(thread["pages"] for thread in report["threads"]) == brought
    assert len(report["threads"]) > 5
    assert (report["waited_for_a_frame_s"] > 0) == (report["faults_that_waited_for_a_frame"] > 0)


def test_a_limit_that_suffices_causes_no_load() -> None:
    done = run(
        *("run", "--profile", "none", "--limit", "512MiB", "--json", "--"),
        *(sys.executable, "-c", "import numpy as np; a = np.ones(4 << 20); print(a.sum())"),
    )
    report = json.loads(done.stderr.splitlines()[-1])
    assert done.stdout == "4194304.0\n"
    assert report["pages_added"] >= 32 * MIB // PAGE
    assert report["pages_loaded"] == report["pages_evicted"] == 0


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--", "sh", "-c", "exit 7"), 7, "protects nothing"),
        (("--", "sh", "-c", "kill -TERM $$"), 128 + signal.SIGTERM, "protects nothing"),
        (("--", "no-such-program"), 127, "there is no program 'no-such-program'"),
        (("--", "/etc/hostname"), 126, "can't be run"),
        (("--limit", "1kB", "--", "true"), 2, "the limit must be 1.05 MB to"),
        (("--profile", "sgx9", "--", "true"), 2, "no profile 'sgx9'"),
        (("--end", "middle", "--", "true"), 2, "low, typical, high"),
    ],
)
def test_exit_status_and_reasons(arguments: tuple[str, ...], status: int, words: str) -> None:
    done = run("run", *arguments)
    assert done.returncode == status
    assert words in " ".join(done.stderr.split())


def test_settings_that_make_no_sense_stop_the_program_at_its_start() -> None:
    environment = os.environ | emulator_environment(profile("none").costs())
    environment["LASAGNA_EPC"] = "limit_pages=many"
    done = subprocess.run(
        ["/bin/true"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 125
    assert done.stderr == "lasagna epc: LASAGNA_EPC: a number was expected\n"


def test_top_shows_a_running_program() -> None:
    waiting = [sys.executable, "-c", "input()"]
    with subprocess.Popen(
        [*LASAGNA, "run", "--", *waiting], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as runner:
        seen = b""
        while b"python" not in seen and runner.poll() is None:
            seen = subprocess.check_output([*LASAGNA, "top", "--once"], timeout=TIMEOUT_S)
        listed = json.loads(subprocess.check_output([*LASAGNA, "top", "--json"]))
        runner.communicate(b"\n", timeout=TIMEOUT_S)
    assert runner.returncode == 0
    assert all(counters["limit_pages"] == 23_936 for counters in listed.values())
    for counters in listed.values():
        brought = counters["added"] + counters["loaded"]
        assert sum(thread["pages"] for thread in counters["threads"]) == brought
    assert not [f for f in processes(Path(stats_folder())) if f.path.stem in listed]
