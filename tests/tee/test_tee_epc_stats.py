"""Promise: Python reads the emulator's figures where C writes them, and forgets dead processes."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from lasagna.errors import LasagnaError
from lasagna.tee.epc_profiles import Costs
from lasagna.tee.epc_stats import (
    FIELDS,
    MAGIC,
    RANGES,
    THREADS,
    StatsFile,
    processes,
    stats_path,
)
from lasagna.units import Bytes

NATIVE = Path(__file__).parents[2] / "native"


GCC = shutil.which("gcc")


@pytest.mark.skipif(GCC is None, reason="no gcc to read the header with")
def test_the_layout_is_that_of_the_header(tmp_path: Path) -> None:
    lines = [f'printf("%zu ", offsetof(struct epc_stats, {name}));' for name in FIELDS]
    lines += [
        f'printf("%zu ", offsetof(struct epc_stats, {name}));'
        for name in ("own_start", "own_bytes", "threads")
    ]
    lines.append('printf("%zu", sizeof(struct epc_stats));')
    source = tmp_path / "layout.c"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "epc/stats.h"\n'
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n"
    )
    program = tmp_path / "layout"
    subprocess.run([str(GCC), f"-I{NATIVE}", str(source), "-o", str(program)], check=True)
    found = [int(word) for word in subprocess.check_output([str(program)]).split()]
    count = len(FIELDS)
    ends = [count, count + RANGES, count + 2 * RANGES, count + 2 * RANGES + 3 * THREADS]
    assert found == [8 * place for place in (*range(count), *ends)]


def write(folder: Path, pid: int, **values: int) -> Path:
    counters = [values.get(name, 0) for name in FIELDS]
    rest = [0] * (2 * RANGES + 3 * THREADS)
    rest[2 * RANGES : 2 * RANGES + 3] = [77, 5, 60_000]
    path = stats_path(folder, pid)
    path.write_bytes(struct.pack(f"<{StatsFile.SIZE // 8}Q", *counters, *rest))
    return path


def test_figures_are_read_and_limit_and_charges_are_set(tmp_path: Path) -> None:
    path = write(tmp_path, os.getpid(), magic=MAGIC, loaded=3, added=4, limit_pages=1000)
    file = StatsFile(path)
    stats = file.read()
    assert file.started
    assert (stats["loaded"], stats.faults) == (3, 7)
    assert [(t.tid, t.faults, t.fault_ns) for t in stats.threads] == [(77, 5, 60_000)]
    file.set_limit(900)
    file.set_charges(Costs(Bytes(0), load_ns=1, add_ns=2, evict_ns=3, entry_ns=4))
    found = StatsFile(path).read()
    assert found["limit_pages"] == 900
    charges = [found[f"charge_{name}_ns"] for name in ("load", "add", "evict", "entry")]
    assert charges == [1, 2, 3, 4]
    assert found["loaded"] == 3


def test_only_processes_that_live_and_have_started_are_listed(tmp_path: Path) -> None:
    write(tmp_path, os.getpid(), magic=MAGIC)
    dead = write(tmp_path, 2**22 + 1, magic=MAGIC)  # above the kernel's largest pid
    write(tmp_path, os.getppid())  # has not set its magic number yet
    (tmp_path / "notes.epc").write_text("not a process")
    assert [file.path.stem for file in processes(tmp_path)] == [str(os.getpid())]
    assert not dead.exists()


@pytest.mark.parametrize("size", [0, 8, StatsFile.SIZE - 8, StatsFile.SIZE + 8])
def test_files_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "1.epc"
    path.write_bytes(bytes(size))
    with pytest.raises(LasagnaError, match="no statistics file of this version"):
        StatsFile(path)
