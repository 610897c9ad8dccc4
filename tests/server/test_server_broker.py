"""The insecure broker: its files, its policy, its HTTP."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.errors import KeyRefusedError, ServiceError, TrustError, UsageError
from lasagna.server.broker import InsecureBroker, broker_app, require_loopback
from lasagna.server.broker_state import BrokerSecrets, open_state, read_model_keys
from lasagna.server.local_broker import insecure_local_broker
from lasagna.server.release import BrokerRelay
from lasagna.trust.evidence import InsecureEmulatedQuoter
from lasagna.trust.keys import ContentKey, SecretKey, ServiceSecret
from lasagna.trust.model_keys import ModelKeys, encode_model_keys
from lasagna.trust.policy import MeasurementIn
from lasagna.trust.release import make_key_request, open_grant

pytestmark = pytest.mark.anyio

PACKAGE = b"p" * 32
MEASUREMENT = b"m" * 32
KEYS = ModelKeys(PACKAGE, ContentKey(SecretKey(b"c" * 32)), b"o" * 32)
QUOTER = InsecureEmulatedQuoter(MEASUREMENT, bytes(32))
BROKER = InsecureBroker(
    secrets=BrokerSecrets(
        Ed25519PrivateKey.from_private_bytes(b"b" * 32), ServiceSecret(SecretKey(b"s" * 32))
    ),
    models=[KEYS],
    policy=MeasurementIn(frozenset({MEASUREMENT})),
    insecure_allow_emulated=True,
)


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(broker_app(BROKER))
    async with httpx.AsyncClient(transport=transport, base_url="http://broker") as client:
        yield client


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.key"
    path.touch(mode=0o600)
    path.write_bytes(encode_model_keys(KEYS))
    return path


def open_to_others(path: Path) -> Path:
    path.write_bytes(encode_model_keys(KEYS))
    path.chmod(0o644)
    return path


# HTTP.


async def test_an_allowed_enclave_gets_its_keys(http: httpx.AsyncClient) -> None:
    pending = make_key_request(PACKAGE, QUOTER)
    answer = await http.post("/v1/release", content=pending.request)
    assert answer.status_code == 200
    released = open_grant(pending, answer.content)
    assert released.bundle.model == KEYS
    assert released.broker == BROKER.public_key


@pytest.mark.parametrize(
    ("request_bytes", "message"),
    [
        (make_key_request(b"q" * 32, QUOTER).request, "has no keys for package"),
        (
            make_key_request(PACKAGE, InsecureEmulatedQuoter(b"x" * 32, bytes(32))).request,
            "measurement",
        ),
        (b"{}", "malformed"),
        (bytes(200_000), "a key request has at most"),
    ],
)
async def test_who_is_refused_and_why(
    http: httpx.AsyncClient, request_bytes: bytes, message: str
) -> None:
    answer = await http.post("/v1/release", content=request_bytes)
    assert answer.status_code == 403
    assert message in answer.json()["error"]


async def test_a_key_request_that_never_ends_is_given_up() -> None:
    never = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await never.wait()

    transport = httpx.ASGITransport(broker_app(BROKER, body_timeout_s=0.02))
    async with httpx.AsyncClient(transport=transport, base_url="http://broker") as client:
        answer = await client.post("/v1/release", content=body())
    assert answer.status_code == 408
    assert answer.json() == {"error": "the key request did not arrive within 0.02 s"}


async def test_the_public_key_is_told(http: httpx.AsyncClient) -> None:
    answer = (await http.get("/v1/broker")).json()
    assert answer == {
        "broker": BROKER.public_key.hex(),
        "packages": [PACKAGE.hex()],
        "insecure": True,
    }


async def test_what_is_not_there(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/release")).json() == {"error": "Method Not Allowed"}
    assert (await http.get("/v2")).status_code == 404


# Its files.


def test_secrets_are_made_once_and_for_the_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    first, second = open_state(folder), open_state(folder)
    assert first.service_secret == second.service_secret
    assert first.signing_key.private_bytes_raw() == second.signing_key.private_bytes_raw()
    assert first.service_secret.reveal() != first.signing_key.private_bytes_raw()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = list(folder.iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


def test_secrets_that_others_may_read_are_refused(tmp_path: Path) -> None:
    open_state(tmp_path)
    (tmp_path / "service.secret").chmod(0o640)
    with pytest.raises(UsageError, match=r"others may read \(mode 0640\): run chmod 600"):
        open_state(tmp_path)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_damaged_secret_is_not_replaced(tmp_path: Path, size: int) -> None:
    path = tmp_path / "service.secret"
    path.touch(mode=0o600)
    path.write_bytes(bytes(size))
    with pytest.raises(UsageError, match="restore it or remove it"):
        open_state(tmp_path)
    assert path.stat().st_size == size


def test_key_files_are_read(key_file: Path) -> None:
    assert read_model_keys([key_file]) == (KEYS,)


def test_a_file_that_is_no_key_file(key_file: Path) -> None:
    key_file.write_bytes(b"{}")
    with pytest.raises(UsageError, match=r"model\.key is not a model's key file"):
        read_model_keys([key_file])


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"can't read .*model\.key: No such file"):
        read_model_keys([tmp_path / "model.key"])


def test_a_key_file_that_others_may_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run chmod 600"):
        read_model_keys([open_to_others(tmp_path / "model.key")])


def test_secrets_do_not_show() -> None:
    assert b"s" * 32 not in repr(BROKER).encode()
    assert "ss" * 4 not in repr(BROKER)


# Where it listens.


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_it_listens_on_its_own_machine(host: str) -> None:
    require_loopback(host, insecure_listen_anywhere=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "broker.example", ""])  # noqa: S104
def test_elsewhere_only_by_name(host: str) -> None:
    with pytest.raises(UsageError, match="add --insecure-listen-anywhere"):
        require_loopback(host, insecure_listen_anywhere=False)
    require_loopback(host, insecure_listen_anywhere=True)


# The relay, over a real socket to a real child.


@pytest.mark.integration
async def test_the_local_broker_answers_over_http(key_file: Path, tmp_path: Path) -> None:
    async with insecure_local_broker([key_file], MEASUREMENT, tmp_path / "state") as url:
        relay = BrokerRelay(url)
        pending = make_key_request(PACKAGE, QUOTER)
        released = open_grant(pending, await relay.release(pending.request))
        assert released.bundle.model == KEYS
        assert released.broker == await relay.public_key()
        with pytest.raises(KeyRefusedError, match="answers 403: this broker has no keys for"):
            await relay.release(make_key_request(b"q" * 32, QUOTER).request)
    with pytest.raises(ServiceError, match="can't be reached"):
        await relay.public_key()


@pytest.mark.integration
async def test_a_local_broker_that_does_not_start_says_why(tmp_path: Path) -> None:
    key_file = open_to_others(tmp_path / "model.key")
    with pytest.raises(ServiceError, match=r"did not start: error: .* run chmod 600"):
        async with insecure_local_broker([key_file], MEASUREMENT, tmp_path / "state"):
            pass


@pytest.mark.parametrize(
    ("answer", "expected", "message"),
    [
        (b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n", ServiceError, "500: no reason given"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", KeyRefusedError, "answers 404"),
        (b"HTTP/1.1 302 Go\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", ServiceError, "302"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(100_000), ServiceError, "answers too much"),
        (b"nonsense\r\n\r\n", ServiceError, "can't be reached"),
        (b"", ServiceError, "can't be reached"),
    ],
)
async def test_a_broker_of_another_kind(
    answer: bytes, expected: type[TrustError], message: str
) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(expected, match=message):
            await BrokerRelay(f"http://127.0.0.1:{port}").release(b"request")
