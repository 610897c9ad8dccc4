"""Promise: plaintext lives on the client, at the owner and in the enclave only.

The real server runs with a real model and answers real requests. Then everything outside the
enclave is searched for bytes of weights, inputs and outputs: the memory of the host and of the key
broker, what crossed the network, what crossed the enclave's socket, the package file. The same
search finds the weights in the enclave's memory, or it would prove nothing; inputs and outputs
have no such control yet.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna import Client
from lasagna.bench.direct import InsecureDirectEnclave
from lasagna.enclave import messages as m
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare
from lasagna.models.zoo.light import light_model
from lasagna.package.format import Manifest
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.model_keys import ModelKeys, encode_model_keys
from lasagna.trust.policy import MeasurementIn

NEEDLE_BYTES = 32
BUDGET = 9_500_000


@dataclass(frozen=True, slots=True)
class Scene:
    """A sealed model, one input, and byte strings that must stay secret."""

    path: Path
    keys: ModelKeys
    manifest: Manifest
    image: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    weights: list[bytes]
    inputs: list[bytes]


def needles(data: bytes, count: int = 5) -> list[bytes]:
    """Some windows of data in which hardly a byte repeats."""
    places = np.linspace(64, len(data) - 64, 200).astype(int) // 4 * 4
    windows = (data[p : p + NEEDLE_BYTES] for p in places)
    return [window for window in windows if len(set(window)) > 16][:count]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    model = light_model("squeezenet", seed=11)
    path = tmp_path_factory.mktemp("plaintext") / "squeezenet.lsg"
    options = SealOptions(slice_bytes=512 * 1024, profile=False, portable=False)
    keys, report = seal(prepare(model), "squeezenet", Ed25519PrivateKey.generate(), path, options)
    manifest = report.manifest
    image = np.random.default_rng(5).standard_normal((1, 3, 224, 224), dtype=np.float32)
    with Package(path) as package:
        opened = OpenPackage(package, keys.content_key.reveal())
        sections = [s for facts in manifest.variants[0].slices for s in facts.weights]
        as_sealed = [opened.read_section(section) for section in sections[-4:]]
    largest = sorted(model.graph.initializer, key=lambda t: -len(t.raw_data))[:2]
    as_given = [tensor.raw_data for tensor in largest]
    weights = [needle for data in (*as_sealed, *as_given) for needle in needles(data)]
    return Scene(path, keys, manifest, image, weights, needles(image.tobytes(), 10))


def found(haystack: bytes, secrets: Iterable[bytes]) -> list[str]:
    return [secret.hex() for secret in secrets if secret in haystack]


def memory_of(pid: int) -> Iterator[bytes]:
    """All readable memory of a process, mapping by mapping; the package file itself is skipped."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, access, *_, name = (*line.split(maxsplit=5), "")[:7]
            if "r" not in access or name.startswith("[v") or name.endswith(".lsg"):
                continue
            begin, end = (int(part, 16) for part in span.split("-"))
            try:
                memory.seek(begin)
                yield memory.read(end - begin)
            except (OSError, OverflowError, ValueError):
                continue  # guard pages


def leaked(pid: int, secrets: list[bytes]) -> list[str]:
    return [hit for part in memory_of(pid) for hit in found(part, secrets)]


