"""How a simulated cluster is run, and what goes wrong in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from lasagna.policy.paging import Paging
from lasagna.policy.state import Settings
from lasagna.sim.calibration import Calibration
from lasagna.sim.clock import NEVER
from lasagna.sim.replacing import Replanning


@dataclass(frozen=True, slots=True)
class Options:
    """How a cluster is run.

    Attributes:
        rule: by which balancers choose routes, one of ``policy.balancer.RULES``.
        balancers: how many there are.
        settings: of every scheduler.
        admission: whether balancers and schedulers are told of limits, and refuse what is too late.
        report_s: between two reports of a server; they take its delay to arrive.
        detect_s: from a server's loss until balancers are told.
        calibrations: of servers, by name; the others take what the profiles say.
        noise: standard deviation of the logarithm of runs' times; 0 for none.
        paging: of servers, by name, where no budget is kept.
        replanning: how other placements are looked for; None to keep the first one.
    """

    rule: str = "earliest"
    balancers: int = 1
    settings: Settings = field(default_factory=Settings)
    admission: bool = False
    report_s: float = 0.1
    detect_s: float = 1.0
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)
    noise: float = 0.0
    paging: Mapping[str, Paging] = field(default_factory=dict)
    replanning: Replanning | None = None


@dataclass(frozen=True, slots=True)
class ServerDies:
    """A server is gone with all that is in it; it returns after so long, or never."""

    at_s: float
    server: str
    back_after_s: float = NEVER


@dataclass(frozen=True, slots=True)
class EnclaveDies:
    """A server's enclave is gone, its scheduler is not; another one runs after so long."""

    at_s: float
    server: str
    restart_s: float = 3.0


@dataclass(frozen=True, slots=True)
class ServerSlows:
    """From then on a server computes so many times as long as at first."""

    at_s: float
    server: str
    factor: float


@dataclass(frozen=True, slots=True)
class EpcTaken:
    """From then on other tenants have so much of a server's EPC: it begins anew with the rest.

    An enclave's memory is fixed when it is made. What a tenant gives back is less that is taken.
    """

    at_s: float
    server: str
    taken_bytes: int
    restart_s: float = 3.0


Trouble: TypeAlias = ServerDies | EnclaveDies | ServerSlows | EpcTaken
