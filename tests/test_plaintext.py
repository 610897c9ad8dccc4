"""Promise: plaintext lives on the client, at the owner and in the enclave only.

The real server runs with a real model and answers real requests. Then everything outside the
enclave is searched for bytes of weights, inputs and outputs: the memory of the host and of the key
broker, what crossed the network, what crossed the enclave's socket, the package file.

An empty result means something because the same search finds the same bytes where they belong:
weights, inputs and outputs in an enclave, inputs and outputs in the client, which is a process of
its own here; and because it finds what the host and the broker may have in theirs.
"""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.bench.direct import InsecureDirectEnclave
from lasagna.enclave import messages as m
from lasagna.enclave.frames import encode_frame
from lasagna.models.seal import SealOptions, seal
from lasagna.models.source import prepare
from lasagna.models.zoo.light import light_model
from lasagna.package.format import Manifest
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.model_keys import ModelKeys, encode_model_keys

pytestmark = pytest.mark.integration

NEEDLE_BYTES = 32
BUDGET = 9_500_000
REQUESTS = 3
# A client that has its image from a file, keeps image and answer in memory, and waits.
CLIENT = """
import sys
import numpy as np
from lasagna import Client
from lasagna.trust.policy import MeasurementIn

url, measurement, broker, requests, name, image, answer = sys.argv[1:]
inputs = {name: np.load(image)}
with Client(
    url,
    policy=MeasurementIn(frozenset({bytes.fromhex(measurement)})),
    brokers=[bytes.fromhex(broker)],
    insecure_allow_emulated=True,
) as client:
    for _ in range(int(requests)):
        (output,) = client.infer("squeezenet", inputs).values()
    np.save(answer, output)
    print("answered", flush=True)
    sys.stdin.read()
"""


@dataclass(frozen=True, slots=True)
class Scene:
    """A sealed model, one input, and byte strings that must stay secret."""

    path: Path
    keys: ModelKeys
    manifest: Manifest
    digest: bytes
    image: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    weights: list[bytes]
    inputs: list[bytes]


def needles(data: bytes, count: int = 5) -> list[bytes]:
    """So many windows of data in which hardly a byte repeats."""
    places = np.linspace(64, len(data) - 64, 200).astype(int) // 4 * 4
    windows = (data[p : p + NEEDLE_BYTES] for p in places)
    chosen = [window for window in windows if len(set(window)) > 16][:count]
    assert len(chosen) == count, "there is something to look for"
    return chosen


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
        heavy = sorted(manifest.variants[0].slices, key=lambda facts: facts.weight_bytes)
        sections = [s for facts in heavy for s in facts.weights]
        as_sealed = [opened.read_section(section) for section in sections[-4:]]
    largest = sorted(model.graph.initializer, key=lambda t: -len(t.raw_data))[:2]
    as_given = [tensor.raw_data for tensor in largest]
    weights = [needle for data in (*as_sealed, *as_given) for needle in needles(data)]
    inputs = needles(image.tobytes(), 10)
    return Scene(path, keys, manifest, package.model_digest, image, weights, inputs)


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


def leaked(pid: int, secrets: Iterable[bytes]) -> list[str]:
    return [hit for part in memory_of(pid) for hit in found(part, secrets)]


def holds(pid: int, known: Sequence[bytes]) -> bool:
    """Whether the search finds all of this in a process's memory, where it belongs."""
    return set(leaked(pid, known)) == {one.hex() for one in known}


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


@contextmanager
def answered(
    scene: Scene, url: str, said: dict[str, str], folder: Path
) -> Iterator[tuple[int, bytes]]:
    """A client that has its answers and is still there: its process, and the last answer."""
    image, answer = folder / "image.npy", folder / "answer.npy"
    np.save(image, scene.image)
    name = scene.manifest.inputs[0].name
    trust = (said["measurement"], said["broker"])
    command: list[str | Path] = [
        sys.executable,
        "-c",
        CLIENT,
        url,
        *trust,
        str(REQUESTS),
        name,
        image,
        answer,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"answered\n"
        yield process.pid, np.load(answer).tobytes()
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_nothing_in_plaintext_outside_the_enclave(scene: Scene, tmp_path: Path) -> None:
    with serving(scene, tmp_path) as (host, said):
        tap = Tap(("127.0.0.1", int(said["port"])))
        with tap.listening() as url, answered(scene, url, said, tmp_path) as (client, answer):
            outputs, content_key = needles(answer), scene.keys.content_key.reveal()
            secrets = [*scene.weights, *scene.inputs, *outputs]
            family = children(host)
            (enclave,) = (pid for pid, command in family.items() if "lasagna.enclave" in command)
            (broker,) = (pid for pid, command in family.items() if "broker" in command)

            # The search finds what is there ...
            assert leaked(enclave, scene.weights)  # some: not all are laid out as they were given
            assert holds(enclave, outputs)
            assert holds(client, [*scene.inputs, *outputs])
            assert holds(broker, [content_key])
            assert holds(host, [scene.digest])
            # ... and these are not.
            assert not leaked(host, [*secrets, content_key]), "in the host's memory"
            assert not leaked(broker, secrets), "in the key broker's memory"
            assert len(tap.seen) > REQUESTS * scene.image.nbytes, "the requests went through it"
            assert not found(bytes(tap.seen), secrets), "on the network"
    assert not found(scene.path.read_bytes(), secrets), "in the package"


class _Recorded(InsecureDirectEnclave):
    """Keeps all bytes that cross the enclave's socket."""

    traffic: bytearray

    def send(self, command: m.Command) -> None:
        self.traffic = getattr(self, "traffic", bytearray())
        self.traffic += encode_frame(command)
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
        outputs = needles(answer.tobytes())
        assert holds(enclave.pid, [*scene.inputs, *outputs])  # until another request comes
        request = enclave.seal(scene.manifest.inputs, values)
        part = m.Part(9, 0, 1, request.rows)
        half = m.Run(enclave.next_id(), enclave.digest, 0, 3, (part,))
        enclave.call(m.TakeSpans(enclave.next_id(), True), m.Spans)
        enclave.call(half, m.Ran)  # sealed activations cross as well
        enclave.call(m.TakeSpans(enclave.next_id(), False), m.Spans)
        enclave.stats()
        traffic = bytes(enclave.traffic)
    assert len(traffic) > 3 * scene.image.nbytes
    secrets = [*scene.weights, *scene.inputs, *outputs]
    assert not found(traffic, [*secrets, scene.keys.content_key.reveal()])
