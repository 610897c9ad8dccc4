"""A simulation with everything in it, and a digest of its event log: for the determinism test."""

from __future__ import annotations

import hashlib

from tests.sim.cases import MB, cluster, load, model, placed, servers

from lasagna.policy.cluster import Part
from lasagna.sim.arrivals import merge
from lasagna.sim.cluster import VirtualCluster
from lasagna.sim.options import EnclaveDies, EpcTaken, Options, ServerDies, ServerSlows


def digest(seed: int) -> str:
    """Of all events and commands, in order, and of the latencies."""
    models = {name: model(5, 0.01 * n, weight=9 * MB) for n, name in enumerate("abc", 1)}
    described = cluster(servers(4), models)
    parts = [Part(name, 0, 5, f"s{n}") for name in models for n in range(3)]
    parts += [Part("c", 0, 2, "s3"), Part("c", 2, 5, "s3"), Part("c", 2, 5, "s0")]
    log = hashlib.sha256()

    def hear(*what: object) -> None:
        log.update(repr(what).encode())

    options = Options("earliest", balancers=2, noise=0.1, admission=True, detect_s=0.5)
    run = VirtualCluster(described, placed(described, parts), options, seed=seed, heard=hear)
    limits = {"a": 1.0}
    arrivals = merge(
        load(seed, 30.0, 5.0, "a", "b", "c", limits_s=limits), load(seed + 1, 20.0, 5.0, "b")
    )
    outcome = run.run(
        arrivals,
        [
            ServerDies(1.0, "s0", 0.5),
            EnclaveDies(2.0, "s1", 0.3),
            ServerSlows(2.5, "s2", 3.0),
            EpcTaken(3.0, "s3", 30 * MB, 0.4),
        ],
    )
    log.update(outcome.requests.latencies_s().tobytes())
    return log.hexdigest()


if __name__ == "__main__":
    import sys

    sys.stdout.write(digest(int(sys.argv[1])))
