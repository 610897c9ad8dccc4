"""Promise: no free lunch: what a process uses outside the region is deducted from its EPC."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lasagna.tee.epc import emulator_environment, stats_folder, why_not
from lasagna.tee.epc_profiles import profile
from lasagna.tee.epc_stats import StatsFile, stats_path
from lasagna.tee.footprint import Footprint, referenced_bytes
from lasagna.units import MIB, PAGE

SMAPS = """\
55d0c0000000-55d0c0100000 r-xp 00000000 fe:00 123   /usr/bin/python3.11
Size:               1024 kB
Rss:                1024 kB
Referenced:          300 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Referenced:         4096 kB
VmFlags: rd wr mr mw me ac um
7f0000400000-7f0000500000 rw-p 00000000 00:00 0
Referenced:           40 kB
7f0000600000-7f0000700000 r-xp 00000000 fe:00 124   /x/lasagna/liblasagna_epc.so
Referenced:           80 kB
7f0000800000-7f0000900000 r--s 00000000 fe:00 125   /models/squeezenet.lsg
Referenced:         1024 kB
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0   [vsyscall]
Referenced:            0 kB
"""
TOUCH = """
import sys
small = [bytearray(40_000) for _ in range(750)]
large = bytearray(8 << 20)
print("ready", flush=True)
for line in sys.stdin:
    for piece in small:
        piece[::512] = bytes(len(piece[::512]))
    print("done", flush=True)
"""
"""30 MB of small allocations, which are outside the region, and one that is in it."""


def test_mappings_of_the_emulator_and_its_region_are_left_out() -> None:
    region = (0x7F0000000000, 0x400000)
    assert referenced_bytes(SMAPS, [region, (0, 0)]) == (40 * 1024, 300 * 1024)
    assert referenced_bytes(SMAPS, []) == ((4096 + 40) * 1024, 300 * 1024)
    assert referenced_bytes("", [region]) == (0, 0)


@pytest.mark.integration
@pytest.mark.skipif(why_not() is not None, reason=f"no emulator here: {why_not()}")
def test_hot_pages_outside_the_region_lower_the_limit() -> None:
    folder = stats_folder()
    limit = 64 * MIB // PAGE
    environment = emulator_environment(profile("none").costs(), folder, limit)
    with subprocess.Popen(
        [sys.executable, "-c", TOUCH],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        file = StatsFile(stats_path(folder, process.pid))
        footprint = Footprint(file, limit)
        for work in ("go\n", ""):
            footprint.begin()
            process.stdin.write(work)
            process.stdin.flush()
            assert not work or process.stdout.readline() == "done\n"
            footprint.deduct()
            # The 30 MB, and what Python needs to run a loop; at rest the first reading stays.
            assert 30_000_000 < footprint.hot_bytes < 45_000_000
            deducted = (limit - file.read()["limit_pages"]) * PAGE
            assert 0 <= deducted - footprint.hot_bytes < PAGE
        process.kill()


@pytest.mark.integration
@pytest.mark.skipif(why_not() is not None, reason=f"no emulator here: {why_not()}")
def test_a_report_says_what_was_hot_outside() -> None:
    program = "import time; end = time.monotonic() + 5\nwhile time.monotonic() < end: bytes(9999)"
    command = ("run", "--profile", "none", "--json", "--", sys.executable, "-c", program)
    done = subprocess.run(
        [sys.executable, "-m", "lasagna.cli.main", "epc", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    report = json.loads(done.stderr.splitlines()[-1])
    assert 100_000 < report["hot_outside_and_deducted_bytes"] < 20 * MIB
    assert report["limit_bytes"] == profile("none").costs().epc_bytes
