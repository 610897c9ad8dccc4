"""How a model is fitted into the enclave's memory budget. Pure arithmetic on public facts.

::

    budget = pinned weights + ring slots + activations + inputs that wait + workspace + staging

The budget covers that and no more. Beside it lie: frames with sealed rows on their way in and out
(our host sends a batch ahead for each compute thread, and one more), the decrypted graphs and ONNX
Runtime's sessions of them, and the interpreter with its libraries. What the process takes in all is
measured from outside (docs/howto/choose-a-budget.md).

Everything is decided before the first request: what does not fit is refused here, with the slice
and the bytes, and never runs out of memory later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lasagna.enclave.pool import aligned
from lasagna.errors import BudgetError
from lasagna.package.format import (
    CHUNK_BYTES,
    PROFILE_BATCHES,
    TAG_BYTES,
    SliceFacts,
    Variant,
)
from lasagna.units import format_bytes

RING_SLOTS: Final = 3
"""One slot in use, one ready, one being filled. Beside pinned slices more do not pay: look-ahead
costs pins."""
STREAMING_SLOTS: Final = 8
"""When everything is streamed, look-ahead carries the loader over layers with many weights and
little to compute: ResNet-50 waits 5 ms instead of 10 (docs/experiments/0002-streaming.md)."""
SHARED_ARENA_MARGIN: Final = 1.5
"""Room for fragmentation when several compute threads allocate from one workspace arena."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything lies. Sizes in bytes.

    Attributes:
        max_batch: rows that one run may have.
        pinned: slices whose weights stay.
        ring_slots: how many slots hold streamed slices.
        slot_bytes: size of a slot.
        activation_bytes: activations of one compute thread.
        input_slots: requests' inputs that may wait opened; 0 when they go to the activations.
        input_slot_bytes: size of one.
        workspace_bytes: ONNX Runtime's arena, for all threads.
        staging_bytes: ciphertext of one thread that decrypts.
        staging_count: how many threads decrypt.
        weight_bytes: of all slices.
        pinned_bytes: of the pinned ones.
        session_bytes: weights inside the sessions of a frozen whole, for all threads; 0 otherwise.
        total_bytes: of everything; at most the budget.
    """

    max_batch: int
    pinned: frozenset[int]
    ring_slots: int
    slot_bytes: int
    activation_bytes: int
    input_slots: int
    input_slot_bytes: int
    workspace_bytes: int
    staging_bytes: int
    staging_count: int
    weight_bytes: int
    pinned_bytes: int
    session_bytes: int
    total_bytes: int


def make_plan(
    variant: Variant,
    budget: int,
    threads: int,
    max_batch: int,
    *,
    name: str = "model",
    pin: bool = True,
) -> Plan:
    """Choose batch, pinned slices and ring for a budget.

    More batch costs activations, which pinned weights then lack. So the batch is the largest that
    leaves all weights pinned, or else takes no more than a third of the budget, so that most of it
    is for weights (the share was chosen, not derived).

    All that is tried first with inputs *apart*, in slots of their own, so that the next request is
    opened while this one computes; then without, which takes less. Apart is not worth it at any
    price: where batch 1 with slots exceeds the third, a plan without them follows. That last
    attempt, batch 1 with inputs opened into the activations, is held to no third: it is the
    smallest there is, so either it fits or nothing does.

    Args:
        variant: the public facts of the variant that will run.
        budget: bytes of enclave memory for this model.
        threads: compute threads, each with activations of its own.
        max_batch: largest batch wanted; 1 for a model without a batch dimension.
        name: of the model, for the message.
        pin: keep slices where there is room; otherwise stream all of them.

    Raises:
        BudgetError: even batch 1 with one ring slot does not fit.
    """
    weights = sum(aligned(facts.weight_bytes) for facts in variant.slices)
    batches = sorted({b for b in (1, 2, 4, 8, 16, 32, 64, 128) if b < max_batch} | {max_batch})
    for apart in (True, False):
        for batch in reversed(batches):
            fixed = _Fixed.of(variant, threads, batch, apart)
            if pin and fixed.total + weights <= budget:
                return _plan(variant, fixed, frozenset(range(len(variant.slices))), 0, 0)
            lean = fixed.total <= budget // 3
            smallest = batch == 1 and not apart
            plan = _stream(variant, fixed, budget, pin) if lean or smallest else None
            if plan is not None:
                return plan
    raise BudgetError(_shortage(variant, budget, threads, name))


@dataclass(frozen=True, slots=True)
class _Fixed:
    """What a batch size costs, whatever is pinned."""

    batch: int
    activations: int
    input_slots: int
    input_slot: int
    workspace: int
    staging: int
    staging_count: int
    total: int

    @staticmethod
    def of(variant: Variant, threads: int, batch: int, apart: bool) -> _Fixed:
        activations = variant.places.size * batch
        input_slots = threads + 1 if apart else 0
        row = [aligned(variant.tensor_bytes[n] * batch) for n in variant.inputs]
        input_slot = sum(row) if apart else 0
        workspace = max(workspace_at(facts, batch) for facts in variant.slices) * threads
        if threads > 1:
            workspace = int(workspace * SHARED_ARENA_MARGIN)
        workspace = aligned(workspace)
        largest = max(facts.weight_bytes for facts in variant.slices)
        staging = aligned(min(CHUNK_BYTES, largest) + TAG_BYTES)
        total = threads * activations + input_slots * input_slot + workspace
        total += (threads + 1) * staging
        return _Fixed(
            batch,
            activations,
            input_slots,
            input_slot,
            workspace,
            staging,
            threads + 1,
            total,
        )


def _stream(variant: Variant, fixed: _Fixed, budget: int, pin: bool) -> Plan | None:
    """Spend what is left on a ring and pinned slices, or say that it is too little."""
    slot = max(aligned(facts.weight_bytes) for facts in variant.slices)
    room = budget - fixed.total
    if room < slot:
        return None
    # The ring gets a third of the room at most: with little of it, pins do more than a third slot.
    most = max(1, room // 3 // slot) if pin else room // slot
    slots = min(RING_SLOTS if pin else STREAMING_SLOTS, most, len(variant.slices))
    if slots == 1 and room >= 2 * slot:
        slots = 2
    if not pin:
        return _plan(variant, fixed, frozenset(), slots, slot)
    pinned = choose_pinned(variant.slices, room - slots * slot, slots * slot)
    streamed = [f for n, f in enumerate(variant.slices) if n not in pinned]
    slot = max(aligned(facts.weight_bytes) for facts in streamed)
    return _plan(variant, fixed, pinned, min(slots, len(streamed)), slot)


def _plan(variant: Variant, fixed: _Fixed, pinned: frozenset[int], slots: int, slot: int) -> Plan:
    pinned_bytes = sum(aligned(variant.slices[n].weight_bytes) for n in pinned)
    return Plan(
        max_batch=fixed.batch,
        pinned=pinned,
        ring_slots=slots,
        slot_bytes=slot,
        activation_bytes=fixed.activations,
        input_slots=fixed.input_slots,
        input_slot_bytes=fixed.input_slot,
        workspace_bytes=fixed.workspace,
        staging_bytes=fixed.staging,
        staging_count=fixed.staging_count,
        weight_bytes=variant.weight_bytes,
        pinned_bytes=pinned_bytes,
        session_bytes=0,
        total_bytes=fixed.total + pinned_bytes + slots * slot,
    )


def choose_pinned(slices: Sequence[SliceFacts], room: int, ring: int) -> frozenset[int]:
    """Which slices to keep so that loading the others hides behind computing.

    Slices run in a cycle and are loaded ahead by as much as the ring holds. While slices compute,
    credit grows with the bytes that could be loaded meanwhile, up to the ring; a slice is streamed
    when the credit covers it, else pinned. The smallest rate of credit that pins no more than fits
    spreads what must be streamed evenly over the cycle, so no stretch of it waits for the loader.
    (An LRU cache would miss on every slice of a cycle that exceeds it.)

    Args:
        slices: facts of all slices, in order.
        room: bytes for pinned weights.
        ring: bytes of the ring.

    Returns:
        Numbers of the slices to pin; their aligned weights take at most ``room`` bytes.
    """
    sizes = [aligned(facts.weight_bytes) for facts in slices]
    times = [
        facts.compute_s[0] if facts.compute_s else float(facts.weight_bytes) for facts in slices
    ]
    low, high = 0.0, 1.0
    while sum(sizes[n] for n in _pins(sizes, times, high, ring)) > room and high < 1e30:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        fits = sum(sizes[n] for n in _pins(sizes, times, middle, ring)) <= room
        low, high = (low, middle) if fits else (middle, high)
    chosen = _pins(sizes, times, high, ring)
    left = room - sum(sizes[n] for n in chosen)
    if left < 0:  # no rate is high enough: a slice larger than the ring can't be streamed ahead
        chosen, left = set(), room
    for number in sorted(set(range(len(slices))) - chosen, key=lambda n: (-sizes[n], n)):
        if sizes[number] <= left:
            chosen.add(number)
            left -= sizes[number]
    return frozenset(chosen)


def _pins(sizes: Sequence[int], times: Sequence[float], rate: float, ring: int) -> set[int]:
    """Slices that the credit does not cover; the second turn of the cycle counts."""
    credit, pins = 0.0, set[int]()
    for turn in range(2):
        pins = set()
        for number, (size, seconds) in enumerate(zip(sizes, times, strict=True)):
            if credit >= size:
                credit -= size
            elif turn:
                pins.add(number)
            credit = min(float(ring), credit + rate * seconds)
    return pins


def freeze_plan(plan: Plan, threads: int, budget: int) -> Plan | None:
    """The plan with every session's weights inside it, if the budget has room for that.

    ONNX Runtime copies constant weights, and what it packs for its kernels it holds once more while
    it opens a session; which are packed is its own affair. So there must be room for two copies in
    each thread's session, beside the decrypted weights that they are made from.

    Args:
        plan: of the whole, with all of it pinned.
        threads: compute threads, each with a session of its own.
        budget: bytes.
    """
    copies = 2 * threads * plan.pinned_bytes
    total = plan.total_bytes + copies
    if plan.ring_slots or total > budget:
        return None
    return dataclasses.replace(plan, session_bytes=copies, total_bytes=total)


def workspace_at(facts: SliceFacts, batch: int) -> int:
    """Bytes of workspace for a batch size: between those of the package, or extended from them."""
    for measured, size in zip(PROFILE_BATCHES, facts.workspace, strict=True):
        if batch <= measured:
            return size
    last, before = facts.workspace[-1], facts.workspace[-2]
    per_row = -(-(last - before) // (PROFILE_BATCHES[-1] - PROFILE_BATCHES[-2]))
    return last + max(0, per_row) * (batch - PROFILE_BATCHES[-1])


def _shortage(variant: Variant, budget: int, threads: int, name: str) -> str:
    fixed = _Fixed.of(variant, threads, 1, apart=False)
    numbers = range(len(variant.slices))
    heavy = max(numbers, key=lambda n: variant.slices[n].weight_bytes)
    wide = max(numbers, key=lambda n: _live_bytes(variant, n))
    busy = max(numbers, key=lambda n: workspace_at(variant.slices[n], 1))
    slot = aligned(variant.slices[heavy].weight_bytes)
    need = fixed.total + slot
    each = f"{threads} x " if threads > 1 else ""
    rounded_up = -(-need // 10_000) / 100
    return (
        f"{name!r} ({variant.name}) needs a budget of {rounded_up:.2f} MB or more, it has "
        f"{format_bytes(budget)}. At batch 1 it takes {fixed.activations} bytes {each}for "
        f"activations (slice {wide} has the most), {fixed.workspace} for workspace "
        f"(slice {busy}), {slot} for the weights of one slice (slice {heavy}) and "
        f"{fixed.staging * fixed.staging_count} for ciphertext. To need less, seal with smaller "
        "--slice-bytes or --memory-bytes"
    )


def _live_bytes(variant: Variant, number: int) -> int:
    """Bytes a row of the tensors that exist while a slice runs, its own inputs and outputs too."""
    crossing = set(live_at_cut(variant, number)) | set(variant.slices[number].outputs)
    return sum(variant.tensor_bytes[tensor] for tensor in crossing)


def live_at_cut(variant: Variant, cut: int) -> tuple[int, ...]:
    """Tensors that cross the cut before slice ``cut``: made before it, needed at it or later."""
    made = set(variant.inputs).union(*(facts.outputs for facts in variant.slices[:cut]))
    needed = set(variant.outputs).union(*(facts.inputs for facts in variant.slices[cut:]))
    return tuple(sorted(made & needed))
