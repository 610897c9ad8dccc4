"""Promise: where the EPC can't be emulated as asked for, that is said, and said once."""

from __future__ import annotations

import asyncio
import logging
import struct
from pathlib import Path

import pytest

from lasagna.tee import emulated
from lasagna.tee.emulated import InsecureEmulatedBackend, choose_backend
from lasagna.tee.epc import why_not
from lasagna.tee.epc_profiles import profile
from lasagna.tee.epc_stats import FIELDS, MAGIC, EpcStats, StatsFile
from lasagna.tee.process import InsecureProcessBackend

COSTS = profile("sgx1-128").costs()


@pytest.mark.parametrize("costs", [COSTS, None])
def test_without_the_emulator_it_is_an_ordinary_process_and_the_reason_is_told(
    costs: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(emulated, "why_not", lambda: "the kernel is too old")
    backend, reason = choose_backend(COSTS if costs else None)
    assert type(backend) is InsecureProcessBackend
    assert backend.name == "insecure-process"
    assert reason == ("the kernel is too old" if costs else None)


@pytest.mark.integration
@pytest.mark.skipif(why_not() is not None, reason=f"no emulator here: {why_not()}")
def test_with_the_emulator_there_is_no_reason() -> None:
    backend, reason = choose_backend(COSTS)
    assert type(backend) is InsecureEmulatedBackend
    assert reason is None


def write(folder: Path, **values: int) -> Path:
    path = folder / "1.epc"
    counters = [values.get(name, 0) for name in FIELDS]
    path.write_bytes(struct.pack(f"<{len(FIELDS)}Q", *counters).ljust(StatsFile.SIZE, b"\0"))
    return path


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("own_ns", "charge_ns", "hot_bytes", "lines"),
    [
        (9_000, 5_000, 0, ["a page load takes 9.0 us here, more than the 5.0 us"]),
        (9_000, 10_000, 0, []),
        (9_000, 0, 0, []),
        (9_000, 10_000, 2**23, ["does not fit into its EPC of 4.19 MB"]),
    ],
)
async def test_what_can_not_be_as_in_an_enclave_is_logged_once(
    own_ns: int,
    charge_ns: int,
    hot_bytes: int,
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = write(
        tmp_path,
        magic=MAGIC,
        own_latency_ns=own_ns - 1000,
        own_load_ns=1000,
        charge_load_ns=charge_ns,
    )
    rounds = 0

    class Observed:
        def __init__(self, path: Path, limit_pages: int) -> None:
            self.footprint = self
            self.hot_bytes = hot_bytes
            self.exceeds_limit = hot_bytes > 0

        def stats(self) -> EpcStats:
            return StatsFile(path).read()

        def observe(self) -> None:
            nonlocal rounds
            rounds += 1
            if rounds == 5:
                raise OSError("it has ended")

    monkeypatch.setattr(emulated, "OBSERVE_S", 0.0)
    monkeypatch.setattr(emulated, "Observer", Observed)
    with caplog.at_level(logging.WARNING):
        async with asyncio.timeout(10):
            await emulated._observe(path, 1024)
    assert len(caplog.messages) == len(lines)
    for message, words in zip(caplog.messages, lines, strict=True):
        assert words in message
