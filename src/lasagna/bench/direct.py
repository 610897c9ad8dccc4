"""Owner, key broker, host and client in one: drives an enclave process without a queue.

For benchmarks, and for tests of the enclave itself. Everything it does is what the real parts do,
on one thread and one socket; it is insecure because one process holds all keys.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from lasagna.enclave import messages as m
from lasagna.enclave.frames import (
    DEFAULT_FRAME_LIMIT,
    ERRORS,
    LENGTH,
    decode_reply,
    encode_frame,
    frame_length,
)
from lasagna.errors import EnclaveLostError, LasagnaError
from lasagna.package.format import TensorSpec
from lasagna.package.forms import choose_variant
from lasagna.package.reader import Package
from lasagna.policy.memory import divide
from lasagna.policy.plan import Style
from lasagna.policy.stages import Machine
from lasagna.server.costs import arrange_message, forms_of, machine_of
from lasagna.server.plan_facts import plan_facts
from lasagna.tee.measurement import measure_code, source_root
from lasagna.tee.process import minimal_environment
from lasagna.trust.evidence import decode_attested
from lasagna.trust.grant import grant
from lasagna.trust.keys import Direction, RequestSecret, SecretKey, ServiceSecret
from lasagna.trust.model_keys import ModelKeys
from lasagna.trust.policy import MeasurementIn
from lasagna.trust.records import RecordContext, open_record_into, seal_record_into
from lasagna.trust.release import KeyBundle
from lasagna.trust.request import RequestScope, SealedRequest, seal_capsule
from lasagna.trust.verifier import UnixSeconds, verify_service

Array = NDArray[Any]
R = TypeVar("R")

START_TIMEOUT_S: Final = 60.0
CALL_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A sealed request, and what opens its answer."""

    rows: m.SealedRows
    scope: RequestScope
    keys: SealedRequest


