"""How a model was fitted into the enclave, for people and for the statistics."""

from __future__ import annotations

import msgspec

from lasagna.policy.plan import MemoryPlan


class StageFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Slices ``first`` to ``last``, exclusive, run in batches of up to ``rows``."""

    first: int
    last: int
    rows: int


class PlanFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's part in its enclave's memory. All sizes in bytes.

    The first fields are the model's own; from ``ring_slots`` on they are for all models of the
    enclave together.
    """

    variant: str
    form: str
    slices: int
    stages: tuple[StageFacts, ...]
    pinned_slices: tuple[int, ...]
    weight_bytes: int
    pinned_bytes: int
    max_batch: int
    ring_slots: int
    slot_bytes: int
    activation_bytes: int
    """For all compute threads together."""
    input_bytes: int
    """Staging memory for inputs of runs that wait; 0 when inputs go to the activations."""
    staging_bytes: int
    """Ciphertext of weights and of requests on its way to be decrypted."""
    workspace_bytes: int
    """Of kernels, and of copies of weights in sessions."""
    waiting_bytes: int
    """Activations of requests between two stages."""
    total_bytes: int


def plan_facts(plan: MemoryPlan, name: str, variant: str) -> PlanFacts:
    """What a plan means for one of its models."""
    costs, pinned = plan.costs[name], plan.pinned[name]
    return PlanFacts(
        variant=variant,
        form=costs.form,
        slices=len(costs.slices),
        stages=tuple(StageFacts(one.first, one.last, one.rows) for one in plan.stages[name]),
        pinned_slices=tuple(sorted(pinned)),
        weight_bytes=costs.weight_bytes,
        pinned_bytes=sum(costs.slices[number].weight_bytes for number in pinned),
        max_batch=max(one.rows for one in plan.stages[name]),
        ring_slots=plan.slots,
        slot_bytes=plan.slot_bytes,
        activation_bytes=plan.lanes * plan.activation_bytes,
        input_bytes=plan.input_slots * plan.input_bytes,
        staging_bytes=plan.staging_bytes + plan.frame_slots * plan.frame_bytes,
        workspace_bytes=plan.workspace_bytes,
        waiting_bytes=plan.waiting_bytes,
        total_bytes=plan.total_bytes,
    )
