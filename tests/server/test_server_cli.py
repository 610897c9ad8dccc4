"""The commands as people run them: real processes, real sockets, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tests.server.conftest import INPUT, NAME, OUTPUT, Array, Model
from tests.server.rig import noise
from typer.testing import CliRunner, Result

from lasagna import Client
from lasagna.cli.main import app
from lasagna.errors import EvidenceError, InvalidInputError, ServiceError
from lasagna.tee.process import InsecureProcessBackend
from lasagna.trust.policy import MeasurementIn

COMMAND = [sys.executable, "-m", "lasagna.cli.main"]
SOON = 30


def lasagna(*arguments: str | Path, code: int = 0) -> Result:
    """Run a command in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


def lasagna_process(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command that sets up the process that it runs in."""
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=SOON, check=False
    )
    assert done.returncode == code, done.stderr
    return done


class Server:
    """A running ``lasagna serve``."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", *arguments, "--port=0", "--budget=64MiB", "--log-level=debug"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.log = ""
        self._logged = threading.Condition()
        self._listening = threading.Thread(target=self._listen)
        self._listening.start()
        self.said = ""
        while line := self.process.stdout.readline():
            self.said += line
            if line.startswith("model "):
                break

    @property
    def url(self) -> str:
        return self.find(r"serving on (\S+)")

    @property
    def broker_key(self) -> str:
        return self.find(r"--broker-key (\w+)")

    @property
    def measurement(self) -> str:
        return self.find(r"--allow-measurement (\w+)")

    def find(self, pattern: str) -> str:
        found = re.search(pattern, self.said)
        assert found, self.said + self.log
        return found[1]

    def _listen(self) -> None:
        assert self.process.stderr is not None
        while line := self.process.stderr.readline():
            with self._logged:
                self.log += line
                self._logged.notify_all()

    def wait_for_log(self, text: str, after: int = 0) -> None:
        """Wait until it has logged something, behind so many characters."""
        with self._logged:
            assert self._logged.wait_for(lambda: text in self.log[after:], SOON), self.log

    def children(self) -> list[int]:
        """All processes that it has started and that live."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(child) for child in children.split()]

    def enclave(self) -> int:
        """The enclave that runs now."""
        pids = re.findall(r"enclave started as process (\d+)", self.log)
        return int(pids[-1])

    def client(self, **changes: Any) -> Client:
        arguments: dict[str, Any] = {
            "policy": MeasurementIn(frozenset({bytes.fromhex(self.measurement)})),
            "brokers": [bytes.fromhex(self.broker_key)],
            "insecure_allow_emulated": True,
            "timeout_s": SOON,
        }
        return Client(self.url, **(arguments | changes))

    def trust_options(self) -> list[str]:
        return [
            f"--allow-measurement={self.measurement}",
            f"--broker-key={self.broker_key}",
            "--insecure-allow-emulated",
        ]

    def close(self) -> None:
        self.process.kill()
        self._listening.join()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def serving(*arguments: str | Path) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.close()


def local(model: Model, folder: Path) -> list[str | Path]:
    return [
        "--insecure-local-broker",
        model.key_file,
        "--broker-state",
        folder / "state",
    ]


@pytest.fixture(scope="module")
def server(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    with serving(model.package, *local(model, folder), "--max-batch=4") as made:
        yield made


@contextlib.contextmanager
def watching(pids: list[int]) -> Iterator[None]:
    """See to it that these processes are gone soon after the block."""
    watches = {os.pidfd_open(pid): pid for pid in pids}
    yield
    for watch, pid in watches.items():
        poll = select.poll()
        poll.register(watch, select.POLLIN)
        assert poll.poll(10_000), f"process {pid} lives on"
        os.close(watch)


# What it says and does.


def test_it_says_what_it_serves_and_that_it_protects_nothing(server: Server) -> None:
    assert "EMULATED enclaves, which protect nothing" in server.said
    assert server.measurement == InsecureProcessBackend().measurement().hex()
    assert re.search(r"model squeezenet: ready: 4\.93 MB of weights in \d+ slices", server.said)
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
        ("image", np.zeros((1, 3, 224, 224), np.float32), "input 'data_0' is missing"),
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
        ("a=missing.npy", "No such file", 1),
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


# Deaths and stops.


def test_an_enclave_killed_in_the_middle_of_a_request(
    server: Server, model: Model, image: Array
) -> None:
    inputs = {INPUT: image}
    with server.client() as client:
        client.verify(NAME)
        enclave = server.enclave()
        os.kill(enclave, signal.SIGSTOP)  # it can't answer before it dies
        answers: list[Array] = []
        asking = threading.Thread(target=lambda: answers.append(client.infer(NAME, inputs)[OUTPUT]))
        asking.start()
        os.kill(enclave, signal.SIGKILL)
        asking.join(SOON)
        np.testing.assert_allclose(answers[0], model.expected(inputs), rtol=1e-4)
        np.testing.assert_allclose(
            client.infer(NAME, inputs)[OUTPUT], model.expected(inputs), rtol=1e-4
        )
    assert server.enclave() != enclave


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


class Asking:
    """A request in a thread, that the stopped enclave has and can't answer."""

    def __init__(self, server: Server, client: Client, image: Array) -> None:
        client.verify(NAME)
        before = len(server.log)
        os.kill(server.enclave(), signal.SIGSTOP)
        self._answers: list[Array] = []
        self._thread = threading.Thread(
            target=lambda: self._answers.append(client.infer(NAME, {INPUT: image})[OUTPUT])
        )
        self._thread.start()
        server.wait_for_log("batch", before)

    def answer(self) -> Array:
        self._thread.join(SOON)
        return self._answers[0]


# What is refused before anything starts.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name one key broker: --broker URL, or --insecure-local-broker KEYFILE"),
        (["--broker=http://k", "--insecure-local-broker=k"], "name one key broker"),
        (["--broker=http://k", "--threads=2", "--intra-op-threads=2"], "only one of them above 1"),
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
