"""The file that describes a simulation, in TOML. docs/reference/scenario-file.md has each key."""

from __future__ import annotations

import tomllib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby, pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta

from lasagna.cli.cluster_file import read_cluster
from lasagna.cli.costs_file import read_costs
from lasagna.cli.decoding import converted, nearest, read_limited
from lasagna.errors import UsageError
from lasagna.policy.cluster import Cluster
from lasagna.policy.costs import Forms
from lasagna.policy.placement import PlanOptions
from lasagna.sim.arrivals import Arrival, diurnal, gamma, mmpp, poisson, recorded, requests
from lasagna.sim.clock import NEVER
from lasagna.sim.options import EnclaveDies, EpcTaken, ServerDies, ServerSlows, Trouble
from lasagna.sim.policies import CLUSTER_POLICIES, ClusterPolicy, cluster_policy
from lasagna.sim.replacing import Replanning
from lasagna.units import MIB

_Positive = Annotated[float, Meta(gt=0, le=1e9)]
_NotNegative = Annotated[float, Meta(ge=0, le=1e9)]
_MAX_BYTES: Final = MIB


class _Arrivals(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    pass


class _Poisson(_Arrivals, frozen=True, tag="poisson"):
    pass


class _Gamma(_Arrivals, frozen=True, tag="gamma"):
    cv: Annotated[float, Meta(ge=0.01, le=100)] = 2.0


class _Mmpp(_Arrivals, frozen=True, tag="mmpp"):
    busy: Annotated[float, Meta(ge=1, le=1000)] = 3.0
    busy_s: _Positive = 5.0
    calm_s: _Positive = 20.0


class _Diurnal(_Arrivals, frozen=True, tag="diurnal"):
    swing: Annotated[float, Meta(ge=0, le=1)] = 0.5
    period_s: _Positive = 60.0


class _Recorded(_Arrivals, frozen=True, tag="recorded"):
    file: Annotated[str, Meta(min_length=1)]


_AnyArrivals: TypeAlias = _Poisson | _Gamma | _Mmpp | _Diurnal | _Recorded


class _Trouble(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    server: str
    at_s: _NotNegative


class _ServerDies(_Trouble, frozen=True, tag="server-dies"):
    back_after_s: _Positive = NEVER


class _EnclaveDies(_Trouble, frozen=True, tag="enclave-dies"):
    restart_s: _Positive = 3.0


class _ServerSlows(_Trouble, frozen=True, tag="server-slows"):
    factor: _Positive = 2.0


class _EpcTaken(_Trouble, frozen=True, tag="epc-taken", kw_only=True):
    taken_mb: _NotNegative
    restart_s: _Positive = 3.0


_Troubles: TypeAlias = _ServerDies | _EnclaveDies | _ServerSlows | _EpcTaken


class _Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    objective: Literal["throughput", "latency"] = "throughput"
    time_limit_s: _NotNegative = 5.0
    simulate: bool = False


class _Replan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    after_s: _NotNegative = 2.0
    slower: Annotated[float, Meta(gt=1, le=100)] = 1.3
    mix: Annotated[float, Meta(gt=0, le=1)] = 0.2
    mix_s: _Positive = 5.0
    horizon_s: _Positive = 600.0


class _Mix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    at_s: _Positive
    demand: dict[str, _NotNegative]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cluster: str
    models: Annotated[tuple[str, ...], Meta(min_length=1)]
    seconds: Annotated[float, Meta(gt=0, le=1e6)] = 60.0
    warm_up_s: _NotNegative = 10.0
    seed: Annotated[int, Meta(ge=0, le=2**32)] = 1
    load: Annotated[float, Meta(gt=0, le=100)] = 0.7
    requests_per_s: _Positive | None = None
    policies: Annotated[tuple[str, ...], Meta(min_length=1)] = ("lasagna", "whole-model")
    balancers: Annotated[int, Meta(ge=1, le=1000)] = 1
    report_ms: _Positive = 100.0
    detect_ms: _NotNegative = 1000.0
    noise: Annotated[float, Meta(ge=0, le=2)] = 0.0
    admission: bool = False
    arrivals: _AnyArrivals = _Poisson()
    trouble: tuple[_Troubles, ...] = ()
    plan: _Plan = _Plan()
    replan: _Replan | None = None
    mix: tuple[_Mix, ...] = ()


@dataclass(frozen=True, slots=True)
class Scenario:
    """What a file asks to be simulated.

    Attributes:
        path: of the file.
        cluster: with the models' costs.
        policies: to be compared, each with the same requests.
        plan: options of the planner.
        troubles: that come over servers.
        settings: the other keys of the file.
    """

    path: Path
    cluster: Cluster
    policies: tuple[ClusterPolicy, ...]
    plan: PlanOptions
    troubles: tuple[Trouble, ...]
    settings: _File

    @property
    def kind(self) -> str:
        """Of arrivals, as the file has it."""
        return str(self.settings.arrivals.__struct_config__.tag)

    @property
    def replanning(self) -> Replanning | None:
        """How policies that plan look for other placements; None if the file asks for none."""
        how = self.settings.replan
        if how is None:
            return None
        return Replanning(
            how.after_s, how.slower, how.mix, how.mix_s, how.horizon_s, options=self.plan
        )

    def rate(self, throughput: float) -> float:
        """Requests a second, where ``load`` is a share of this throughput."""
        return self.settings.requests_per_s or self.settings.load * throughput

    def arrivals(self, throughput: float) -> Iterator[Arrival]:
        """Requests, the same ones at each call.

        Args:
            throughput: requests a second that ``load`` is a share of.
        """
        settings, cluster = self.settings, self.cluster
        rate = self.rate(throughput)
        if isinstance(settings.arrivals, _Recorded):
            return self._recorded(settings.arrivals.file)
        times = _times(settings.arrivals, rate, np.random.default_rng((settings.seed, 1)))
        rng, limits_s = np.random.default_rng((settings.seed, 2)), dict(cluster.limits_s)
        mixes = [(0.0, cluster.demand), *((one.at_s, one.demand) for one in settings.mix)]
        ends = [*(min(at_s, settings.seconds) for at_s, _ in mixes[1:]), settings.seconds]
        spans = groupby(times, key=lambda at_s: bisect_left(ends, at_s))
        return chain.from_iterable(
            requests(
                rng,
                own,
                {name: rate for name, rate in sorted(mixes[number][1].items()) if rate > 0},
                limits_s=limits_s,
            )
            for number, own in takewhile(lambda span: span[0] < len(mixes), spans)
        )

    def _recorded(self, file: str) -> Iterator[Arrival]:
        """Those of the first ``seconds``; limits are the cluster's, where a line has none."""
        limits_s = self.cluster.limits_s
        for one in recorded(self.path.parent / file):
            if one.at_s > self.settings.seconds:
                return
            limit_s = limits_s.get(one.model) if one.limit_s is None else one.limit_s
            yield one._replace(limit_s=limit_s)


def read_scenario(path: Path) -> Scenario:
    """Read a scenario, with the cluster and the costs that it names; they lie relative to it.

    Raises:
        UsageError: a file can't be read, or says what makes no sense; names the key.
    """
    content = read_limited(path, "a scenario", _MAX_BYTES)
    try:
        tables: Mapping[str, Any] = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    file = converted(tables, _File, str(path))
    models: dict[str, Forms] = {}
    for one in file.models:
        name, forms = read_costs(path.parent / one)
        if name in models:
            raise UsageError(f"{path}, models: {name!r} is there twice")
        models[name] = forms
    cluster = read_cluster(path.parent / file.cluster).cluster(models)
    for name in file.policies:
        if name not in CLUSTER_POLICIES:
            raise UsageError(f"{path}, policies: {name!r}; {nearest(name, CLUSTER_POLICIES)}")
    if file.warm_up_s >= file.seconds:
        raise UsageError(f"{path}: warm_up_s must be less than seconds, {file.seconds:g}")
    _check_mixes(file, cluster, path)
    if isinstance(file.arrivals, _Recorded):
        _check_recorded(path.parent / file.arrivals.file, cluster)
    return Scenario(
        path,
        cluster,
        tuple(map(cluster_policy, file.policies)),
        PlanOptions(file.plan.objective, file.plan.time_limit_s),
        tuple(_trouble(one, cluster, path) for one in file.trouble),
        file,
    )


def _check_mixes(file: _File, cluster: Cluster, path: Path) -> None:
    for before, after in pairwise((0.0, *(one.at_s for one in file.mix))):
        if after <= before:
            raise UsageError(f"{path}, [[mix]]: at_s must rise, {after:g} is not after {before:g}")
    for one in file.mix:
        for name in one.demand:
            if name not in cluster.models:
                raise UsageError(
                    f"{path}, [[mix]]: no model {name!r}; {nearest(name, cluster.models)}"
                )
        if not any(one.demand.values()):
            raise UsageError(f"{path}, [[mix]] at {one.at_s:g}: one demand must be above 0")
    if file.mix and isinstance(file.arrivals, _Recorded):
        raise UsageError(f"{path}, [[mix]]: recorded arrivals have a mix of their own")


def _check_recorded(path: Path, cluster: Cluster) -> None:
    for number, one in enumerate(recorded(path), 1):
        if one.model not in cluster.models:
            raise UsageError(
                f"{path}, line {number}: no model {one.model!r}; "
                f"{nearest(one.model, cluster.models)}"
            )


def _times(arrivals: _AnyArrivals, rate: float, rng: np.random.Generator) -> Iterator[float]:
    match arrivals:
        case _Gamma(cv=cv):
            return gamma(rng, rate, cv)
        case _Mmpp(busy=busy, busy_s=busy_s, calm_s=calm_s):  # ``rate`` is the mean
            calm = rate * (busy_s + calm_s) / (busy * busy_s + calm_s)
            return mmpp(rng, (calm, busy * calm), (calm_s, busy_s))
        case _Diurnal(swing=swing, period_s=period_s):
            return diurnal(rng, rate, swing, period_s)
        case _:
            return poisson(rng, rate)


def _trouble(one: _Troubles, cluster: Cluster, path: Path) -> Trouble:
    names = [server.name for server in cluster.servers]
    if one.server not in names:
        raise UsageError(
            f"{path}, [[trouble]]: no server {one.server!r}; {nearest(one.server, names)}"
        )
    match one:
        case _ServerDies():
            return ServerDies(one.at_s, one.server, one.back_after_s)
        case _EnclaveDies():
            return EnclaveDies(one.at_s, one.server, one.restart_s)
        case _ServerSlows():
            return ServerSlows(one.at_s, one.server, one.factor)
        case _EpcTaken():
            budget = cluster.server(one.server).machine.budget
            if one.taken_mb * 1e6 >= budget:
                raise UsageError(
                    f"{path}, [[trouble]]: taken_mb must be less than the {budget / 1e6:g} MB of "
                    f"EPC that {one.server!r} has for models"
                )
            return EpcTaken(one.at_s, one.server, int(one.taken_mb * 1e6), one.restart_s)
