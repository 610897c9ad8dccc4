"""To which service class a request belongs, by its own word. Pure.

::

    parameter priority      level, 1 (goes first) to 9; 0 or none: the default, which is 5
    parameter timeout       microseconds from the request's arrival; 0 or none: no deadline
    header Lasagna-Tenant   whose request it is; none: nobody's in particular

The two parameters are those of Triton's extension ``schedule_policy``, with its meaning: a lower
level goes first, 0 is the default. How many levels there are is the server's choice; with an odd
number the default is in the middle, so a request can also step back. A level that does not exist
is refused (Triton takes it for the default, which hides the mistake).

A time after which nobody waits is a deadline: ``timeout`` says both.

A raw body has no parameters: headers ``Lasagna-Priority`` and ``Lasagna-Timeout`` stand for them.
(``Priority`` and ``Timeout`` alone mean something else: RFC 9218, and RFC 4918, section 10.7.)

Property (tests/gateway): any parameters and headers give a class or ``InvalidInputError``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from lasagna.errors import InvalidInputError
from lasagna.gateway.tensors import Parameter
from lasagna.server.served import ServiceClass

PRIORITY: Final = "priority"
TIMEOUT: Final = "timeout"
TENANT: Final = "lasagna-tenant"
LEVELS: Final = 9
DEFAULT_LEVEL: Final = 5
MAX_TENANT: Final = 128
_MICRO: Final = 1e6
_TENANT: Final = re.compile(r"[!-~]([ -~]*[!-~])?")
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}")
_SHOWN: Final = 20


def service_of(
    parameters: Mapping[str, Parameter], tenants: Sequence[str], limit_s: float
) -> ServiceClass:
    """A request's class.

    Args:
        parameters: of the request.
        tenants: values of its header ``Lasagna-Tenant``.
        limit_s: the longest time that the server keeps a request; no deadline is later.

    Raises:
        InvalidInputError: with the first thing found wrong.
    """
    return ServiceClass(
        tenant=_tenant(tenants),
        priority=priority_of(parameters.get(PRIORITY, 0)),
        deadline_s=_deadline_s(parameters.get(TIMEOUT, 0), limit_s),
    )


def priority_of(level: Parameter) -> int:
    """What a scheduler makes of a level: higher goes first, the default is 0.

    Raises:
        InvalidInputError: there is no such level.
    """
    if isinstance(level, bool) or not isinstance(level, int) or not 0 <= level <= LEVELS:
        raise InvalidInputError(
            f"the priority is {_shown(level)}; it must be an integer, 1 (goes first) to {LEVELS}, "
            f"or 0 for the default, which is {DEFAULT_LEVEL}"
        )
    return DEFAULT_LEVEL - level if level else 0


def check_tenant(text: str) -> None:
    """See that it can be a tenant's name. The message does not repeat it: it may be a mistake.

    Raises:
        InvalidInputError: it is too long, or a character is not printable ASCII.
    """
    if len(text) > MAX_TENANT:
        raise InvalidInputError(
            f"the tenant has {len(text)} characters; it may have {MAX_TENANT} at most"
        )
    if text and not _TENANT.fullmatch(text):
        raise InvalidInputError(
            "the tenant must be printable ASCII characters, without a space at either end"
        )


def header_parameters(headers: Mapping[str, str]) -> dict[str, Parameter]:
    """Priority and timeout of a raw body, from its headers.

    Args:
        headers: whose names are found in lower case.

    Raises:
        InvalidInputError: one is not an integer.
    """
    found: dict[str, Parameter] = {}
    for name in (PRIORITY, TIMEOUT):
        header = f"lasagna-{name}"
        if (text := headers.get(header)) is None:
            continue
        if not _INTEGER.fullmatch(text):
            raise InvalidInputError(
                f"the header {header} is {_shown(text)}; it must be an integer of up to 18 digits"
            )
        found[name] = int(text)
    return found


def _tenant(values: Sequence[str]) -> str:
    if len(values) > 1:  # or a client could put its own before the one that its proxy adds
        raise InvalidInputError(
            f"the header {TENANT} is there {len(values)} times; a proxy must replace it, not add it"
        )
    text = values[0] if values else ""
    check_tenant(text)
    return text


def _deadline_s(timeout: Parameter, limit_s: float) -> float | None:
    """What is not positive is no deadline; so are true and false."""
    if not isinstance(timeout, int):
        raise InvalidInputError(
            f"the parameter {TIMEOUT} is {_shown(timeout)}; it must be an integer: microseconds, "
            "or 0 for none"
        )
    if isinstance(timeout, bool) or timeout <= 0:
        return None
    return timeout / _MICRO if timeout < limit_s * _MICRO else limit_s  # no float holds 10**400


def _shown(value: Parameter) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
