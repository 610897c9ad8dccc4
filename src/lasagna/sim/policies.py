"""Policies for a whole cluster, by name: a placement, a rule for routes, and what servers do.

docs/reference/scenario-file.md says what each of them is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from lasagna.errors import UsageError
from lasagna.policy.balancer import RULES
from lasagna.policy.baselines import LASAGNA, Policy, policy_named
from lasagna.policy.cluster import Cluster
from lasagna.policy.costs import SLICED, Forms
from lasagna.policy.placed import Placement
from lasagna.policy.spread import whole_models
from lasagna.policy.state import Settings
from lasagna.sim.calibration import Paging
from lasagna.sim.options import Options

BESIDE_BYTES: Final = 14_000_000
"""EPC beside what a server has for models, as cluster files leave it by default."""
UNLIMITED: Final = 2**60


@dataclass(frozen=True, slots=True)
class ClusterPolicy:
    """How a cluster is run.

    Attributes:
        name: that people choose it by.
        placed: ``plan``, by the planner; ``whole``, whole models on every server.
        rule: by which routes are chosen.
        local: what each server does.
    """

    name: str
    placed: Literal["plan", "whole"] = "plan"
    rule: str = "earliest"
    local: Policy = LASAGNA


def _rules() -> dict[str, ClusterPolicy]:
    return {rule: ClusterPolicy(rule, rule=rule) for rule in RULES if rule != "earliest"}


CLUSTER_POLICIES: Final[Mapping[str, ClusterPolicy]] = {
    "lasagna": ClusterPolicy("lasagna"),
    "whole-model": ClusterPolicy("whole-model", "whole"),
    "on-demand": ClusterPolicy(
        "on-demand",
        "whole",
        local=policy_named("on-demand"),
    ),
    "vanilla": ClusterPolicy(
        "vanilla",
        "whole",
        "round-robin",
        policy_named("vanilla"),
    ),
    **_rules(),
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A policy on a cluster, ready to be simulated."""

    cluster: Cluster
    placement: Placement
    options: Options = field(default_factory=Options)


def cluster_policy(name: str) -> ClusterPolicy:
    """A policy by its name.

    Raises:
        UsageError: there is none of that name.
    """
    found = CLUSTER_POLICIES.get(name)
    if found is None:
        raise UsageError(f"there is no policy {name!r}; choose {', '.join(CLUSTER_POLICIES)}")
    return found


def prepared(
    policy: ClusterPolicy, cluster: Cluster, plan: Placement, options: Options, page_s: float
) -> Prepared:
    """Put a policy onto a cluster.

    Args:
        policy: to follow.
        cluster: servers, models and load.
        plan: the planner's placement of it.
        options: of the simulation; rule, styles and paging are the policy's.
        page_s: seconds of one page's eviction and load, where the kernel pages.

    Raises:
        BudgetError: some model fits on no server whole.
    """
    settings = replace(options.settings, style=policy.local.style, in_order=policy.local.in_order)
    options = replace(options, rule=policy.rule, settings=settings)
    if policy.local.paged:
        paging = {
            server.name: Paging(server.machine.budget + BESIDE_BYTES, page_s)
            for server in cluster.servers
        }
        options = replace(options, paging=paging)
        cluster = replace(
            cluster,
            servers=tuple(
                replace(server, machine=replace(server.machine, budget=UNLIMITED))
                for server in cluster.servers
            ),
            models={name: one_piece(forms) for name, forms in cluster.models.items()},
        )
    placement = plan if policy.placed == "plan" else whole_models(cluster)
    return Prepared(cluster, placement, options)


def one_piece(forms: Forms) -> Forms:
    """A model as a single slice, as ONNX Runtime alone runs it; as it is if that is not known."""
    whole = [form for form in forms if len(form.slices) == 1]
    return (replace(whole[0], form=SLICED, copies_bytes=0),) if whole else forms[:1]


def roomy() -> Settings:
    """Servers that refuse nothing: balancers decide who is let in."""
    return Settings(queue_rows=10**9)
