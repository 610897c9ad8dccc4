"""Promise: a request's priority, deadline and tenant reach the model as the reference says."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.gateway.asking import PATH, as_json, error_of, http_to
from tests.gateway.twin import TwinModel

from lasagna.errors import InvalidInputError, OverloadedError
from lasagna.gateway.app import GatewayLimits
from lasagna.gateway.service_class import (
    DEFAULT_LEVEL,
    LEVELS,
    MAX_TENANT,
    header_parameters,
    priority_of,
    service_of,
)
from lasagna.gateway.tensors import HEADER_LENGTH
from lasagna.server.served import DEFAULT_SERVICE, ServiceClass

Made = tuple[bytes, dict[str, str], Any]


def asked(made: Made, **parameters: Any) -> dict[str, Any]:
    head = as_json(made[0], made[1])
    return head | {"parameters": head["parameters"] | parameters}


# Pure.


def test_who_says_nothing_gets_the_default() -> None:
    assert service_of({}, [], 60.0) == DEFAULT_SERVICE == ServiceClass("", 0, None)


def test_a_lower_level_goes_first_and_the_default_is_in_the_middle() -> None:
    levels = [priority_of(level) for level in range(1, LEVELS + 1)]
    assert levels == [4, 3, 2, 1, 0, -1, -2, -3, -4]
    assert priority_of(0) == priority_of(DEFAULT_LEVEL) == DEFAULT_SERVICE.priority


@pytest.mark.parametrize("level", [-1, 10, True, False, 2.0, "1", "", 10**400])
def test_a_level_that_is_none_is_refused(level: Any) -> None:
    with pytest.raises(
        InvalidInputError, match=r"it must be an integer, 1 \(goes first\) to 9, or 0"
    ):
        priority_of(level)


@pytest.mark.parametrize(
    ("timeout", "deadline_s"),
    [
        (1, 1e-6),
        (2_500_000, 2.5),
        (60_000_000, 60.0),
        (10**400, 60.0),
        (0, None),
        (-5, None),
        (True, None),
    ],
)
def test_a_timeout_is_a_deadline_no_later_than_the_servers_limit(
    timeout: Any, deadline_s: float | None
) -> None:
    assert service_of({"timeout": timeout}, [], 60.0).deadline_s == deadline_s


@pytest.mark.parametrize("timeout", [2.5, "1000", "soon"])
def test_a_timeout_is_an_integer(timeout: Any) -> None:
    with pytest.raises(InvalidInputError, match="it must be an integer: microseconds"):
        service_of({"timeout": timeout}, [], 60.0)


@pytest.mark.parametrize("tenant", ["a", "~" * MAX_TENANT, "CN=Ada, O=Acme", "spiffe://a/b"])
def test_a_tenant_is_printable_text(tenant: str) -> None:
    assert service_of({}, [tenant], 60.0).tenant == tenant


@pytest.mark.parametrize("tenant", ["ä", "a\tb", "a\n", " a", "a ", " ", "\x7f", "a\0"])
def test_a_tenant_of_other_characters_is_refused(tenant: str) -> None:
    with pytest.raises(InvalidInputError, match="the tenant must be printable ASCII"):
        service_of({}, [tenant], 60.0)


def test_a_long_tenant_is_refused_without_being_repeated() -> None:
    with pytest.raises(InvalidInputError, match=r"has 129 characters; it may have 128 at most$"):
        service_of({}, ["a" * 129], 60.0)


def test_a_tenant_beside_the_proxys_own_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="is there 2 times; a proxy must replace it"):
        service_of({}, ["mallory", "ada"], 60.0)


values = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@given(
    st.dictionaries(st.sampled_from(["priority", "timeout", "other"]), values),
    st.lists(st.text(max_size=3) | st.text("az ~", max_size=140), max_size=2),
    st.floats(0.001, 1e6),
)
@example({"timeout": 2**1024}, [], 1e6)
def test_anything_is_a_class_or_refused(
    parameters: dict[str, Any], tenants: list[str], limit_s: float
) -> None:
    with contextlib.suppress(InvalidInputError):
        service = service_of(parameters, tenants, limit_s)
        assert -4 <= service.priority <= 4
        assert service.deadline_s is None or 0 < service.deadline_s <= limit_s
        assert len(service.tenant) <= MAX_TENANT
        assert service.tenant.isprintable()
        assert service.tenant.isascii()


@given(
    st.dictionaries(
        st.sampled_from(["lasagna-priority", "lasagna-timeout", "priority"]),
        st.integers().map(str) | st.text(max_size=30),
    )
)
@example({"lasagna-timeout": "9" * 5000})
@example({"lasagna-timeout": "²"})
def test_any_headers_are_parameters_or_refused(headers: dict[str, str]) -> None:
    with contextlib.suppress(InvalidInputError):
        for name, value in header_parameters(headers).items():
            assert value == int(headers[f"lasagna-{name}"])


# Over HTTP.


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("parameters", "headers", "service"),
    [
        ({}, {}, DEFAULT_SERVICE),
        ({"priority": 1}, {}, ServiceClass(priority=4)),
        ({"priority": 0, "timeout": 0}, {}, DEFAULT_SERVICE),
        ({"timeout": 250_000}, {}, ServiceClass(deadline_s=0.25)),
        ({}, {"Lasagna-Tenant": "ada"}, ServiceClass("ada")),
        ({}, {"Lasagna-Tenant": ""}, DEFAULT_SERVICE),
        ({}, {"Lasagna-Priority": "1", "Lasagna-Timeout": "5"}, DEFAULT_SERVICE),
        ({"lasagna_tenant": "mallory"}, {}, DEFAULT_SERVICE),
    ],
)
async def test_the_model_is_told_the_class(
    http: httpx.AsyncClient,
    model: TwinModel,
    request_of: Made,
    parameters: dict[str, Any],
    headers: dict[str, str],
    service: ServiceClass,
) -> None:
    wish = asked(request_of, **parameters)
    answer = await http.post(PATH + "/infer", json=wish, headers=headers)
    assert answer.status_code == 200
    assert model.services == [service]


def raw(made: Made) -> tuple[bytes, dict[str, str]]:
    body, headers, _ = made
    length = int(headers[HEADER_LENGTH])
    head = json.loads(body[:length])["parameters"]
    return body[length + 4 :], {
        HEADER_LENGTH: "0",
        "Lasagna-Request-Id": head["lasagna_request_id"],
        "Lasagna-Capsule": head["lasagna_capsule"],
    }


@pytest.mark.anyio
async def test_a_raw_body_has_its_class_in_headers(
    http: httpx.AsyncClient, model: TwinModel, request_of: Made
) -> None:
    record, headers = raw(request_of)
    # The second line is what browsers send and what means something else.
    headers |= {"Lasagna-Priority": "9", "Lasagna-Timeout": "500000", "Lasagna-Tenant": "ada"}
    headers |= {"Priority": "u=1, i", "Timeout": "Second-4100"}
    answer = await http.post(PATH + "/infer", content=record, headers=headers)
    assert answer.status_code == 200
    assert model.services == [ServiceClass("ada", -4, 0.5)]
    assert model.timeouts == [0.5]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Lasagna-Priority": "high"}, "the header lasagna-priority is 'high'; it must be an int"),
        ({"Lasagna-Priority": "10"}, "the priority is 10; it must be an integer, 1 (goes first)"),
        ({"Lasagna-Timeout": "1.5"}, "the header lasagna-timeout is '1.5'"),
        ({"Lasagna-Timeout": "9" * 19}, "it must be an integer of up to 18 digits"),
        ({"Lasagna-Timeout": ""}, "the header lasagna-timeout is ''"),
    ],
)
async def test_wrong_headers_of_a_raw_body_are_named(
    http: httpx.AsyncClient,
    model: TwinModel,
    request_of: Made,
    change: dict[str, str],
    message: str,
) -> None:
    record, headers = raw(request_of)
    answer = await http.post(PATH + "/infer", content=record, headers=headers | change)
    assert message in error_of(answer, 400)
    assert model.seen == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("parameters", "headers", "message"),
    [
        ({"priority": 10}, {}, "the priority is 10"),
        ({"priority": "1"}, {}, "the priority is '1'"),
        ({"priority": None}, {}, "malformed"),
        ({"timeout": 1.5}, {}, "the parameter timeout is 1.5; it must be an integer"),
        ({}, {"Lasagna-Tenant": "a" * 129}, "the tenant has 129 characters"),
        ({}, {"Lasagna-Tenant": b"\xc3\xa4"}, "the tenant must be printable ASCII"),
        ({}, [("lasagna-tenant", "mallory"), ("Lasagna-Tenant", "ada")], "is there 2 times"),
    ],
)
async def test_a_wrong_class_is_refused_before_anything_runs(
    http: httpx.AsyncClient,
    model: TwinModel,
    request_of: Made,
    parameters: dict[str, Any],
    headers: Any,
    message: str,
) -> None:
    wish = asked(request_of, **parameters)
    answer = await http.post(PATH + "/infer", json=wish, headers=headers)
    assert message in error_of(answer, 400)
    assert model.seen == []


@pytest.mark.anyio
async def test_the_servers_limit_bounds_the_deadline(model: TwinModel, request_of: Made) -> None:
    async with http_to(model, limits=GatewayLimits(answer_timeout_s=2.0)) as http:
        for wish in (asked(request_of, timeout=5_000_000), asked(request_of)):
            assert (await http.post(PATH + "/infer", json=wish)).status_code == 200
    assert model.timeouts == [2.0, 2.0]
    assert [service.deadline_s for service in model.services] == [2.0, None]


@pytest.mark.anyio
async def test_a_deadline_that_cannot_be_met_is_a_503_with_the_expected_wait(
    http: httpx.AsyncClient, model: TwinModel, request_of: Made
) -> None:
    model.error = OverloadedError("it would be answered after its deadline: 3.2 s wait", 3.2)
    answer = await http.post(PATH + "/infer", json=asked(request_of, timeout=1_000_000))
    assert "after its deadline" in error_of(answer, 503)
    assert answer.headers["retry-after"] == "4"


@pytest.mark.anyio
async def test_the_extension_is_named(http: httpx.AsyncClient) -> None:
    assert "schedule_policy" in (await http.get("/v2")).json()["extensions"]
