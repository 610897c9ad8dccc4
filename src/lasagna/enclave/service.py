"""The enclave's threads and what each does.

The main thread reads commands, opens requests into waiting input slots and hands them on; so
opening one request overlaps with computing another. Each compute thread runs one batch at a time
and sends the answer. The loader thread decrypts weights ahead. No thread is started later.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lasagna.enclave import messages as m
from lasagna.enclave.executor import Job, run_job
from lasagna.enclave.model import Lane, Model, prepare_model
from lasagna.enclave.pool import Memory, Pool
from lasagna.enclave.records import OpenRequest
from lasagna.enclave.sessions import native_block
from lasagna.errors import (
    EnclaveError,
    InvalidInputError,
    LasagnaError,
    ModelNotFoundError,
    TrustError,
)
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.evidence import Quoter, attest
from lasagna.trust.keys import ServiceKeys, service_keys
from lasagna.trust.records import require_record_budget
from lasagna.trust.release import PendingKeyRequest, Released, make_key_request, open_grant


@dataclass(frozen=True, slots=True)
class Limits:
    """What the enclave was started with.

    Attributes:
        budget: bytes of enclave memory for pool and workspace.
        threads: compute threads.
        intra_op_threads: threads of each session; more than one only with one compute thread.
        frame_limit: longest frame accepted.
    """

    budget: int
    threads: int
    intra_op_threads: int
    frame_limit: int


class Enclave:
    """The service behind one socket."""

    def __init__(self, connection: socket.socket, limits: Limits, quoter: Quoter) -> None:
        """Nothing happens before ``serve``."""
        self._socket = connection
        self._limits = limits
        self._quoter = quoter
        self._block = native_block()
        self._sending = threading.Lock()
        self._pending: tuple[Package, PendingKeyRequest] | None = None
        self._released: Released | None = None
        self._service: ServiceKeys | None = None
        self._model: Model | None = None
        self._pool: Pool | None = None
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._free_slots: queue.Queue[list[Memory]] = queue.Queue()
        self._counting = threading.Lock()
        self._entries = self._requests = self._rows = self._slice_runs = 0
        self._compute_s = self._open_s = self._seal_s = 0.0
        self._threads: list[threading.Thread] = []

    def serve(self) -> None:
        """Answer commands until Stop or the end of the connection.

        Raises:
            ProtocolError: the host sent something that is no command; the enclave must not go on.
        """
        self._send(
            m.Hello(
                id=0,
                version=m.PROTOCOL_VERSION,
                budget_bytes=self._limits.budget,
                compute_threads=self._limits.threads,
                intra_op_threads=self._limits.intra_op_threads,
                block=self._block,
                insecure_emulated=True,
            )
        )
        try:
            while (body := self._receive()) is not None:
                command = m.decode_command(body)
                if isinstance(command, m.Stop):
                    self._join()
                    self._send(m.Stopped(command.id))
                    return
                try:
                    self._carry_out(command)
                except LasagnaError as error:
                    self._send(m.Failed(command.id, m.error_kind(error), str(error)))
        finally:
            self._join()

    def _carry_out(self, command: m.Command) -> None:
        with self._counting:
            self._entries += 1
        match command:
            case m.Infer():
                self._enqueue(command)
            case m.Attest():
                if self._released is None:
                    raise TrustError("no model is loaded yet, so there is no key to attest")
                document = attest(self._released.service_claims(command.nonce), self._quoter)
                self._send(m.Attested(command.id, document))
            case m.RequestKeys():
                self._send(self._request_keys(command))
            case m.Load():
                self._send(self._load(command))
            case m.GetStats():
                self._send(self._stats(command.id))
            case m.Stop():
                raise AssertionError("handled by serve")

    def _request_keys(self, command: m.RequestKeys) -> m.KeysRequested:
        package = Package(Path(command.path))
        pending = make_key_request(package.manifest.package_id, self._quoter)
        self._pending = (package, pending)
        return m.KeysRequested(
            command.id, pending.request, pending.package_id, package.manifest.name
        )

    def _load(self, command: m.Load) -> m.Loaded:
        if self._pending is None:
            raise EnclaveError("Load needs a RequestKeys before it")
        if self._model is not None:
            raise EnclaveError("this enclave holds a model already")
        package, pending = self._pending
        self._pending = None
        start = time.perf_counter()
        released = open_grant(pending, command.grant)
        keys = released.bundle.model
        package.verify_signature(keys.owner_public_key)
        opened = OpenPackage(package, keys.content_key.reveal())
        model, pool = prepare_model(
            opened,
            block=self._block,
            budget=self._limits.budget,
            threads=self._limits.threads,
            intra_op_threads=self._limits.intra_op_threads,
            max_batch=command.max_batch,
            pin=command.pin,
            vanilla=command.vanilla,
        )
        self._released, self._service = released, service_keys(released.bundle.service_secret)
        self._model, self._pool = model, pool
        for slot in model.input_slots:
            self._free_slots.put(slot)
        self._start(model)
        return m.Loaded(
            command.id, model.digest, model.name, _facts(model), time.perf_counter() - start
        )

    def _start(self, model: Model) -> None:
        """All threads that there will ever be."""
        loader = threading.Thread(target=model.store.load_ahead, name="loader", daemon=True)
        lanes = [
            threading.Thread(target=self._compute, args=(model, lane), name="compute", daemon=True)
            for lane in model.lanes
        ]
        self._threads = [loader, *lanes]
        for thread in self._threads:
            thread.start()

    def _enqueue(self, command: m.Infer) -> None:
        """Check an Infer, open its requests if there is room for that apart, and queue it."""
        model, service = self._model, self._service
        if model is None or service is None or model.digest != command.model:
            raise ModelNotFoundError(f"no model {command.model.hex()[:16]} is loaded here")
        count = len(model.variant.slices)
        last = command.last or count
        if not command.first < last <= count:
            raise InvalidInputError(f"slices {command.first} to {last} of a model that has {count}")
        rows = sum(request.rows for request in command.requests)
        if rows > model.plan.max_batch:
            raise InvalidInputError(
                f"{rows} rows in one batch; this plan allows {model.plan.max_batch}"
            )
        start = time.perf_counter()
        sealed_tensors = len(model.boundary(command.first)) + len(model.boundary(last))
        requests: list[OpenRequest | m.InferResult] = []
        for sealed in command.requests:
            try:
                require_record_budget(sealed.rows, sealed_tensors)
                requests.append(OpenRequest(sealed, service, model.digest, model.variant.name))
            except LasagnaError as error:
                requests.append(_refused(error))
        job = Job(command.id, command.first, last, requests)
        if model.input_slots:
            job.inputs = self._free_slots.get()
            if command.first == 0:
                self._open(model, job, job.inputs)
        job.open_s += time.perf_counter() - start
        job.queued_at = time.perf_counter()
        self._jobs.put(job)

    def _open(self, model: Model, job: Job, places: list[Memory]) -> None:
        """Bring the rows of every request that opens into memory, one after the other."""
        cut = job.first
        specs = list(model.inputs) if cut == 0 else model.specs(model.boundary(cut))
        for index, request in enumerate(job.requests):
            if isinstance(request, m.InferResult):
                continue
            try:
                request.open_into(specs, places, job.rows, cut)
            except LasagnaError as error:
                job.requests[index] = _refused(error)
            else:
                job.rows += request.rows
        job.opened = True

    def _compute(self, model: Model, lane: Lane) -> None:
        """A compute thread: jobs in, answers out."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                model.store.idle(lane.number)
                job = self._jobs.get()
            if job is None:
                return
            reply: m.Reply
            try:
                reply = self._run(model, lane, job)
            except LasagnaError as error:
                reply = m.Failed(job.id, m.error_kind(error), str(error))
            if model.input_slots:
                self._free_slots.put(job.inputs)
            self._send(reply)

    def _run(self, model: Model, lane: Lane, job: Job) -> m.Inferred:
        start = time.perf_counter()
        job.wait_s = start - job.queued_at
        if not job.opened:
            places = lane.places(model, job.inputs, model.boundary(job.first))
            self._open(model, job, places)
            job.open_s += time.perf_counter() - start
        results, timings = run_job(model, lane, job)
        with self._counting:
            self._requests += len(job.requests)
            self._rows += job.rows
            self._slice_runs += job.last - job.first
            self._compute_s += timings.compute_s
            self._open_s += timings.open_s
            self._seal_s += timings.seal_s
        return m.Inferred(job.id, results, timings)

    def _stats(self, id_: int) -> m.Stats:
        model, pool = self._model, self._pool
        loads = model.store.counters if model else None
        with self._counting:
            return m.Stats(
                id=id_,
                pool_bytes=pool.size if pool else 0,
                pool_high_water=pool.high_water if pool else 0,
                workspace_bytes=model.plan.workspace_bytes if model else 0,
                entries=self._entries,
                requests=self._requests,
                rows=self._rows,
                slice_runs=self._slice_runs,
                loads=loads.loads if loads else 0,
                loaded_bytes=loads.loaded_bytes if loads else 0,
                load_s=loads.load_s if loads else 0.0,
                compute_s=self._compute_s,
                stall_s=sum(model.store.stall_s) if model else 0.0,
                open_s=self._open_s,
                seal_s=self._seal_s,
            )

    def _join(self) -> None:
        """Let what is queued finish and end all threads."""
        if self._model is None:
            return
        for _ in self._model.lanes:
            self._jobs.put(None)
        for thread in self._threads[1:]:
            thread.join()
        self._model.store.close()
        self._threads[0].join()
        self._model = None

    def _send(self, reply: m.Reply) -> None:
        frame = m.encode_frame(reply)
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError:
                return  # the host is gone; serve sees the end of the connection next

    def _receive(self) -> bytearray | None:
        head = self._read(m.LENGTH.size)
        if head is None:
            return None
        return self._read(m.frame_length(head, self._limits.frame_limit))

    def _read(self, size: int) -> bytearray | None:
        """Exactly so many bytes, or None when the host has closed the connection."""
        data = bytearray(size)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if got == 0:
                return None
            view = view[got:]
        return data


def _refused(error: LasagnaError) -> m.InferResult:
    return m.InferResult(error=str(error), kind=m.error_kind(error))


def _facts(model: Model) -> m.PlanFacts:
    plan = model.plan
    return m.PlanFacts(
        variant=model.variant.name,
        slices=len(model.variant.slices),
        pinned_slices=tuple(sorted(plan.pinned)),
        weight_bytes=plan.weight_bytes,
        pinned_bytes=plan.pinned_bytes,
        ring_slots=plan.ring_slots,
        slot_bytes=plan.slot_bytes,
        activation_bytes=plan.activation_bytes * len(model.lanes),
        input_bytes=plan.input_slots * plan.input_slot_bytes,
        staging_bytes=plan.staging_bytes * plan.staging_count,
        workspace_bytes=plan.workspace_bytes,
        session_bytes=plan.session_bytes,
        max_batch=plan.max_batch,
        sessions=model.session_count,
        total_bytes=plan.total_bytes,
    )
