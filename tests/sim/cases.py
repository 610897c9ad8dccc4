"""Small clusters for the tests of the simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np

from lasagna.policy.cluster import Cluster, Part, Server, part_of, sliced
from lasagna.policy.costs import ModelCosts, SliceCosts
from lasagna.policy.placed import Bound, PartCosts, Placement
from lasagna.policy.stages import Machine
from lasagna.sim.arrivals import Arrival, poisson, requests

MB = 1_000_000
MACHINE = Machine(budget=60 * MB, lanes=1, cores=2, load_rate=3.4e9, entry_s=0.0002)
ROW_BYTES = 100_000


def model(slices: int, row_s: float, *, weight: int = MB, max_rows: int = 32) -> ModelCosts:
    """A chain of equal slices; a row takes ``row_s`` in all of them."""
    each = row_s / slices
    one = SliceCosts(weight, tuple(each * b for b in (1, 2, 4, 8)), (1000, 2000, 4000, 8000))
    cuts = [ROW_BYTES] * slices + [4000]
    return ModelCosts(
        (one,) * slices, tuple(cuts), tuple(a + b for a, b in pairwise(cuts)), max_rows
    )


def servers(count: int, machine: Machine = MACHINE, **facts: float) -> tuple[Server, ...]:
    return tuple(Server(f"s{number}", machine, **facts) for number in range(count))


def cluster(
    those: tuple[Server, ...], models: Mapping[str, ModelCosts], rate: float = 1.0
) -> Cluster:
    forms = {name: (costs,) for name, costs in models.items()}
    return Cluster(those, forms, dict.fromkeys(models, rate))


def placed(described: Cluster, parts: Iterable[Part]) -> Placement:
    """These parts, with costs of one row alone at the first batch size."""
    found = {}
    for part in parts:
        speed = described.server(part.server).speed
        costs = sliced(part_of(described.models[part.model], part.first, part.last, speed))
        seconds = costs.compute_at(0, len(costs.slices), 1)
        found[part] = PartCosts(seconds, seconds, costs.cut_bytes[0], costs.cut_bytes[-1], 1.0)
    nothing = Bound(1.0, "not worked out")
    return Placement(found, 1.0, 1.0, {}, "not worked out", nothing, nothing)


def everywhere(described: Cluster) -> Placement:
    """Every model whole on every server."""
    parts = [
        Part(name, 0, len(sliced(forms).slices), server.name)
        for server in described.servers
        for name, forms in described.models.items()
    ]
    return placed(described, parts)


def load(seed: int, rate: float, until_s: float, *names: str, **facts: object) -> list[Arrival]:
    """Poisson arrivals for these models, in equal shares."""
    rng = np.random.default_rng(seed)
    mix = dict.fromkeys(names, 1.0)
    return list(requests(rng, poisson(rng, rate), mix, until_s=until_s, **facts))  # type: ignore[arg-type]
