"""Cost profiles of the EPC emulator: what SGX costs on some platform, with sources.

The figures are in ``epc_profiles.toml``. The sequential factor, by which memory encryption slows
reading, is reported and not applied: a slowdown of each access can't be emulated without slowing
code that computes on its cache as well.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final, Literal

import msgspec

from lasagna.errors import UsageError
from lasagna.units import PAGE, Bytes

End = Literal["low", "typical", "high"]
"""Which end of the published range."""
ENDS: Final[tuple[End, ...]] = ("low", "typical", "high")


def end_named(text: str, option: str) -> End:
    """The end that an option of the command line names.

    Raises:
        UsageError: it names none.
    """
    for end in ENDS:
        if text == end:
            return end
    raise UsageError(f"{option} is one of {', '.join(ENDS)}, not {text!r}")


Grade = Literal["read", "derived", "second-hand", "assumed"]


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A published figure; without a range its ends are the value."""

    value: float
    source: str
    grade: Grade
    low: float | None = None
    high: float | None = None

    def at(self, end: End) -> float:
        """The figure at one end of its range."""
        other = {"low": self.low, "typical": self.value, "high": self.high}[end]
        return self.value if other is None else other


_FREE: Final = Figure(0, "no charge", "assumed")


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A platform. Times in nanoseconds; those left out are not charged."""

    summary: str
    epc_bytes: Figure
    fault_ns: Figure = _FREE
    page_in_ns: Figure = _FREE
    page_out_ns: Figure = _FREE
    page_add_ns: Figure = _FREE
    transition_ns: Figure = _FREE
    switchless_ns: Figure = _FREE
    sequential_factor: Figure = Figure(1.0, "not slowed", "assumed")

    def costs(self, end: End = "typical") -> Costs:
        """What the emulator charges at one end of the ranges."""
        return Costs(
            epc_bytes=Bytes(int(self.epc_bytes.at(end))),
            load_ns=int(self.fault_ns.at(end) + self.page_in_ns.at(end)),
            add_ns=int(self.fault_ns.at(end) + self.page_add_ns.at(end)),
            evict_ns=int(self.page_out_ns.at(end)),
            entry_ns=int(self.transition_ns.at(end)),
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """What one process under the emulator is limited to and charged.

    Attributes:
        epc_bytes: resident at most.
        load_ns: a fault and the page-in, for the thread that faults.
        add_ns: a fault and the first touch of a page.
        evict_ns: a page-out, for the reclaimer.
        entry_ns: leaving the enclave and entering it again.
    """

    epc_bytes: Bytes
    load_ns: int
    add_ns: int
    evict_ns: int
    entry_ns: int

    @property
    def limit_pages(self) -> int:
        """Whole pages that may be resident."""
        return self.epc_bytes // PAGE


@cache
def profiles() -> dict[str, Profile]:
    """All profiles by name, in the file's order."""
    text = resources.files("lasagna.tee").joinpath("epc_profiles.toml").read_text()
    tables = tomllib.loads(text)
    found = {}
    for name, table in tables.items():
        base = tables[table.pop("like")] if "like" in table else {}
        found[name] = msgspec.convert(base | table, Profile)
    return found


def profile(name: str) -> Profile:
    """One profile.

    Raises:
        UsageError: there is no such profile.
    """
    if name not in profiles():
        raise UsageError(f"no profile {name!r}; there are: {', '.join(profiles())}")
    return profiles()[name]
