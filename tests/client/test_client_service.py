"""Promise: what a caller says of priority, deadline and tenant is what the model is told."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.client.wire import Wire, client_of
from tests.gateway.twin import BROKER, MEASUREMENT, POLICY, TwinModel
from typer.testing import CliRunner, Result

import lasagna.client.client
from lasagna import AsyncClient, Client
from lasagna.cli import main
from lasagna.client.flow import Wish
from lasagna.errors import OverloadedError, UsageError
from lasagna.gateway.app import gateway_app
from lasagna.gateway.service_class import service_of
from lasagna.server.served import ServiceClass

X = np.ones((1, 3), np.float32)


@pytest.fixture
def model() -> TwinModel:
    return TwinModel()


@pytest.fixture
def wire(model: TwinModel) -> Wire:
    return Wire(model)


@pytest.mark.parametrize(
    ("wish", "service"),
    [
        ({}, ServiceClass(deadline_s=60.0)),
        ({"priority": 1}, ServiceClass(priority=4, deadline_s=60.0)),
        ({"priority": 9}, ServiceClass(priority=-4, deadline_s=60.0)),
        ({"timeout_s": 0.25}, ServiceClass(deadline_s=0.25)),
        ({"timeout_s": 1e-9}, ServiceClass(deadline_s=1e-6)),
        ({"tenant": "CN=Ada, O=Acme"}, ServiceClass("CN=Ada, O=Acme", deadline_s=60.0)),
    ],
)
def test_the_model_is_told(
    wire: Wire, model: TwinModel, wish: dict[str, Any], service: ServiceClass
) -> None:
    with client_of(wire) as client:
        client.infer("twin", {"x": X}, **wish)
    assert model.services == [service]


@pytest.mark.anyio
async def test_the_asynchronous_client_tells_the_same(model: TwinModel) -> None:
    transport = httpx.ASGITransport(gateway_app({"twin": model}))
    async with AsyncClient(
        "http://gateway",
        policy=POLICY,
        brokers=[BROKER],
        insecure_allow_emulated=True,
        transport=transport,
    ) as client:
        await client.infer("twin", {"x": X}, priority=2, timeout_s=3.0, tenant="ada")
    assert model.services == [ServiceClass("ada", 3, 3.0)]


def test_a_client_waits_as_long_as_it_says(wire: Wire, model: TwinModel) -> None:
    with client_of(wire, timeout_s=7.0) as client:
        client.infer("twin", {"x": X}, timeout_s=2.0)
        client.infer("twin", {"x": X})
    assert wire.waits == [7.0, 7.0, 2.0, 7.0]  # the first two verify the enclave
    assert [service.deadline_s for service in model.services] == [2.0, 7.0]


def test_the_wish_is_kept_when_a_request_is_sealed_again(wire: Wire, model: TwinModel) -> None:
    with client_of(wire) as client:
        client.infer("twin", {"x": X})
        model.replace(b"e" * 32, b"t" * 32)
        client.infer("twin", {"x": X}, priority=1, timeout_s=2.0, tenant="ada")
    assert model.services[1:] == [ServiceClass("ada", 4, 2.0)] * 2


def test_a_refusal_says_when_to_come_back(wire: Wire, model: TwinModel) -> None:
    model.error = OverloadedError("it would be answered after its deadline", 4.2)
    with (
        client_of(wire) as client,
        pytest.raises(OverloadedError, match="after its deadline") as caught,
    ):
        client.infer("twin", {"x": X}, timeout_s=1.0)
    assert caught.value.retry_after_s == 5.0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"priority": 10}, r"the priority is 10; it must be an integer, 1 \(goes first\) to 9"),
    ({"priority": -1}, "the priority is -1"),
    ({"priority": True}, "the priority is True"),
    ({"timeout_s": 0.0}, "more than 0 and at most 1,000,000 seconds, not 0"),
    ({"timeout_s": -1.0}, "seconds, not -1"),
    ({"timeout_s": float("nan")}, "seconds, not nan"),
    ({"timeout_s": float("inf")}, "seconds, not inf"),
    ({"tenant": "a" * 129}, "the tenant has 129 characters; it may have 128 at most"),
    ({"tenant": "ada\r\nx: y"}, "the tenant must be printable ASCII"),
    ({"tenant": "adä"}, "the tenant must be printable ASCII"),
]


@pytest.mark.parametrize(("wish", "message"), WRONG)
def test_what_a_server_would_refuse_is_not_sent(
    wire: Wire, wish: dict[str, Any], message: str
) -> None:
    with client_of(wire) as client, pytest.raises(UsageError, match=message):
        client.infer("twin", {"x": X}, **wish)
    assert wire.asked == []


@given(
    st.builds(
        Wish,
        priority=st.integers(-2, 11),
        timeout_s=st.none() | st.floats(),
        tenant=st.text(max_size=4) | st.text(st.characters(codec="ascii"), max_size=130),
    )
)
def test_what_passes_the_check_is_taken_by_the_gateway(wish: Wish) -> None:
    try:
        wish.check()
    except UsageError:
        return
    timeout = 0 if wish.timeout_s is None else max(1, round(wish.timeout_s * 1e6))
    service = service_of({"priority": wish.priority, "timeout": timeout}, [wish.tenant], 1e7)
    assert (service.tenant, service.deadline_s is None) == (wish.tenant, wish.timeout_s is None)


# The command.


@pytest.fixture
def infer(wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``lasagna infer`` against the gateway in this process."""
    np.save(tmp_path / "x.npy", X)
    here = functools.partial(Client, transport=wire)
    monkeypatch.setattr(lasagna.client.client, "Client", here)
    arguments = f"infer http://gateway twin --input x={tmp_path}/x.npy --insecure-allow-emulated"
    trusted = f"--allow-measurement {MEASUREMENT.hex()} --broker-key {BROKER.hex()}"

    def run(*options: str) -> Result:
        command = [*arguments.split(), *trusted.split(), *options]
        return CliRunner().invoke(main.app, command)

    return run


def test_the_command_tells_the_same(infer: Any, model: TwinModel) -> None:
    done = infer("--priority", "1", "--tenant", "ada", "--timeout", "2.5")
    assert done.exit_code == 0, done.output
    assert "y: float32 [1, 3]" in done.output
    assert model.services == [ServiceClass("ada", 4, 2.5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--priority", "10"], "the priority is 10"),
        (["--tenant", "ada "], "without a space at either end"),
        (["--timeout", "0"], "a timeout is more than 0"),
    ],
)
def test_the_command_names_mistakes(
    infer: Any, wire: Wire, options: list[str], message: str
) -> None:
    done = infer(*options)
    assert done.exit_code == 2
    assert message in done.output
    assert wire.asked == []
