"""The commands as people run them: real processes, real sockets."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.server import serving as serving_module
from tests.server.conftest import INPUT, NAME, OUTPUT, Array, Model
from tests.server.rig import noise
from tests.server.serving import SOON, Asking, Server, lasagna, lasagna_process, local, serving

from lasagna.errors import EvidenceError, InvalidInputError, ServiceError
from lasagna.tee.epc import stats_folder, why_not
from lasagna.tee.epc_profiles import profile
from lasagna.tee.epc_stats import processes
from lasagna.tee.process import InsecureProcessBackend
from lasagna.trust.policy import MeasurementIn

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(model.package, *local(model, folder), "--max-batch=4") as made:
        yield made


# What it says and does.


def test_it_says_what_it_serves_and_that_it_protects_nothing(server: Server) -> None:
    assert "an EMULATED enclave, which protects nothing" in server.said
    assert server.measurement == InsecureProcessBackend().measurement().hex()
    assert re.search(r"model squeezenet: ready: 4\.9\d MB of weights in \d+ slice", server.said)
    assert httpx.get(server.url + "/v2/health/ready").json() == {"live": True, "ready": True}


def test_answers_are_those_of_onnx_runtime(server: Server, model: Model, image: Array) -> None:
    with server.client() as client:
        for inputs in ({INPUT: image}, {INPUT: noise(3)}, {INPUT: np.full_like(image, np.nan)}):
            np.testing.assert_allclose(
                client.infer(NAME, inputs)[OUTPUT], model.expected(inputs), rtol=1e-4
            )


def test_measure_prints_what_clients_allow(server: Server) -> None:
    assert lasagna_process("measure").stdout == server.measurement + "\n"


# Inputs that are wrong.


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (INPUT, np.zeros((1, 3, 224, 223), np.float32), r"takes \[rows, 3, 224, 224\]"),
        (INPUT, np.zeros((3, 224, 224), np.float32), r"pass array\[None\]"),
        (INPUT, np.zeros((1, 3, 224, 224)), "is float64; the model takes float32"),
        (INPUT, np.zeros((5, 3, 224, 224), np.float32), r"5 rows .* takes up to 4"),
        ("image", np.zeros((1, 3, 224, 224), np.float32), "no input 'image'; .* takes 'data_0'"),
    ],
)
def test_wrong_inputs_are_named(server: Server, name: str, array: Array, message: str) -> None:
    with server.client() as client, pytest.raises(InvalidInputError, match=message):
        client.infer(NAME, {name: array})


def test_no_such_model(server: Server, image: Array) -> None:
    with server.client() as client, pytest.raises(ServiceError, match="404: no model 'resnet'"):
        client.infer("resnet", {INPUT: image})


def test_an_oversize_body_gets_an_answer_although_it_is_still_being_sent(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v2/models/{NAME}/infer", content=bytes(30_000_000), timeout=SOON
    )
    assert answer.status_code == 400
    assert "the body is too long" in answer.json()["error"]


def test_records_of_one_request_are_refused_in_another(server: Server, image: Array) -> None:
    kept: list[bytes] = []

    def keep(request: httpx.Request) -> None:
        if request.url.path.endswith("/infer"):
            kept.append(request.read())

    with server.client() as client:
        client._http.event_hooks = {"request": [keep]}
        client.infer(NAME, {INPUT: image})
        client.infer(NAME, {INPUT: image})
    first, second = (split(body) for body in kept)
    mixed = first[0] + second[1]
    answer = post(server, mixed, len(first[0]))
    assert answer.status_code == 400
    assert "does not open" in answer.json()["error"]
    # As a whole it may be repeated: the answer is for the client's eyes only.
    assert post(server, kept[0], len(first[0])).status_code == 200


def split(body: bytes) -> tuple[bytes, bytes]:
    head, length = json.JSONDecoder().raw_decode(body[:4096].decode(errors="replace"))
    assert head["inputs"][0]["datatype"] == "BYTES"
    return body[:length], body[length:]


def post(server: Server, body: bytes, json_bytes: int) -> httpx.Response:
    headers = {"Inference-Header-Content-Length": str(json_bytes)}
    url = f"{server.url}/v2/models/{NAME}/infer"
    return httpx.post(url, content=body, headers=headers, timeout=SOON)


# Enclaves that are not allowed.


def test_emulated_enclaves_are_refused_by_default(server: Server, image: Array) -> None:
    with (
        server.client(insecure_allow_emulated=False) as client,
        pytest.raises(EvidenceError, match="the evidence is emulated"),
    ):
        client.infer(NAME, {INPUT: image})


def test_another_measurement_is_refused(server: Server, image: Array) -> None:
    policy = MeasurementIn(frozenset({bytes(32)}))
    with server.client(policy=policy) as client, pytest.raises(EvidenceError, match="not allowed"):
        client.infer(NAME, {INPUT: image})


# The command infer.


def test_infer_writes_and_prints(
    server: Server, model: Model, image: Array, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", image)
    output = tmp_path / "y.npz"
    arguments = ("infer", server.url, NAME, f"--input={INPUT}={tmp_path}/x.npy")
    done = lasagna(*arguments, *server.trust_options(), "--output", output)
    expected = model.expected({INPUT: image})
    assert done.stdout.startswith("softmaxout_1: float32 [1, 1000, 1, 1]\n  row 0, largest: ")
    assert f"largest: {int(expected.argmax())}: " in done.stdout
    np.testing.assert_allclose(np.load(output)[OUTPUT], expected, rtol=1e-4)


def test_infer_prints_json_without_nan(server: Server, image: Array, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full_like(image, np.nan))
    done = lasagna(
        *("infer", server.url, NAME, f"--input={INPUT}={tmp_path}/x.npy", "--json"),
        *server.trust_options(),
    )
    answer = json.loads(done.stdout)[OUTPUT]
    assert answer["shape"] == [1, 1000, 1, 1]
    assert set(answer["data"]) == {"NaN"}


@pytest.mark.parametrize(
    ("inputs", "message", "code"),
    [
        ("x", "--input takes NAME=FILE.npy, not 'x'", 2),
        ("a=photo.png", "'photo.png' is not an .npy file", 2),
        ("a=missing.npy", "input 'a': can't read missing.npy: No such file", 2),
        ("data_0={wrong}", "the model takes float32", 1),
        ("data_0={text}", "is not a readable .npy file", 2),
    ],
)
def test_infer_names_what_is_wrong(
    server: Server, tmp_path: Path, inputs: str, message: str, code: int
) -> None:
    np.save(tmp_path / "wrong.npy", np.zeros((1, 3, 224, 224)))
    (tmp_path / "text.npy").write_text("hello")
    given = inputs.format(wrong=tmp_path / "wrong.npy", text=tmp_path / "text.npy")
    options = ("infer", server.url, NAME, f"--input={given}", *server.trust_options())
    done = lasagna(*options, code=code)
    assert message in done.stderr
    assert done.stderr.startswith("error: ")


def test_infer_refuses_emulated_enclaves_by_default(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 224, 224), np.float32))
    options = server.trust_options()[:2]
    done = lasagna(
        *("infer", server.url, NAME, f"--input={INPUT}={tmp_path}/x.npy", *options), code=1
    )
    assert "the evidence is emulated" in done.stderr


# Deaths.


def test_an_enclave_killed_in_the_middle_of_a_request(
    server: Server, model: Model, image: Array
) -> None:
    inputs = {INPUT: image}
    with server.client() as client:
        asking = Asking(server, client, image)
        enclave, before = server.enclave(), len(server.log)
        os.kill(enclave, signal.SIGKILL)
        np.testing.assert_allclose(asking.answer(), model.expected(inputs), rtol=1e-4)
        np.testing.assert_allclose(
            client.infer(NAME, inputs)[OUTPUT], model.expected(inputs), rtol=1e-4
        )
    server.wait_for_log("killed by SIGKILL (death 1 in a row", before)
    server.wait_for_log("loaded in", before)
    assert server.enclave() != enclave


# What is refused before anything starts.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one key broker: --broker URL, or --insecure-local-broker KEYFILE"),
        (["--broker=http://k", "--insecure-local-broker=k"], "name one key broker"),
    ],
)
def test_serve_names_what_is_wrong(model: Model, arguments: list[str], message: str) -> None:
    done = lasagna("serve", model.package, "--budget=12MB", *arguments, code=2)
    assert message in done.stderr


def test_serve_names_an_address_that_is_not_there(model: Model) -> None:
    options = ("--budget=12MB", "--broker=http://k", "--host=192.0.2.1")
    done = lasagna_process("serve", model.package, *options, code=2)
    assert "can't listen on 192.0.2.1, port 8000" in done.stderr


def test_serve_refuses_a_budget_that_is_none(model: Model) -> None:
    done = lasagna("serve", model.package, "--budget=lots", "--broker=http://k", code=2)
    assert "'lots' is not a size" in done.stderr


def test_serve_refuses_two_models_of_one_name(model: Model, tmp_path: Path) -> None:
    done = lasagna_process(
        *("serve", model.package, model.package, "--budget=64MB", "--port=0"),
        *local(model, tmp_path),
        code=2,
    )
    assert "two packages are called 'squeezenet'" in done.stderr


def test_serve_refuses_sockets_that_others_can_reach(model: Model, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    options = ("--budget=64MB", "--port=0", "--broker=http://k", "--socket-dir", tmp_path)
    done = lasagna_process("serve", model.package, *options, code=2)
    assert "(mode 0755): run chmod 700" in done.stderr


def test_serve_refuses_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "m.lsg").write_bytes(bytes(100))
    done = lasagna(
        "serve", tmp_path / "m.lsg", "--budget=1MB", "--port=0", "--broker=http://k", code=1
    )
    assert "not a Lasagna package" in done.stderr


def test_the_broker_listens_elsewhere_only_by_name(model: Model) -> None:
    done = lasagna(
        *("insecure-broker", model.key_file, "--allow-measurement", "00" * 32),
        "--host=0.0.0.0",
        code=2,
    )
    assert "add --insecure-listen-anywhere" in done.stderr


def test_the_broker_wants_a_measurement(model: Model) -> None:
    done = lasagna("insecure-broker", model.key_file, "--allow-measurement", "abc", code=2)
    assert "takes 64 hexadecimal digits, not 'abc'" in done.stderr


@pytest.mark.skipif(why_not() is not None, reason=f"no emulator here: {why_not()}")
def test_an_enclave_in_an_emulated_epc_answers_and_its_footprint_is_deducted(
    model: Model, image: Array, tmp_path: Path
) -> None:
    emulated = ("--insecure-emulate-epc", "sgx1-128")
    with serving(model.package, *local(model, tmp_path), *emulated) as server:
        assert "backend insecure-emulated-epc: an EMULATED" in server.said
        assert "it has 98.0 MB of emulated EPC as of sgx1-128, typical costs" in server.said
        with server.client() as client:
            inputs = {INPUT: image}
            answer = client.infer(NAME, inputs)[OUTPUT]
            np.testing.assert_allclose(answer, model.expected(inputs), rtol=1e-4)
            server.wait_for_log("hot outside the emulated region")
        found = {int(file.path.stem): file.read() for file in processes(stats_folder())}
        stats = found[server.enclave()]
        limit = profile("sgx1-128").costs().limit_pages
        assert stats["resident_pages"] <= stats["limit_pages"] < limit
        assert stats["added"] > 1000
    refused = lasagna_process(
        *("serve", model.package, "--budget=100MB", "--port=0", *local(model, tmp_path), *emulated),
        code=2,
    )
    assert "100 MB is more than the EPC of sgx1-128, 98.0 MB" in refused.stderr


SERVE_ON_AN_OLD_KERNEL = """
import lasagna.tee.emulated
lasagna.tee.emulated.why_not = lambda: "Linux 6.8 or newer is needed"
from lasagna.cli.main import app
app()
"""


def test_without_the_emulator_serve_says_so_and_serves(
    model: Model, image: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_module, "COMMAND", [sys.executable, "-c", SERVE_ON_AN_OLD_KERNEL])
    emulated = ("--insecure-emulate-epc", "sgx1-128")
    with serving(model.package, *local(model, tmp_path), *emulated) as server:
        assert "backend insecure-process: an EMULATED" in server.said
        assert "no EPC is emulated" in server.said
        assert "not limited: Linux 6.8 or newer is needed" in server.said
        with server.client() as client:
            answer = client.infer(NAME, {INPUT: image})[OUTPUT]
            np.testing.assert_allclose(answer, model.expected({INPUT: image}), rtol=1e-4)
