"""The backend that runs an enclave in an emulated EPC: real page traffic, no protection.

As the ``insecure-process`` backend, with the EPC emulator in the process (docs/adr/0005). While the
enclave works, its hot pages outside the emulated region are measured and deducted from its limit.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from lasagna.tee.backend import EnclaveBackend, EnclaveSpec
from lasagna.tee.epc import MIN_PAGES, emulator_environment, stats_folder, why_not
from lasagna.tee.epc_profiles import Costs
from lasagna.tee.epc_stats import above_charge, stats_path
from lasagna.tee.footprint import OBSERVE_S, Footprint, Observer
from lasagna.tee.process import ChildProcess, InsecureProcessBackend, enclave_arguments
from lasagna.units import PAGE, Bytes, format_bytes

_log: Final = logging.getLogger(__name__)


class InsecureEmulatedBackend(InsecureProcessBackend):
    """Enclaves as processes with an emulated EPC: whoever owns the machine can read them."""

    name = "insecure-emulated-epc"

    def __init__(self, costs: Costs) -> None:
        """Nothing is started.

        Args:
            costs: limit and charges; see :mod:`lasagna.tee.epc_profiles`.

        Raises:
            LasagnaError: the emulator was not built, or its folder for statistics is not ours.
        """
        self._costs = costs
        self._folder = stats_folder()
        self._environment = emulator_environment(costs, self._folder)

    async def start(self, spec: EnclaveSpec) -> EmulatedEnclave:
        """Start ``python -m lasagna.enclave`` under the emulator.

        Raises:
            OSError: it can't be started.
        """
        arguments = enclave_arguments(spec, self.measurement())
        enclave = await EmulatedEnclave.start("enclave", arguments, environment=self._environment)
        enclave.observe(stats_path(self._folder, enclave.pid), self._costs.limit_pages)
        return enclave


class EmulatedEnclave(ChildProcess):
    """An enclave process whose footprint outside the region is deducted while it lives."""

    _observing: asyncio.Task[None] | None = None

    def observe(self, path: Path, limit_pages: int) -> None:
        """Begin to observe.

        Args:
            path: of its statistics.
            limit_pages: that all of it may have resident.
        """
        self._observing = asyncio.create_task(
            _observe(path, limit_pages), name=f"footprint of {self.pid}"
        )

    async def wait(self) -> int:
        """As of ``ChildProcess``; it is no longer observed afterwards."""
        code = await super().wait()
        if self._observing is not None:
            self._observing.cancel()
        return code


async def _observe(path: Path, limit_pages: int) -> None:
    observer = Observer(path, limit_pages)
    told: Footprint | None = None  # whose costs have been told
    hot = Bytes(0)
    try:
        while True:
            await asyncio.sleep(OBSERVE_S)
            await asyncio.to_thread(observer.observe)
            footprint = observer.footprint
            if footprint is None:
                continue
            if footprint is not told:
                _tell_costs(path, footprint)
                told, hot = footprint, Bytes(0)
            if footprint.hot_bytes != hot:
                hot = footprint.hot_bytes
                _tell_footprint(path, footprint, limit_pages)
    except OSError as error:  # the process has ended, or is somebody else's
        _log.debug("enclave %s: no longer observed: %s", path.stem, error)


def _tell_footprint(path: Path, footprint: Footprint, limit_pages: int) -> None:
    _log.info(
        "enclave %s: %s hot outside the emulated region, deducted from its limit",
        path.stem,
        format_bytes(footprint.hot_bytes),
    )
    if footprint.exceeds_limit:
        _log.warning(
            "enclave %s: what is hot outside the emulated region does not fit into its EPC of %s; "
            "it pages in the least that the emulator can do with, %s",
            path.stem,
            format_bytes(limit_pages * PAGE),
            format_bytes(MIN_PAGES * PAGE),
        )


def _tell_costs(path: Path, footprint: Footprint) -> None:
    """Say it when this machine can't emulate the platform at its speed."""
    for operation, own_ns, charge_ns in above_charge(footprint.stats()):
        _log.warning(
            "enclave %s: %s takes %.1f us here, more than the %.1f us that the profile charges: "
            "it may run slower than it would in an enclave",
            path.stem,
            operation,
            own_ns / 1000,
            charge_ns / 1000,
        )


def choose_backend(costs: Costs | None) -> tuple[EnclaveBackend, str | None]:
    """The emulated EPC where it is asked for and runs; else an ordinary process.

    Args:
        costs: of the EPC that is wanted; None for none.

    Returns:
        The backend, and why it isn't the emulated EPC that was asked for, if it isn't. Then
        memory is accounted for (plan and peak are reported), but nothing limits it.
    """
    if costs is None:
        return InsecureProcessBackend(), None
    reason = why_not()
    if reason is not None:
        return InsecureProcessBackend(), reason
    return InsecureEmulatedBackend(costs), None
