"""Lasagna: secure DNN inference in SGX enclaves whose memory is smaller than the model.

``from lasagna import Client`` is all that most programs need. Every part of Lasagna imports this
file, enclaves too, so it loads nothing before it is asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# ONNX Runtime (since 1.29) reports models and errors to its maker, from Linux too, and keeps a
# database in the user's home. Nobody who seals a model wants that, least of all in an enclave, so
# it is off before ONNX Runtime can be imported (docs/adr/0004-no-telemetry.md).
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

if TYPE_CHECKING:
    from lasagna.client.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> object:
    """Import the clients at their first use (PEP 562)."""
    if name in __all__:
        from lasagna.client import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