class InsecureDirectEnclave:
    """One enclave process and one model in it. Use as a context manager.

    Attributes:
        plan: how the model was fitted into the budget.
        digest: of the model.
        pid: of the enclave process.
    """

    def __init__(
        self,
        package: Path,
        keys: ModelKeys,
        budget: int,
        *,
        threads: int = 1,
        together: bool = False,
        max_batch: int = 1,
        pin: bool = True,
        service_secret: ServiceSecret | None = None,
        vanilla: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process, release the keys to it and load the model.

        Args:
            package: the model.
            keys: that open it.
            budget: bytes of enclave memory.
            threads: that compute.
            together: all of them on one batch, instead of one each.
            max_batch: rows of one run at most.
            pin: keep slices where there is room.
            service_secret: of the service; a fresh one if not given.
            vanilla: an ordinary session of the whole model instead, whatever the budget.
            environment: variables beside the minimal ones, such as the emulator's.

        Raises:
            BudgetError: the model does not fit.
            PackageError: the package does not open.
            EnclaveLostError: the process died or did not answer in time.
        """
        measurement = measure_code(source_root())
        with tempfile.TemporaryDirectory(prefix="lasagna-direct-") as folder:
            path = f"{folder}/socket"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.settimeout(START_TIMEOUT_S)
            listener.bind(path)
            listener.listen(1)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "lasagna.enclave", "--socket", path),
                    *("--budget", str(budget), "--threads", str(threads)),
                    *("--insecure-measurement", measurement.hex()),
                ],
                stdin=subprocess.DEVNULL,
                env={**minimal_environment(), **(environment or {})},
            )
            try:
                self._socket, _ = listener.accept()
            except TimeoutError:
                self._process.kill()
                raise EnclaveLostError("the enclave did not connect in time") from None
            finally:
                listener.close()
        self.pid = self._process.pid
        self._next = self._requests = 0
        try:
            self._socket.settimeout(CALL_TIMEOUT_S)
            self.hello = self._expect(self._receive(), m.Hello)
            self._load(package, keys, measurement, service_secret)
            style = Style(staged=False, max_rows=max_batch, pin=pin, whole=pin)
            machine = machine_of(budget, threads, paged=vanilla)
            self._arrange(package, machine.shapes()[-1 if together else 0], style, paged=vanilla)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _load(
        self,
        package: Path,
        keys: ModelKeys,
        measurement: bytes,
        service_secret: ServiceSecret | None,
    ) -> None:
        secret = service_secret or ServiceSecret(SecretKey(os.urandom(32)))
        broker = Ed25519PrivateKey.generate()
        policy = MeasurementIn(frozenset([measurement]))
        now = UnixSeconds(int(time.time()))
        asked = self.call(m.RequestKeys(self.next_id(), str(package)), m.KeysRequested)
        granted = grant(
            asked.request,
            keys=[KeyBundle(keys, secret)],
            broker_key=broker,
            policy=policy,
            now=now,
            insecure_allow_emulated=True,
        )
        loaded = self.call(m.Load(self.next_id(), granted), m.Loaded)
        self.digest, self._variant = loaded.model, loaded.variant
        attest = m.Attest(self.next_id(), self.digest, os.urandom(32))
        attested = decode_attested(self.call(attest, m.Attested).document)
        self._claims = verify_service(
            attested.evidence,
            attested.claims,
            policy=policy,
            brokers={broker.public_key().public_bytes_raw()},
            now=now,
            insecure_allow_emulated=True,
        )

    def _arrange(self, package: Path, machine: Machine, style: Style, *, paged: bool) -> None:
        with Package(package) as opened:
            manifest = opened.manifest
            variant = choose_variant(manifest.variants, self.hello.block)
        rows = style.max_rows if manifest.batchable else 1
        forms = forms_of(variant, rows, paged=paged)
        plan = divide({manifest.name: forms}, {}, machine, style)
        message = arrange_message(self.next_id(), plan, {manifest.name: self.digest})
        arranged = self.call(message, m.Arranged)
        if arranged.refused:
            raise ERRORS.get(arranged.kind, LasagnaError)(arranged.error)
        self.plan = plan_facts(plan, manifest.name, self._variant)

    def next_id(self) -> int:
        """A fresh command id."""
        self._next += 1
        return self._next

    def send(self, command: m.Command) -> None:
        """Send a command; its reply comes with ``receive``."""
        try:
            self._socket.sendall(encode_frame(command))
        except OSError as error:
            raise EnclaveLostError(f"the enclave is gone: {error}") from None

    def receive(self, kind: type[R]) -> R:
        """The next reply.

        Raises:
            LasagnaError: the enclave refused the command; the class it names.
        """
        return self._expect(self._receive(), kind)

    def call(self, command: m.Command, kind: type[R]) -> R:
        """Send a command and wait for its reply; errors as ``receive``."""
        self.send(command)
        return self.receive(kind)

    def seal(self, specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> ClientRequest:
        """What a client sends: every row of every input sealed for this enclave's service."""
        scope = RequestScope(
            service_id=self._claims.service_id,
            model_digest=self.digest,
            request_id=os.urandom(16),
        )
        secret = RequestSecret(SecretKey(os.urandom(32)))
        sealed = seal_capsule(self._claims.public_key, scope, secret)
        records, rows = [], 0
        for spec in specs:
            array = np.ascontiguousarray(inputs[spec.name])
            rows = len(array) // spec.row_shape[0]
            context = RecordContext.of(scope, Direction.INPUT, spec, rows)
            tensor = []
            for row, part in enumerate(np.split(array, rows)):
                record = bytearray(context.record_bytes)
                view = memoryview(record)
                seal_record_into(sealed.keys.input, context, row, part.data, os.urandom(12), view)
                tensor.append(view)
            records.append(tuple(tensor))
        request = m.SealedRows(scope.request_id, sealed.capsule, rows, tuple(records))
        return ClientRequest(request, scope, sealed)

    def open(
        self, specs: Sequence[TensorSpec], request: ClientRequest, result: m.PartResult
    ) -> dict[str, Array]:
        """What a client makes of the answer.

        Raises:
            LasagnaError: the enclave refused this request, or a record does not open.
        """
        if result.error:
            raise ERRORS.get(result.kind, LasagnaError)(result.error)
        outputs: dict[str, Array] = {}
        rows = request.rows.rows
        for spec, records in zip(specs, result.records, strict=True):
            context = RecordContext.of(request.scope, Direction.OUTPUT, spec, rows)
            array = np.empty(spec.shape(rows), dtype=spec.dtype)
            for row, (record, part) in enumerate(zip(records, np.split(array, rows), strict=True)):
                open_record_into(request.keys.keys.output, context, row, record, part.data)
            outputs[spec.name] = array
        return outputs

    def infer(
        self,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        values: Mapping[str, Array],
    ) -> dict[str, Array]:
        """Seal, run and open one request."""
        request = self.seal(inputs, values)
        (result,) = self.call(self.run(request), m.Ran).results
        return self.open(outputs, request, result)

    def run(self, *requests: ClientRequest) -> m.Run:
        """The command that runs the whole model on some requests as one batch."""
        parts = []
        for request in requests:
            self._requests += 1
            parts.append(m.Part(self._requests, 0, request.rows.rows, request.rows))
        return m.Run(self.next_id(), self.digest, 0, self.plan.slices, tuple(parts))

    def stats(self) -> m.Stats:
        """The enclave's counters."""
        return self.call(m.GetStats(self.next_id()), m.Stats)

    def close(self) -> None:
        """Stop the process, by force if it does not end by itself."""
        try:
            self._socket.settimeout(10)
            self.call(m.Stop(self.next_id()), m.Stopped)
        except (LasagnaError, OSError):
            self._process.kill()
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _expect(self, reply: m.Reply, kind: type[R]) -> R:
        if isinstance(reply, m.Failed):
            raise ERRORS.get(reply.kind, LasagnaError)(reply.message)
        if not isinstance(reply, kind):
            raise EnclaveLostError(f"expected {kind.__name__}, got {type(reply).__name__}")
        return reply

    def _receive(self) -> m.Reply:
        head = self._read(LENGTH.size)
        return decode_reply(self._read(frame_length(head, DEFAULT_FRAME_LIMIT)))

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                got = self._socket.recv_into(view)
            except OSError as error:
                raise EnclaveLostError(f"the enclave did not answer: {error}") from None
            if got == 0:
                raise EnclaveLostError("the enclave closed the connection")
            view = view[got:]
        return data
