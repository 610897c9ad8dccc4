"""Child processes: what they get, that they never outlive the host, and how code is measured."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lasagna.tee.backend import EnclaveSpec
from lasagna.tee.measurement import ENCLAVE_CODE, measure_code, source_root
from lasagna.tee.process import ChildProcess, InsecureProcessBackend
from lasagna.units import Bytes

pytestmark = [pytest.mark.anyio, pytest.mark.integration]

SLEEP = "import signal; signal.pause()"


async def run(script: str) -> ChildProcess:
    return await ChildProcess.start("child", ("-c", script))


async def test_a_childs_environment_is_minimal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    child = await run("import os, sys; print(sorted(os.environ), file=sys.stderr)")
    assert await child.wait() == 0
    allowed = {"PATH", "LANG", "PYTHONPATH", "LC_CTYPE"}
    assert "SECRET_TOKEN" not in child.last_words
    names = {name for name in eval(child.last_words) if not name.endswith("_NUM_THREADS")}  # noqa: S307 - a list that our own script printed
    assert names <= allowed


async def test_a_child_finds_the_same_lasagna_and_nothing_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lasagna.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    child = await run("import lasagna, sys; print(lasagna.__file__, file=sys.stderr)")
    assert await child.wait() == 0
    assert Path(child.last_words).parent == source_root()


async def test_standard_input_and_output_lead_nowhere() -> None:
    child = await run("import sys; print(repr(sys.stdin.read()), file=sys.stderr); print('x' * 9)")
    assert await child.wait() == 0
    assert child.last_words == "''"


async def test_what_a_child_says_is_logged_line_by_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lasagna.tee.process")
    child = await run(
        "import sys; sys.stderr.write('one\\n\\ntwo\\x1b[31m\\nx' + 'y' * 100_000 + '\\nlast')"
    )
    await child.wait()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:2] == [f"child [{child.pid}]: one", f"child [{child.pid}]: two [31m"]
    assert max(len(line) for line in lines) < 2100
    assert child.last_words == "last"


async def test_a_child_is_not_in_the_terminals_group() -> None:
    child = await run(SLEEP)
    try:
        assert os.getsid(child.pid) == child.pid
        assert os.getpgid(child.pid) != os.getpgid(0)
    finally:
        child.kill()
    assert await child.wait() == -signal.SIGKILL


async def test_signals_to_a_dead_child_do_nothing() -> None:
    child = await run("")
    assert await child.wait() == 0
    child.kill()
    assert await child.wait() == 0


async def test_a_childs_memory_is_told_as_the_kernel_counts_it() -> None:
    ready, tell = os.pipe()
    script = f"import os; x = b'x' * 50_000_000; del x; os.write({tell}, b'!'); " + SLEEP
    child = await ChildProcess.start("child", ("-c", script), pass_fds=(tell,))
    await asyncio.to_thread(os.read, ready, 1)
    assert 50_000_000 < child.peak_bytes < 150_000_000  # the most there was, not what is left
    child.kill()
    await child.wait()
    assert child.peak_bytes == 0
    os.close(ready)
    os.close(tell)


HOST = """
import asyncio, os, signal, sys
from lasagna.tee.process import ChildProcess

async def main():
    child = await ChildProcess.start("child", ("-c",
        "import signal, sys; print('up', file=sys.stderr, flush=True); signal.pause()"))
    while not child.last_words:
        await asyncio.sleep(0.01)
    print(child.pid, flush=True)
    signal.pause()

asyncio.run(main())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_dies_with_its_host(number: signal.Signals) -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True)
    with host:
        assert host.stdout
        child = int(host.stdout.readline())
        watch = os.pidfd_open(child)
        host.send_signal(number)
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    assert poll.poll(5000), "the child lives on"
    os.close(watch)


def test_who_is_late_to_be_watched_ends_at_once() -> None:
    script = source_root() / "tee" / "die_with_host.py"
    done = subprocess.run(
        [sys.executable, "-I", "-S", script, "1", "--", sys.executable, "-c", SLEEP],
        capture_output=True,
        text=True,
        check=False,
        timeout=10,
    )
    assert done.returncode == 1
    assert done.stderr == "the host has died already\n"


async def test_variables_are_for_the_program_and_not_for_what_watches_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    create = asyncio.create_subprocess_exec

    async def note(*arguments: str, **options: Any) -> asyncio.subprocess.Process:
        given.append(options["env"])
        return await create(*arguments, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", note)
    script = "import os, sys; print(os.environ['LASAGNA_EPC'], file=sys.stderr)"
    variables = {"LASAGNA_EPC": "limit_pages=300,keep=0"}
    child = await ChildProcess.start("child", ("-c", script), environment=variables)
    assert await child.wait() == 0
    assert child.last_words == "limit_pages=300,keep=0"
    assert "LASAGNA_EPC" not in given[0]


async def test_an_enclave_without_a_host_ends_with_a_reason(tmp_path: Path) -> None:
    spec = EnclaveSpec(socket=tmp_path / "nobody.sock", budget=Bytes(2**20))
    enclave = await InsecureProcessBackend().start(spec)
    async with asyncio.timeout(20):
        assert await enclave.wait() == 1
    assert "No such file" in enclave.last_words


# The measurement.


@pytest.fixture
def code(tmp_path: Path) -> Path:
    root = tmp_path / "lasagna"
    for name in ENCLAVE_CODE:
        source = source_root() / name
        if source.is_dir():
            shutil.copytree(source, root / name)
        else:
            root.mkdir(exist_ok=True)
            shutil.copy(source, root / name)
    return root


def test_the_measurement_is_that_of_the_files_wherever_they_lie(code: Path) -> None:
    assert measure_code(code) == measure_code(code)
    assert len(measure_code(code)) == 32
    assert measure_code(code) == InsecureProcessBackend().measurement()


def test_the_measurement_covers_every_file_by_name_and_content(code: Path) -> None:
    seen = {measure_code(code)}
    for name in ("enclave/messages.py", "trust/keys.py", "package/format.py", "units.py"):
        with (code / name).open("a") as file:
            file.write("#")
        seen.add(measure_code(code))
    (code / "enclave" / "extra.py").touch()
    seen.add(measure_code(code))
    (code / "enclave" / "extra.py").rename(code / "enclave" / "other.py")
    seen.add(measure_code(code))
    assert len(seen) == 7


def test_the_measurement_does_not_cover_caches_or_the_host(code: Path) -> None:
    before = measure_code(code)
    (code / "enclave" / "__pycache__").mkdir(exist_ok=True)
    (code / "enclave" / "__pycache__" / "x.pyc").write_bytes(b"x")
    (code / "server").mkdir()
    (code / "server" / "host.py").touch()
    assert measure_code(code) == before
