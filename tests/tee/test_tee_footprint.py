"""Promise: no free lunch: what a process uses outside the region is deducted from its EPC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lasagna.cli.epc import print_report, summary
from lasagna.tee.epc import MIN_PAGES, emulator_environment, stats_folder, why_not
from lasagna.tee.epc_profiles import profile
from lasagna.tee.epc_stats import StatsFile, stats_path
from lasagna.tee.footprint import Footprint, Observer, Outside, outside_bytes
from lasagna.units import KIB, MIB, PAGE, Bytes

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
Rss:                  80 kB
Referenced:           40 kB
7f0000600000-7f0000700000 r-xp 00000000 fe:00 124   /x/lasagna/liblasagna_epc.so
Rss:                  96 kB
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
    found = outside_bytes(SMAPS, [region, (0, 0)])
    assert found == Outside(Bytes(40 * KIB), Bytes(300 * KIB), Bytes((1024 + 80) * KIB))
    assert outside_bytes(SMAPS, []).anonymous == (4096 + 40) * KIB
    assert outside_bytes("", [region]) == Outside(Bytes(0), Bytes(0), Bytes(0))


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
    assert report["hot_outside_and_deducted_bytes"] < report["resident_outside_bytes"] < 40 * MIB
    assert report["hot_outside_exceeds_the_limit"] is False
    assert report["limit_bytes"] == profile("none").costs().epc_bytes


PROGRAM_THAT_BECOMES_ANOTHER = f"""
import os, sys
print("ready", flush=True)
sys.stdin.readline()
os.execv(sys.executable, [sys.executable, "-c", {TOUCH!r}])
"""


@pytest.mark.integration
@pytest.mark.skipif(why_not() is not None, reason=f"no emulator here: {why_not()}")
def test_a_program_that_becomes_another_is_observed_further() -> None:
    folder = stats_folder()
    limit = 64 * MIB // PAGE
    environment = emulator_environment(profile("none").costs(), folder, limit)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM_THAT_BECOMES_ANOTHER],
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        path = stats_path(folder, process.pid)
        observer = Observer(path, limit)
        for program in ("first", "second"):
            assert process.stdout.readline() == "ready\n", program
            observer.observe()
            process.stdin.write("go\n")
            process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        observer.observe()
        assert observer.footprint is not None
        assert observer.footprint.hot_bytes > 30_000_000
        deducted = (limit - StatsFile(path).read()["limit_pages"]) * PAGE
        assert 0 <= deducted - observer.footprint.hot_bytes < PAGE
        process.kill()
    path.unlink()


def test_what_does_not_fit_into_the_limit_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    footprint = footprint_of(tmp_path, anonymous_kib=8 * 1024, limit_pages=8 * MIB // PAGE)
    footprint.deduct()
    assert footprint.exceeds_limit
    stats = StatsFile(tmp_path / "1.epc").read()
    assert stats["limit_pages"] == MIN_PAGES
    facts = summary(stats, 1.0, 8 * MIB // PAGE, footprint)
    assert facts["hot_outside_exceeds_the_limit"] is True
    print_report(facts, as_json=False)
    assert "does not fit into the limit" in " ".join(capsys.readouterr().err.split())


def test_what_fits_leaves_the_rest(tmp_path: Path) -> None:
    footprint = footprint_of(tmp_path, anonymous_kib=4 * 1024, limit_pages=8 * MIB // PAGE)
    footprint.deduct()
    assert not footprint.exceeds_limit
    assert StatsFile(tmp_path / "1.epc").read()["limit_pages"] == 4 * MIB // PAGE


def footprint_of(folder: Path, anonymous_kib: int, limit_pages: int) -> Footprint:
    """Of a process that is files in a folder."""
    smaps = f"7f0000400000-7f0000500000 rw-p 00000000 00:00 0\nReferenced: {anonymous_kib} kB\n"
    (folder / "smaps").write_text(smaps)
    path = folder / "1.epc"
    path.write_bytes(bytes(StatsFile.SIZE))
    footprint = Footprint(StatsFile(path), limit_pages)
    footprint._proc = folder
    return footprint
