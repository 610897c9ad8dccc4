"""Policies by name: Lasagna's, and those it is compared with.

All of them are the same scheduler with another division of the memory, so a comparison shows the
policies and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from lasagna.errors import UsageError
from lasagna.policy.plan import Style


@dataclass(frozen=True, slots=True)
class Policy:
    """How an enclave is scheduled.

    Attributes:
        name: that people choose it by.
        about: what it does, in a line.
        style: what the division of the memory may make use of.
        in_order: who came first is served first.
        paged: the whole model in one session, and the kernel pages; no budget is kept.
    """

    name: str
    about: str
    style: Style
    in_order: bool = False
    paged: bool = False


LASAGNA: Final = Policy(
    "lasagna",
    "batches that grow from stage to stage, weights pinned and streamed",
    Style(),
)
POLICIES: Final = {
    policy.name: policy
    for policy in (
        LASAGNA,
        Policy(
            "dynamic-batch",
            "one batch size for the whole model, of requests that wait, as Triton does",
            Style(staged=False),
        ),
        Policy(
            "on-demand",
            "each row alone, weights decrypted layer by layer ahead of use, as Occlumency does",
            Style(staged=False, max_rows=1, pin=False, whole=False),
            in_order=True,
        ),
        Policy(
            "vanilla",
            "the whole model in one ONNX Runtime session, first come first served, memory paged",
            Style(staged=False, max_rows=1, whole=False, together=False),
            in_order=True,
            paged=True,
        ),
    )
}


def policy_named(name: str) -> Policy:
    """A policy by its name.

    Raises:
        UsageError: there is none of that name.
    """
    found = POLICIES.get(name)
    if found is None:
        raise UsageError(f"there is no policy {name!r}; choose {', '.join(POLICIES)}")
    return found