@dataclass(slots=True)
class Tap:
    """A TCP proxy that keeps what passes."""

    target: tuple[str, int]
    seen: bytearray = field(default_factory=bytearray)

    @contextmanager
    def listening(self) -> Iterator[str]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
            yield f"http://127.0.0.1:{server.getsockname()[1]}"

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.create_connection(self.target)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        while data := source.recv(65536):
            self.seen += data
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@contextmanager
def serving(scene: Scene, folder: Path) -> Iterator[tuple[int, dict[str, str]]]:
    keyfile = folder / "squeezenet.key"
    keyfile.touch(mode=0o600)
    keyfile.write_bytes(encode_model_keys(scene.keys))
    command = [sys.executable, "-m", "lasagna.cli.main", "serve", str(scene.path)]
    command += ["--insecure-local-broker", str(keyfile), "--broker-state", str(folder / "state")]
    command += ["--budget", str(BUDGET), "--port", "0", "--max-batch", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        text = ""
        while "model squeezenet: " not in text:
            line = process.stdout.readline()
            assert line, "the server ended"
            text += line
        assert "ready" in text
        said = {
            name: re.search(pattern, text)[1]  # type: ignore[index]
            for name, pattern in {
                "port": r"serving on http://127.0.0.1:(\d+)",
                "measurement": r"--allow-measurement (\w+)",
                "broker": r"--broker-key (\w+)",
            }.items()
        }
        yield process.pid, said
    finally:
        process.terminate()
        process.communicate(timeout=30)


def children(pid: int) -> dict[int, str]:
    """Descendants of a process and their command lines."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    direct = {int(c): Path(f"/proc/{c}/cmdline").read_text() for c in listed}
    return direct | {k: v for child in direct for k, v in children(child).items()}


def test_nothing_in_plaintext_outside_the_enclave(scene: Scene, tmp_path: Path) -> None:
    name = scene.manifest.inputs[0].name
    with serving(scene, tmp_path) as (host, said):
        tap = Tap(("127.0.0.1", int(said["port"])))
        with (
            tap.listening() as url,
            Client(
                url,
                policy=MeasurementIn(frozenset({bytes.fromhex(said["measurement"])})),
                brokers=[bytes.fromhex(said["broker"])],
                insecure_allow_emulated=True,
            ) as client,
        ):
            answers = [client.infer("squeezenet", {name: scene.image}) for _ in range(3)]
        (answer,) = answers[0].values()
        secrets = [*scene.weights, *scene.inputs, *needles(answer.tobytes())]
        family = children(host)
        (enclave,) = (pid for pid, command in family.items() if "lasagna.enclave" in command)
        (broker,) = (pid for pid, command in family.items() if "broker" in command)
        assert leaked(enclave, scene.weights), "the search finds weights where they are"
        assert not leaked(host, [*secrets, scene.keys.content_key.reveal()]), "in the host's memory"
        assert not leaked(broker, secrets), "in the key broker's memory"
        assert len(tap.seen) > 3 * scene.image.nbytes, "the requests went through the tap"
        assert not found(bytes(tap.seen), secrets), "on the network"
    assert not found(scene.path.read_bytes(), secrets), "in the package"


class _Recorded(InsecureDirectEnclave):
    """Keeps all bytes that cross the enclave's socket."""

    traffic: bytearray

    def send(self, command: m.Command) -> None:
        self.traffic = getattr(self, "traffic", bytearray())
        self.traffic += m.encode_frame(command)
        super().send(command)

    def _read(self, size: int) -> bytearray:
        data = super()._read(size)
        self.traffic = getattr(self, "traffic", bytearray())
        self.traffic += data
        return data


def test_nothing_in_plaintext_on_the_enclaves_socket(scene: Scene) -> None:
    name = scene.manifest.inputs[0].name
    with _Recorded(scene.path, scene.keys, 40_000_000, pin=False) as enclave:
        values = {name: scene.image}
        (answer,) = enclave.infer(scene.manifest.inputs, scene.manifest.outputs, values).values()
        request = enclave.seal(scene.manifest.inputs, values)
        half = m.Infer(enclave.next_id(), enclave.digest, (request.rows,), 0, 3)
        enclave.call(half, m.Inferred)  # sealed activations cross as well
        traffic = bytes(enclave.traffic)
    assert len(traffic) > 3 * scene.image.nbytes
    secrets = [*scene.weights, *scene.inputs, *needles(answer.tobytes())]
    assert not found(traffic, [*secrets, scene.keys.content_key.reveal()])
