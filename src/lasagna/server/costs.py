"""From a package's public facts to what the scheduler reckons with; from its plan to a message."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from lasagna.enclave import messages as m
from lasagna.package.format import CHUNK_BYTES, SliceFacts, Variant
from lasagna.package.forms import Form, cut_bytes, extents, in_form
from lasagna.policy.costs import BATCHES, Forms, ModelCosts, SliceCosts
from lasagna.policy.plan import MemoryPlan
from lasagna.policy.stages import Machine, waiting_rows

LOAD_RATE: Final = 3.0e9
"""Bytes a second that a thread decrypts (DESIGN.md, fact 4, less the copy of ADR 3); reports of
loads correct it."""
ENTRY_S: Final = 0.0003
"""A command and its reply, over the socket and through both event loops."""
UNLIMITED: Final = 2**60
_COPIES: Final = 2
"""Of the weights in a session that holds them: ONNX Runtime copies constants, and what it packs for
its kernels it has once more while it opens the session; which are packed is its own affair."""
_GUESSED_RATE: Final = 2e9
"""Bytes of weights and activations a second, where a package was sealed without profile."""
_GAINS: Final = {Form.WHOLE: 0.98, Form.FROZEN: 0.96}
"""What these forms take of the sliced form's time at most: no calls, and weights packed for the
kernels (docs/experiments/0001-matmul-layout.md). Their own profile alone would mislead: a slice is
measured with its weights in the cache, a whole network is not."""
_FORMS: Final = (Form.SLICED, Form.WHOLE, Form.FROZEN)


def forms_of(variant: Variant, max_rows: int, *, paged: bool = False) -> Forms:
    """A model's costs in each form.

    Args:
        variant: that runs here.
        max_rows: of one batch; 1 for a model that can't be batched.
        paged: only the vanilla form, whatever memory it takes.
    """
    chosen = (Form.VANILLA,) if paged else _FORMS
    return tuple(_costs(variant, form, max_rows) for form in chosen)


def _costs(variant: Variant, form: Form, max_rows: int) -> ModelCosts:
    shaped = in_form(variant, form)
    reaches = extents(shaped)
    slices = tuple(map(_slice, shaped.slices, reaches))
    if form is not Form.SLICED:
        (whole,) = slices
        in_slices = _costs(variant, Form.SLICED, max_rows)
        most = [
            _GAINS.get(form, 1.0) * in_slices.compute_at(0, len(in_slices.slices), rows)
            for rows in BATCHES
        ]
        seconds = tuple(map(min, whole.compute_s, most))
        slices = (replace(whole, compute_s=seconds),)
    copies = _COPIES * shaped.weight_bytes if form is Form.FROZEN else 0
    return ModelCosts(
        slices=slices,
        cut_bytes=cut_bytes(shaped),
        running_bytes=reaches,
        max_rows=max_rows,
        form=form.value,
        copies_bytes=copies,
    )


def _slice(facts: SliceFacts, reach: int) -> SliceCosts:
    seconds = facts.compute_s or tuple(
        (facts.weight_bytes + reach * rows) / _GUESSED_RATE for rows in BATCHES
    )
    return SliceCosts(facts.weight_bytes, seconds, facts.workspace)


def machine_of(budget: int, threads: int, *, paged: bool = False) -> Machine:
    """What an enclave on this machine has.

    Args:
        budget: bytes of enclave memory.
        threads: that compute, each with a batch of its own; see ``Machine.shapes``.
        paged: the budget is not kept.
    """
    return Machine(
        budget=UNLIMITED if paged else budget,
        lanes=threads,
        cores=max(1, len(os.sched_getaffinity(0))),
        load_rate=LOAD_RATE,
        entry_s=ENTRY_S,
        chunk_bytes=CHUNK_BYTES,
    )


def arrange_message(id_: int, plan: MemoryPlan | None, digests: Mapping[str, bytes]) -> m.Arrange:
    """A plan as the enclave takes it.

    Args:
        id_: of the message.
        plan: None for no model at all.
        digests: of the models, by name.
    """
    if plan is None:
        return m.Arrange(id_, (), 1, 0, 0, 0, 0, 0, 0)
    models = []
    for name, stages in plan.stages.items():
        befores = (None, *stages)
        models.append(
            m.ModelWish(
                digests[name],
                Form(plan.costs[name].form),
                tuple(
                    m.StageWish(
                        one.first,
                        one.last,
                        one.rows,
                        waiting_rows(before, one, plan.lanes) if before is not None else 0,
                    )
                    for before, one in zip(befores, stages, strict=False)
                ),
                tuple(sorted(plan.pinned[name])),
            )
        )
    return m.Arrange(
        id_,
        tuple(models),
        plan.lanes,
        plan.slots,
        plan.slot_bytes,
        plan.input_slots,
        plan.input_bytes,
        plan.activation_bytes,
        plan.workspace_bytes,
        min(plan.cores, m.MAX_CORES),
        plan.frame_slots,
        plan.frame_bytes,
    )
