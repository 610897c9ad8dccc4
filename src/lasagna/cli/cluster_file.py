"""The file that describes a cluster: servers, demand and latency limits, in TOML.

docs/reference/cluster-file.md has each key. A simulation's file holds the same tables, so decoding
(`decode_cluster`) is apart from reading (`read_cluster`).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from lasagna.cli.decoding import converted, nearest, read_limited
from lasagna.errors import UsageError
from lasagna.policy.cluster import Cluster, Server
from lasagna.policy.costs import Forms
from lasagna.server.costs import machine_of
from lasagna.tee.epc_profiles import profiles
from lasagna.units import MIB

BESIDE_MB: Final = 14.0
"""EPC, in MB, for what is in no plan: interpreter, sessions, frames, hot code. As much as the
measurements of one server leave (``bench.local``)."""
MAX_SERVERS: Final = 10_000
_MAX_BYTES: Final = MIB
_NUMBER: Final = "{}"

_Positive = Annotated[float, Meta(gt=0, le=1e9)]
_NotNegative = Annotated[float, Meta(ge=0, le=1e9)]
_Threads = Annotated[int, Meta(ge=1, le=1024)]


class _ServerTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One ``[[server]]``, with what ``[defaults]`` says of it."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    count: Annotated[int, Meta(ge=1, le=MAX_SERVERS)] | None = None
    epc: str | None = None
    epc_mb: _Positive | None = None
    beside_mb: _NotNegative = BESIDE_MB
    threads: _Threads = 1
    cores: _Threads | None = None
    speed: _Positive = 1.0
    link_mbit: _Positive = 1000.0
    delay_ms: _NotNegative = 0.2


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    server: Annotated[tuple[dict[str, Any], ...], Meta(min_length=1)]
    demand: dict[str, _NotNegative]
    defaults: dict[str, Any] = {}
    limits_ms: dict[str, _Positive] = {}


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """What a file says of a cluster; the models come from elsewhere.

    Attributes:
        path: of the file.
        servers: with names of their own.
        demand: requests a second by model.
        limits_s: seconds in which a request of a model should be answered.
    """

    path: Path
    servers: tuple[Server, ...]
    demand: Mapping[str, float]
    limits_s: Mapping[str, float] = field(default_factory=dict)

    def cluster(self, models: Mapping[str, Forms]) -> Cluster:
        """The cluster with these models' costs, by name.

        Raises:
            UsageError: the file and the models don't agree about which models there are.
        """
        for table, found in (("demand", self.demand), ("limits_ms", self.limits_s)):
            for name in found:
                if name not in models:
                    hint = nearest(name, models)
                    raise UsageError(f"{self.path}, [{table}]: no model {name!r} was given; {hint}")
        for name in models:
            if name not in self.demand:
                raise UsageError(
                    f"{self.path}, [demand]: {name!r} is missing: add the requests a second that "
                    "are expected of it, or 0 to leave it out"
                )
        if not any(self.demand.values()):
            raise UsageError(f"{self.path}, [demand]: no model has requests a second above 0")
        return Cluster(self.servers, models, self.demand, self.limits_s)


def read_cluster(path: Path) -> ClusterFile:
    """Read a cluster's file.

    Raises:
        UsageError: it can't be read or is no such file; names the key and what would be right.
    """
    content = read_limited(path, "a cluster's file", _MAX_BYTES)
    try:
        tables = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # also of text that is no UTF-8
        raise UsageError(f"{path} is no TOML: {error}") from None
    return decode_cluster(tables, path)


def decode_cluster(tables: Mapping[str, object], path: Path) -> ClusterFile:
    """A cluster from the tables ``server``, ``defaults``, ``demand`` and ``limits_ms`` of a file.

    Raises:
        UsageError: as of `read_cluster`.
    """
    file = converted(tables, _File, str(path))
    for key in ("name", "count"):
        if key in file.defaults:
            raise UsageError(f"{path}, [defaults]: {key!r} belongs to each [[server]]")
    # By itself, too: an error in it would look like one of the first server.
    _checked(file.defaults | {"name": "defaults"}, f"{path}, [defaults]")
    servers: list[Server] = []
    for number, own in enumerate(file.server, 1):
        where = f"{path}, [[server]] number {number}"
        if isinstance(own.get("name"), str):
            where += f" ({own['name'][:64]!r})"
        servers += _servers(_with_defaults(file.defaults, own), where)
        if len(servers) > MAX_SERVERS:
            raise UsageError(f"{where}: more than {MAX_SERVERS:,} servers")
    names = [server.name for server in servers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path}: two servers are called {twice!r}; give each a name of its own")
    limits_s = {name: limit / 1000 for name, limit in file.limits_ms.items()}
    return ClusterFile(path, tuple(servers), file.demand, limits_s)


def _with_defaults(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A server's own keys first; either of the two for the EPC takes the place of both."""
    sizes = {"epc", "epc_mb"}
    kept = {k: v for k, v in defaults.items() if k not in sizes or not sizes & own.keys()}
    return kept | dict(own)


def _checked(keys: Mapping[str, Any], where: str) -> _ServerTable:
    table = converted(keys, _ServerTable, where)
    if table.epc is not None and table.epc_mb is not None:
        raise UsageError(f"{where}: epc and epc_mb are both given; leave one out")
    if table.epc is not None and table.epc not in profiles():
        raise UsageError(
            f"{where}, epc: there is no profile {table.epc[:80]!r}; there are "
            f"{', '.join(profiles())}; or give epc_mb"
        )
    return table


def _servers(keys: Mapping[str, Any], where: str) -> list[Server]:
    table = _checked(keys, where)
    if table.epc is not None:
        epc_bytes = int(profiles()[table.epc].epc_bytes.value)
    elif table.epc_mb is not None:
        epc_bytes = int(table.epc_mb * 1e6)
    else:
        raise UsageError(f'{where}: its EPC is missing: give epc = "sgx1-128" or epc_mb = 93.5')
    budget = epc_bytes - int(table.beside_mb * 1e6)
    if budget <= 0:
        raise UsageError(
            f"{where}: an EPC of {epc_bytes / 1e6:g} MB leaves nothing for models, since "
            f"beside_mb = {table.beside_mb:g}"
        )
    machine = replace(
        machine_of(budget, table.threads),
        cores=table.threads if table.cores is None else table.cores,
    )
    server = Server(
        name=table.name,
        machine=machine,
        speed=table.speed,
        bandwidth=table.link_mbit * 1e6 / 8,
        delay_s=table.delay_ms / 1000,
    )
    if not table.name.isprintable():
        raise UsageError(f"{where}, name: it has characters that can't be printed")
    if table.count is None:
        return [server]
    if table.name.count(_NUMBER) != 1:
        raise UsageError(
            f"{where}, name: with count it needs one {_NUMBER} where the number goes, such as "
            f'"edge-{_NUMBER}"'
        )
    return [
        replace(server, name=table.name.replace(_NUMBER, str(number)))
        for number in range(1, table.count + 1)
    ]
