"""The clients against the real gateway and an enclave in memory; one test per attack."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.wire import Wire, client_of
from tests.gateway.twin import BROKER, MEASUREMENT, POLICY, TwinModel

import lasagna
from lasagna import AsyncClient, Client
from lasagna.errors import (
    EnclaveLostError,
    EvidenceError,
    InvalidInputError,
    OverloadedError,
    PackageError,
    RecordError,
    ServiceError,
    UsageError,
)
from lasagna.gateway.app import gateway_app
from lasagna.trust.policy import MeasurementIn

pytestmark = pytest.mark.anyio

X = np.array([[1.0, np.nan, -np.inf]], np.float32)


@pytest.fixture
def model() -> TwinModel:
    return TwinModel()


@pytest.fixture
def wire(model: TwinModel) -> Wire:
    return Wire(model)


@pytest.fixture
def client(wire: Wire) -> Iterator[Client]:
    with client_of(wire) as made:
        yield made


INFER = "POST /v2/models/twin/infer"
VERIFY = ["GET /v2/models/twin", "GET /v2/models/twin/lasagna/evidence"]


def test_infer_passes_nan_and_infinities_through(client: Client) -> None:
    np.testing.assert_array_equal(client.infer("twin", {"x": X})["y"], X * 2)


def test_the_enclave_is_verified_once(client: Client, wire: Wire) -> None:
    for _ in range(3):
        client.infer("twin", {"x": X})
    assert wire.asked == [*VERIFY, INFER, INFER, INFER]


def test_several_rows(client: Client) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    answer = client.infer("twin", {"x": x})["y"]
    assert (answer == x * 2).all()
    answer[0, 0] = 1  # the caller's own


def test_metadata(client: Client) -> None:
    assert client.metadata("twin").inputs[0].shape == (-1, 3)


def test_statistics(client: Client, wire: Wire) -> None:
    assert client.statistics("twin")["plan"]["slices"] == 1
    wire.change = lambda path, body: b"[]"
    with pytest.raises(ServiceError, match="statistics of 'twin' are malformed"):
        client.statistics("twin")


def test_a_name_with_a_slash() -> None:
    wire = Wire(TwinModel("org/twin ü"))
    with client_of(wire) as client:
        assert client.infer("org/twin ü", {"x": X})["y"].shape == (1, 3)


async def test_the_asynchronous_client(model: TwinModel) -> None:
    transport = httpx.ASGITransport(gateway_app({"twin": model}))
    async with AsyncClient(
        "http://gateway",
        policy=POLICY,
        brokers=[BROKER],
        insecure_allow_emulated=True,
        transport=transport,
    ) as client:
        assert (await client.metadata("twin")).name == "twin"
        await client.verify("twin")
        np.testing.assert_array_equal((await client.infer("twin", {"x": X}))["y"], X * 2)


# Who is refused.


def test_emulated_evidence_is_refused_unless_allowed_by_name(wire: Wire) -> None:
    with (
        client_of(wire, insecure_allow_emulated=False) as client,
        pytest.raises(EvidenceError, match="emulated: no processor vouches for it"),
    ):
        client.infer("twin", {"x": X})
    assert wire.asked == VERIFY


def test_another_measurement_is_refused(wire: Wire) -> None:
    policy = MeasurementIn(frozenset({b"o" * 32}))
    with (
        client_of(wire, policy=policy) as client,
        pytest.raises(EvidenceError, match=f"measurement {MEASUREMENT.hex()} is not allowed"),
    ):
        client.infer("twin", {"x": X})
    assert wire.asked == VERIFY


def test_another_broker_is_refused(wire: Wire) -> None:
    with (
        client_of(wire, brokers=[b"o" * 32]) as client,
        pytest.raises(EvidenceError, match="come from broker"),
    ):
        client.infer("twin", {"x": X})
    assert wire.asked == VERIFY


def test_another_package_than_the_pinned_is_refused(wire: Wire) -> None:
    with (
        client_of(wire, digests={"twin": b"o" * 32}) as client,
        pytest.raises(EvidenceError, match="pinned is"),
    ):
        client.infer("twin", {"x": X})
    assert wire.asked == VERIFY[:1]


def test_the_pinned_package_is_accepted(wire: Wire) -> None:
    with client_of(wire, digests={"twin": b"d" * 32}) as client:
        client.infer("twin", {"x": X})


def test_evidence_for_another_client_is_refused(client: Client, wire: Wire) -> None:
    kept: list[bytes] = []

    def replay(path: str, body: bytes) -> bytes:
        if "evidence" not in path:
            return body
        kept.append(body)
        return kept[0]

    wire.change = replay
    client.verify("twin")
    with pytest.raises(EvidenceError, match="not made for this nonce"):
        client.verify("twin")


# A server that lies or breaks.


def test_a_changed_answer_does_not_open(client: Client, wire: Wire) -> None:
    wire.change = lambda path, body: (
        body[:-1] + bytes([body[-1] ^ 1]) if path.endswith("infer") else body
    )
    with pytest.raises(RecordError, match="does not open"):
        client.infer("twin", {"x": X})


def test_an_old_answer_does_not_open(client: Client, wire: Wire) -> None:
    kept: list[bytes] = []

    def replay(path: str, body: bytes) -> bytes:
        if not path.endswith("infer"):
            return body
        kept.append(body)
        return kept[0]

    wire.change = replay
    client.infer("twin", {"x": X})
    with pytest.raises(RecordError, match="does not open"):
        client.infer("twin", {"x": X})


def test_a_lie_about_the_tensors_opens_nothing(client: Client, wire: Wire) -> None:
    wire.change = lambda path, body: (
        body.replace(b'"dtype":"float32"', b'"dtype":"int32"') if path.endswith("twin") else body
    )
    with pytest.raises(ServiceError, match=r"400.*does not open"):
        client.infer("twin", {"x": np.ones((1, 3), np.int32)})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>hello</html>", "not Lasagna's"),
        (b'{"name":"twin","versions":["1"],"platform":"onnx","inputs":[],"outputs":[]}', "lasagna"),
        (b"[" * 100_000, "not Lasagna's"),
    ],
)
def test_a_server_of_another_kind(client: Client, wire: Wire, body: bytes, message: str) -> None:
    wire.change = lambda path, _: body
    with pytest.raises(ServiceError, match=message):
        client.infer("twin", {"x": X})


def test_an_endless_answer_is_cut(client: Client, wire: Wire) -> None:
    wire.change = lambda path, body: body if not path.endswith("infer") else bytes(10**6)
    with pytest.raises(ServiceError, match="is longer than"):
        client.infer("twin", {"x": X})


def test_nobody_there() -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused", request=request)

    with (
        client_of(httpx.MockTransport(refuse)) as client,
        pytest.raises(ServiceError, match="http://gateway can't be reached: connection") as caught,
    ):
        client.infer("twin", {"x": X})
    assert caught.value.status == 0


# What the server says.


@pytest.mark.parametrize(
    ("error", "expected", "status"),
    [
        (PackageError("the package was changed"), ServiceError, 503),
        (RecordError("no"), ServiceError, 400),
    ],
)
def test_the_servers_errors_are_told(
    client: Client, model: TwinModel, error: Any, expected: type[ServiceError], status: int
) -> None:
    model.error = error
    with pytest.raises(expected, match=f"answers {status}: {error}") as caught:
        client.infer("twin", {"x": X})
    assert caught.value.status == status


@pytest.mark.parametrize("error", [OverloadedError("full", 2.5), EnclaveLostError("died")])
def test_a_busy_server_tells_when_to_come_back(
    client: Client, model: TwinModel, error: Any
) -> None:
    model.error = error
    with pytest.raises(OverloadedError, match="answers 503") as caught:
        client.infer("twin", {"x": X})
    assert caught.value.retry_after_s in (1.0, 3.0)


def test_no_such_model(client: Client) -> None:
    with pytest.raises(ServiceError, match="no model 'nobody' is served here; there are: 'twin'"):
        client.infer("nobody", {"x": X})


def test_wrong_inputs_are_not_sent(client: Client, wire: Wire) -> None:
    with pytest.raises(InvalidInputError, match="the model takes float32"):
        client.infer("twin", {"x": np.zeros((1, 3))})
    assert INFER not in wire.asked


@pytest.mark.parametrize(("digest", "secret"), [(b"e" * 32, b"s" * 32), (b"d" * 32, b"t" * 32)])
def test_after_a_restart_with_another_package_or_secret_it_verifies_again(
    client: Client, wire: Wire, model: TwinModel, digest: bytes, secret: bytes
) -> None:
    client.infer("twin", {"x": X})
    model.replace(digest, secret)
    wire.asked.clear()
    assert client.infer("twin", {"x": X})["y"].shape == (1, 3)
    assert wire.asked == [INFER, *VERIFY, INFER]


def test_after_a_restart_an_enclave_that_is_not_allowed_is_refused(
    client: Client, wire: Wire, model: TwinModel
) -> None:
    client.infer("twin", {"x": X})
    model.replace(b"e" * 32, b"t" * 32)
    model.measurement = b"o" * 32
    wire.asked.clear()
    with pytest.raises(EvidenceError, match="is not allowed"):
        client.infer("twin", {"x": X})
    assert wire.asked == [INFER, *VERIFY]


def test_a_refused_request_is_not_repeated_if_nothing_has_changed(
    client: Client, wire: Wire, model: TwinModel
) -> None:
    client.infer("twin", {"x": X})
    model.error = RecordError("no")
    wire.asked.clear()
    with pytest.raises(ServiceError):
        client.infer("twin", {"x": X})
    assert wire.asked == [INFER, *VERIFY]


# Mistakes of the caller.


@pytest.mark.parametrize(
    ("url", "changes", "message"),
    [
        ("edge:8000", {}, "write it like http://edge:8000"),
        ("ftp://edge", {}, "is not the URL of a server"),
        ("http://edge:port", {}, "is not a URL"),
        ("http://edge", {"brokers": []}, "name the key broker"),
        ("http://edge", {"brokers": [b"short"]}, "has 32 bytes, not 5"),
        ("http://edge", {"timeout_s": 0}, "a timeout is more than 0 and at most 1,000,000 seconds"),
    ],
)
def test_mistakes_are_named(url: str, changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"policy": POLICY, "brokers": [BROKER]}
    with pytest.raises(UsageError, match=message):
        Client(url, **(arguments | changes))


# The package's front door.


def test_importing_lasagna_loads_nothing() -> None:
    script = (
        "import sys, lasagna; assert set(lasagna.__all__) == {'Client', 'AsyncClient'}\n"
        "sys.exit(', '.join({'numpy', 'httpx', 'msgspec', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""


def test_the_client_needs_no_engine() -> None:
    script = (
        "import sys; from lasagna import Client\n"
        "sys.exit(', '.join({'onnx', 'onnxruntime', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stderr.strip() == ""


def test_lasagna_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        lasagna.Server  # noqa: B018


async def test_clients_may_run_side_by_side(model: TwinModel) -> None:
    transport = httpx.ASGITransport(gateway_app({"twin": model}))
    async with AsyncClient(
        "http://gateway",
        policy=POLICY,
        brokers=[BROKER],
        insecure_allow_emulated=True,
        transport=transport,
    ) as client:
        xs = [np.full((1, 3), number, np.float32) for number in range(10)]
        answers = await asyncio.gather(*(client.infer("twin", {"x": x}) for x in xs))
    assert [float(answer["y"][0, 0]) for answer in answers] == [2.0 * n for n in range(10)]
