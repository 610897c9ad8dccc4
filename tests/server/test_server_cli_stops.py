"""How ``lasagna serve`` ends, or goes on without its models: real signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import pytest
from tests.server.conftest import INPUT, NAME, Array, Model
from tests.server.rig import noise
from tests.server.serving import SOON, Asking, local, serving, watching

from lasagna.errors import ServiceError

pytestmark = pytest.mark.integration


def test_a_package_that_was_tampered_with_is_not_ready(model: Model, tmp_path: Path) -> None:
    package = model.copy_to(tmp_path)
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 1
    package.write_bytes(data)
    with serving(package, *local(model, tmp_path)) as server:
        assert "model squeezenet: failed: section" in server.said
        answer = httpx.get(server.url + "/v2/health/ready")
        assert answer.status_code == 503
        assert "the package was changed" in answer.json()["error"]
        assert httpx.get(server.url + "/v2/health/live").status_code == 200
        with server.client() as client, pytest.raises(ServiceError, match="package was changed"):
            client.infer(NAME, {INPUT: noise(1)})


def test_a_broker_without_the_key_leaves_the_model_failed(model: Model, tmp_path: Path) -> None:
    keys = tmp_path / "other.key"
    keys.touch(mode=0o600)
    document = json.loads(model.key_file.read_text())
    keys.write_text(json.dumps(document | {"package_id": document["owner_public_key"]}))
    options = local(model, tmp_path)
    options[1] = keys
    with serving(model.package, *options) as server:
        assert "failed: the key broker at" in server.said
        assert "has no keys for package" in server.said
        assert httpx.get(server.url + "/v2/health/ready").status_code == 503


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_what_is_here_and_leaves_nothing(
    model: Model, image: Array, tmp_path: Path, number: signal.Signals
) -> None:
    with serving(model.package, *local(model, tmp_path)) as server:
        children = server.children()
        assert len(children) == 2  # broker and enclave
        with server.client() as client, watching(children):
            asking = Asking(server, client, image)
            server.process.send_signal(number)
            server.wait_for_log("finishing the requests that are here")
            os.kill(server.enclave(), signal.SIGCONT)
            assert asking.answer().shape == (1, 1000, 1, 1)
            assert server.process.wait(SOON) == 0
    assert "Traceback" not in server.log


def test_a_second_signal_quits_at_once(model: Model, tmp_path: Path) -> None:
    with serving(model.package, *local(model, tmp_path)) as server:
        children = server.children()
        with watching(children):
            os.kill(server.enclave(), signal.SIGSTOP)  # so that it can't stop in order
            server.process.send_signal(signal.SIGINT)
            server.wait_for_log("finishing the requests that are here")
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(5) == 130
    assert "Traceback" not in server.log


def test_nothing_outlives_a_host_that_is_killed(model: Model, tmp_path: Path) -> None:
    with (
        serving(model.package, *local(model, tmp_path)) as server,
        watching(server.children()),
    ):
        server.process.kill()
