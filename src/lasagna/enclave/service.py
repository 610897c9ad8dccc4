"""The enclave's threads and what each does.

The main thread reads commands, opens requests into waiting input slots and hands runs on; so
opening one overlaps with computing another. Each compute thread carries out one run at a time and
sends the answer. The loader thread decrypts weights ahead; a new one starts with every arrangement.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lasagna.enclave import frames
from lasagna.enclave import messages as m
from lasagna.enclave.arrangement import Arrangement, RefusedModelError, Sessions, arrange
from lasagna.enclave.channel import Channel, Frame
from lasagna.enclave.counters import Counters
from lasagna.enclave.executor import Job, Requests, open_requests, open_sealed, run_job
from lasagna.enclave.model import LoadedModel, Model
from lasagna.enclave.pool import Memory
from lasagna.enclave.sessions import native_block, on_processors, share_threads
from lasagna.enclave.spans import Recorder
from lasagna.errors import (
    EnclaveError,
    InvalidInputError,
    LasagnaError,
    ModelNotFoundError,
)
from lasagna.package.forms import Form, choose_variant
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.evidence import Quoter, attest
from lasagna.trust.keys import service_keys
from lasagna.trust.release import PendingKeyRequest, make_key_request, open_grant


@dataclass(frozen=True, slots=True)
class Limits:
    """What the enclave was started with.

    Attributes:
        budget: bytes of enclave memory for pool and workspace.
        threads: that compute.
        frame_limit: longest frame accepted.
    """

    budget: int
    threads: int
    frame_limit: int


class Enclave:
    """The service behind one socket."""

    def __init__(self, connection: socket.socket, limits: Limits, quoter: Quoter) -> None:
        """Nothing happens before ``serve``."""
        self._channel = Channel(connection, limits.frame_limit)
        self._limits = limits
        self._quoter = quoter
        self._block = native_block()
        self._pending: tuple[Package, PendingKeyRequest] | None = None
        self._models: dict[bytes, LoadedModel] = {}
        self._sessions = Sessions()
        self._lanes = 0
        self._recorder = Recorder()
        self._requests = Requests()
        self._arrangement: Arrangement | None = None
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._free_slots: queue.Queue[Memory] = queue.Queue()
        self._inside = 0
        self._emptied = threading.Condition()
        self._counters = Counters()
        self._loader: threading.Thread | None = None
        self._computing: list[threading.Thread] = []
        self._processors = sorted(os.sched_getaffinity(0))
        self._keeps = False

    def serve(self) -> None:
        """Answer commands until Stop or the end of the connection.

        Raises:
            ProtocolError: the host sent something that is no command; the enclave must not go on.
        """
        self._channel.send(
            m.Hello(
                id=0,
                version=m.PROTOCOL_VERSION,
                budget_bytes=self._limits.budget,
                compute_threads=self._limits.threads,
                block=self._block,
                insecure_emulated=True,
            )
        )
        try:
            while (frame := self._channel.receive()) is not None:
                command = frames.decode_command(frame.body)
                if isinstance(command, m.Stop):
                    self._dissolve()
                    self._channel.send(m.Stopped(command.id))
                    return
                try:
                    self._carry_out(command, frame)
                except LasagnaError as error:
                    frame.release()
                    self._fail(command.id, error)
        finally:
            self._dissolve()

    def _carry_out(self, command: m.Command, frame: Frame) -> None:
        self._counters.entries += 1
        match command:
            case m.Run():
                self._enqueue(command, frame)
                return
            case m.Forget():
                self._forget(command)
            case m.Pin() | m.Unpin():
                self._move(command)
            case m.Attest():
                released = self._loaded(command.model).released
                document = attest(released.service_claims(command.nonce), self._quoter)
                self._channel.send(m.Attested(command.id, document))
            case m.RequestKeys():
                self._channel.send(self._request_keys(command))
            case m.Load():
                self._channel.send(self._load(command))
            case m.Unload():
                self._unload(command)
            case m.Arrange():
                self._channel.send(self._arrange(command))
            case m.TakeSpans():
                spans, lost = self._recorder.take(record=command.record)
                self._channel.send(m.Spans(command.id, spans, lost))
            case m.GetStats():
                self._channel.send(self._stats(command.id))
            case m.Stop():
                raise AssertionError("handled by serve")
        frame.release()

    # Models.

    def _loaded(self, digest: bytes) -> LoadedModel:
        loaded = self._models.get(digest)
        if loaded is None:
            raise ModelNotFoundError(f"no model {digest.hex()[:16]} is loaded here")
        return loaded

    def _request_keys(self, command: m.RequestKeys) -> m.KeysRequested:
        if "\0" in command.path:
            raise InvalidInputError("a path has no NUL in it")
        package = Package(Path(command.path))
        pending = make_key_request(package.manifest.package_id, self._quoter)
        self._pending = (package, pending)
        return m.KeysRequested(
            command.id, pending.request, pending.package_id, package.manifest.name
        )

    def _load(self, command: m.Load) -> m.Loaded:
        if self._pending is None:
            raise EnclaveError("Load needs a RequestKeys before it")
        package, pending = self._pending
        self._pending = None
        start = time.perf_counter()
        if package.model_digest in self._models:
            raise EnclaveError(f"model {package.manifest.name!r} is loaded already")
        released = open_grant(pending, command.grant)
        keys = released.bundle.model
        package.verify_signature(keys.owner_public_key)
        opened = OpenPackage(package, keys.content_key.reveal())
        variant = choose_variant(package.manifest.variants, self._block)
        model = LoadedModel(
            package.model_digest,
            package.manifest.name,
            opened,
            variant,
            opened.details(variant),
            released,
            service_keys(released.bundle.service_secret),
        )
        self._models[model.digest] = model
        took_s = time.perf_counter() - start
        return m.Loaded(command.id, model.digest, model.name, variant.name, took_s)

    def _unload(self, command: m.Unload) -> None:
        loaded = self._loaded(command.model)
        if self._arrangement is not None and command.model in self._arrangement.models:
            raise EnclaveError(f"model {loaded.name!r} is in the arrangement")
        del self._models[command.model]
        self._sessions.forget(command.model)
        self._requests.forget_model(command.model)
        loaded.package.package.close()
        self._channel.send(m.Done(command.id))

    # Memory.

    def _arrange(self, command: m.Arrange) -> m.Arranged:
        start = time.perf_counter()
        with self._emptied:
            self._emptied.wait_for(lambda: self._inside == 0)
        self._dissolve()
        if command.models:
            self._take_shape(command.lanes, command.cores)
        try:
            made = arrange(
                command,
                self._models,
                self._sessions,
                self._recorder,
                budget=self._limits.budget,
                threads=self._limits.threads,
            )
        except RefusedModelError as error:
            kind = frames.error_kind(error.reason)
            took_s = time.perf_counter() - start
            return m.Arranged(command.id, 0, took_s, error.model, kind, str(error))
        self._channel.provide(made.frames)
        self._free_slots = queue.Queue()
        for slot in made.input_slots:
            self._free_slots.put(slot)
        self._loader = threading.Thread(
            target=self._load_ahead, args=(made,), name="loader", daemon=True
        )
        self._loader.start()
        self._arrangement = made
        for lane in made.lanes:
            thread = threading.Thread(
                target=self._compute, args=(lane.number,), name="compute", daemon=True
            )
            self._computing.append(thread)
            thread.start()
        return m.Arranged(command.id, made.pool.used, time.perf_counter() - start)

    def _take_shape(self, lanes: int, cores: int) -> None:
        """A batch for each thread, or all on one: the first models decide, for good.

        Threads that share a batch keep to their processors where none is to spare.
        """
        threads = self._limits.threads
        if lanes not in (1, threads):
            raise InvalidInputError(f"{lanes} lanes; {threads} threads make 1 or {threads}")
        if self._lanes and lanes != self._lanes:
            raise InvalidInputError(f"{lanes} lanes in an enclave that began with {self._lanes}")
        if not self._lanes and lanes < threads:
            self._keeps = cores <= threads
            share_threads(threads, self._processors[1:] if self._keeps else self._processors)
            self._sessions.shared_threads = True
        self._lanes = lanes

    def _dissolve(self) -> None:
        """Give up the arrangement; its threads finish what is inside, if anything."""
        for _ in self._computing:
            self._jobs.put(None)
        for thread in self._computing:
            thread.join()
        self._computing.clear()
        if self._arrangement is None or self._loader is None:
            return
        weights = self._arrangement.weights
        weights.close()
        self._loader.join()
        self._counters.keep(weights)
        self._free_slots = queue.Queue()
        self._channel.provide(())
        self._arrangement = self._loader = None

    def _arranged(self, digest: bytes) -> tuple[Arrangement, Model]:
        arrangement = self._arrangement
        model = arrangement.models.get(digest) if arrangement is not None else None
        if arrangement is None or model is None:
            raise ModelNotFoundError(f"model {self._loaded(digest).name!r} has no memory here")
        return arrangement, model

    def _move(self, command: m.Pin | m.Unpin) -> None:
        arrangement, model = self._arranged(command.model)
        if not command.slice < len(model.variant.slices):
            raise InvalidInputError(
                f"slice {command.slice} of a model that has {len(model.variant.slices)}"
            )
        if model.form is not Form.SLICED:
            raise InvalidInputError(f"model {model.loaded.name!r} is not in slices: it stays")

        def done(error: LasagnaError | None) -> None:
            if error is None:
                self._channel.send(m.Done(command.id))
            else:
                self._fail(command.id, error)

        piece = model.base + command.slice
        arrangement.weights.move(piece, pin=isinstance(command, m.Pin), done=done)

    # Requests.

    def _enqueue(self, command: m.Run, frame: Frame) -> None:
        """Check a run, open its rows if there is room for that apart, and queue it."""
        arrangement, model = self._arranged(command.model)
        rows = sum(part.count for part in command.parts)
        slots = arrangement.input_slots
        activations, inputs = arrangement.lanes[0].activations, slots[0] if slots else None
        model.require(command.first, command.last, rows, activations, inputs)
        if command.keep and command.last not in model.cuts:
            raise InvalidInputError(f"no rows are kept at cut {command.last}")
        sealed = {part.sealed is not None for part in command.parts}
        if len(sealed) > 1 or (command.first == 0 and sealed == {False}):
            raise InvalidInputError("rows of one run come all sealed, or all from a cut")
        start, cpu = time.perf_counter(), time.thread_time()
        requests = open_requests(self._requests, command, model)
        job = Job(command, arrangement, model, requests, rows, frame=frame)
        if sealed == {False}:
            job.release()
        if command.first == 0 and slots:
            job.inputs = self._free_slots.get()
            open_sealed(job, None)
        job.queued_at = job.span("main", "open", start)
        job.open_s += time.thread_time() - cpu
        job.course = arrangement.weights.announce(
            model.base + command.first, model.base + command.last
        )
        with self._emptied:
            self._inside += 1
        self._jobs.put(job)

    def _forget(self, command: m.Forget) -> None:
        owner = self._requests.forget(command.request)
        models = self._arrangement.models.values() if self._arrangement is not None else ()
        for cut in (cut for model in models for cut in model.cuts.values()):
            if owner is not None:
                cut.forget(owner)
        self._channel.send(m.Done(command.id))

    def _load_ahead(self, arrangement: Arrangement) -> None:
        """The loader thread. Those that share a layer rest while it works: their place is free."""
        with on_processors(self._processors[1:] if self._keeps else self._processors):
            arrangement.weights.load_ahead()

    def _compute(self, number: int) -> None:
        """A compute thread: jobs in, answers out."""
        with on_processors(self._processors[:1] if self._keeps else self._processors):
            while (job := self._jobs.get()) is not None:
                reply = self._run(job, number)
                del job  # or its arrangement's memory would stay while this thread waits
                with self._emptied:
                    self._inside -= 1
                    self._emptied.notify_all()
                self._channel.send(reply)

    def _run(self, job: Job, number: int) -> m.Reply:
        job.wait_s = time.perf_counter() - job.queued_at
        weights = job.arrangement.weights
        reply: m.Reply
        try:
            results = run_job(job, job.arrangement.lanes[number], self._requests)
            reply = m.Ran(job.command.id, results, self._counters.note(job, weights))
        except LasagnaError as error:
            reply = _failed(job.command.id, error)
        job.release()
        assert job.course is not None
        weights.finish(job.course)
        if job.inputs is not None:
            self._free_slots.put(job.inputs)
        return reply

    def _stats(self, id_: int) -> m.Stats:
        return self._counters.stats(id_, self._arrangement)

    # The end, and the socket.

    def _fail(self, id_: int, error: LasagnaError) -> None:
        self._channel.send(_failed(id_, error))


def _failed(id_: int, error: LasagnaError) -> m.Failed:
    return m.Failed(id_, frames.error_kind(error), str(error))
