"""Policies for a whole cluster, by name: a placement, a rule for routes, and what servers do.

docs/reference/scenario-file.md says what each of them is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, Literal

from lasagna.errors import UsageError
from lasagna.policy.balancer import RULES
from lasagna.policy.baselines import LASAGNA, Policy, policy_named
from lasagna.policy.cluster import Cluster, Part, sliced
from lasagna.policy.costs import SLICED, Forms, ModelCosts, SliceCosts
from lasagna.policy.media import media
from lasagna.policy.paging import Paging
from lasagna.policy.placed import PartCosts, Placement
from lasagna.policy.plan import Style
from lasagna.policy.spread import whole_models
from lasagna.policy.state import Settings
from lasagna.sim.options import Options

BESIDE_BYTES: Final = 14_000_000
"""EPC beside what a server has for models, as cluster files leave it by default."""
UNLIMITED: Final = 2**60


@dataclass(frozen=True, slots=True)
class ClusterPolicy:
    """How a cluster is run.

    Attributes:
        name: that people choose it by.
        placed: ``plan``, by the planner; ``whole``, whole models on every server; ``media``, a
            chain of partitions of each model, as MEDIA would; ``media-repeated``, as many chains as
            there are servers for.
        rule: by which routes are chosen; None for the one that the plan comes with.
        local: what each server does.
    """

    name: str
    placed: Literal["plan", "whole", "media", "media-repeated"] = "plan"
    rule: str | None = None
    local: Policy = LASAGNA


def _rules() -> dict[str, ClusterPolicy]:
    return {rule: ClusterPolicy(rule, rule=rule) for rule in RULES}


CLUSTER_POLICIES: Final[Mapping[str, ClusterPolicy]] = {
    "lasagna": ClusterPolicy("lasagna"),
    "whole-model": ClusterPolicy("whole-model", "whole", "earliest"),
    "on-demand": ClusterPolicy("on-demand", "whole", "earliest", policy_named("on-demand")),
    "vanilla": ClusterPolicy(
        "vanilla",
        "whole",
        "round-robin",
        policy_named("vanilla"),
    ),
    "local-only": ClusterPolicy("local-only", "whole", "round-robin"),
    "global-only": ClusterPolicy("global-only", local=policy_named("on-demand")),
    "media": ClusterPolicy("media", "media", "earliest", policy_named("vanilla")),
    "media-repeated": ClusterPolicy(
        "media-repeated", "media-repeated", "earliest", policy_named("vanilla")
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
        options: of the simulation; style and paging are the policy's, but for whether threads may
            have a batch each, and how large batches may be, and so is the rule if it has one.
        page_s: seconds of one page's eviction and load, where the kernel pages.

    Raises:
        BudgetError: some model fits on no server whole, or MEDIA has fewer servers than models.
    """
    own, given = policy.local.style, options.settings.style
    style = replace(own, apart=given.apart, max_rows=min(own.max_rows, given.max_rows))
    settings = replace(options.settings, style=style, in_order=policy.local.in_order)
    options = replace(options, rule=policy.rule or options.rule, settings=settings)
    if policy.placed != "plan":
        options = replace(options, replanning=None)
    placement = plan
    if policy.local.paged:
        paging = {
            server.name: Paging(server.machine.budget + BESIDE_BYTES, page_s)
            for server in cluster.servers
        }
        options = replace(options, paging=paging)
        if policy.placed in ("media", "media-repeated"):
            repeated = policy.placed == "media-repeated"
            cluster, placement = in_partitions(cluster, media(cluster, paging, repeated=repeated))
        else:
            models = {name: one_piece(forms) for name, forms in cluster.models.items()}
            cluster = replace(cluster, models=models)
        unlimited = (
            replace(server, machine=replace(server.machine, budget=UNLIMITED))
            for server in cluster.servers
        )
        cluster = replace(cluster, servers=tuple(unlimited))
    if policy.placed == "whole":
        placement = whole_models(cluster)
    return Prepared(cluster, placement, options)


def in_partitions(cluster: Cluster, placement: Placement) -> tuple[Cluster, Placement]:
    """The same with models whose slices are the placement's partitions, each run in one piece."""
    models, parts = dict(cluster.models), dict[Part, PartCosts]()
    for name in cluster.wanted:
        costs = sliced(cluster.models[name])
        mine = {part: one for part, one in placement.parts.items() if part.model == name}
        cuts = sorted({end for part in mine for end in (part.first, part.last)})
        models[name] = (joined(costs, cuts),)
        numbers = {cut: number for number, cut in enumerate(cuts)}
        for part, one in mine.items():
            parts[Part(name, numbers[part.first], numbers[part.last], part.server)] = one
    return replace(cluster, models=models), replace(placement, parts=dict(sorted(parts.items())))


def joined(costs: ModelCosts, cuts: Sequence[int]) -> ModelCosts:
    """A model with all slices between two of these cuts as one."""
    slices = []
    for first, last in pairwise(cuts):
        own = costs.slices[first:last]
        slices.append(
            SliceCosts(
                sum(one.weight_bytes for one in own),
                tuple(map(sum, zip(*(one.compute_s for one in own), strict=True))),
                tuple(map(max, zip(*(one.workspace_bytes for one in own), strict=True))),
            )
        )
    return replace(
        costs,
        slices=tuple(slices),
        cut_bytes=tuple(costs.cut_bytes[cut] for cut in cuts),
        running_bytes=tuple(max(costs.running_bytes[a:b]) for a, b in pairwise(cuts)),
    )


def one_piece(forms: Forms) -> Forms:
    """A model as a single slice, as ONNX Runtime alone runs it; as it is if that is not known."""
    whole = [form for form in forms if len(form.slices) == 1]
    return (replace(whole[0], form=SLICED, copies_bytes=0),) if whole else forms[:1]


def roomy(style: Style | None = None) -> Settings:
    """Servers that refuse nothing, as balancers decide who is let in.

    Args:
        style: in which servers' own planners divide memory, and share work; by default all.
    """
    return Settings(queue_rows=10**9, style=style or Style())
