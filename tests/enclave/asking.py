"""What a host may ask of an enclave, honest or not; and an enclave in this process to ask."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from lasagna.bench.direct import ClientRequest, InsecureDirectEnclave
from lasagna.enclave import messages as m
from lasagna.enclave.frames import DEFAULT_FRAME_LIMIT, ERRORS
from lasagna.enclave.service import Enclave, Limits
from lasagna.package.forms import Form, cut_bytes, extents
from lasagna.trust.evidence import InsecureEmulatedQuoter

from .conftest import Sealed
from .placing import loaded_model

BATCH = 4
HELD = 6
BUDGET = 150_000_000


def in_stages(
    sealed: Sealed,
    digest: bytes,
    cuts: Sequence[int],
    *,
    pinned: Sequence[int] = (),
    held: int = HELD,
    threads: int = 1,
    input_slots: int = 2,
) -> m.Arrange:
    """A division with these cuts, all of whose weights are streamed unless they are pinned."""
    (variant,) = sealed.manifest.variants
    bounds = [0, *cuts, len(variant.slices)]
    stages = [
        m.StageWish(first, last, BATCH, held if first else 0) for first, last in pairwise(bounds)
    ]
    workspace = max(facts.workspace[2] for facts in variant.slices)
    return m.Arrange(
        0,
        (m.ModelWish(digest, Form.SLICED, tuple(stages), tuple(pinned)),),
        threads,
        2,
        max(facts.weight_bytes for facts in variant.slices),
        input_slots,
        cut_bytes(variant)[0] * BATCH,
        max(extents(variant)) * BATCH,
        workspace * (threads + 1),
    )


def part(
    number: int, request: ClientRequest, first: int = 0, count: int | None = None
) -> m.Part:  # fmt: skip
    """Rows of a request as its client sealed them."""
    rows = request.rows
    count = rows.rows - first if count is None else count
    records = tuple(tensor[first : first + count] for tensor in rows.records)
    return m.Part(
        number, first, count, m.SealedRows(rows.request_id, rows.capsule, rows.rows, records)
    )


def kept(number: int, first: int = 0, count: int = 1) -> m.Part:
    """Rows that stand at a cut."""
    return m.Part(number, first, count)


def run(
    enclave: InsecureDirectEnclave,
    parts: Sequence[m.Part],
    first: int,
    last: int,
    *,
    keep: bool = False,
) -> m.Run:
    return m.Run(enclave.next_id(), enclave.digest, first, last, tuple(parts), keep)


def results(
    enclave: InsecureDirectEnclave,
    parts: Sequence[m.Part],
    first: int,
    last: int,
    *,
    keep: bool = False,
) -> tuple[m.PartResult, ...]:
    """Run and wait."""
    return enclave.call(run(enclave, parts, first, last, keep=keep), m.Ran).results


def slices(sealed: Sealed) -> int:
    return len(sealed.manifest.variants[0].slices)


def client(
    enclave: InsecureDirectEnclave, sealed: Sealed, rows: int, seed: int
) -> tuple[dict[str, Any], ClientRequest]:
    """Images, and the request with them."""
    values = sealed.inputs(rows, seed)
    return values, enclave.seal(sealed.manifest.inputs, values)


def assert_answer(
    enclave: InsecureDirectEnclave,
    sealed: Sealed,
    values: Mapping[str, Any],
    request: ClientRequest,
    *found: m.PartResult,
) -> None:
    """The results, of some rows each, are what plain ONNX Runtime gives for the images."""
    for one in found:
        assert not one.error
    tensors = zip(*(one.records for one in found), strict=True)
    whole = m.PartResult(tuple(tuple(r for rows in tensor for r in rows) for tensor in tensors))
    got = sealed.output(enclave.open(sealed.manifest.outputs, request, whole))
    np.testing.assert_allclose(got, sealed.expected(dict(values)), atol=1e-4, rtol=1e-4)


def give(enclave: InsecureDirectEnclave, command: m.Arrange) -> m.Arranged:
    """Divide the memory so."""
    numbered = m.Arrange(enclave.next_id(), *_fields(command))
    arranged = enclave.call(numbered, m.Arranged)
    if arranged.refused:
        raise ERRORS[arranged.kind](arranged.error)
    return arranged


def _fields(command: m.Arrange) -> tuple[Any, ...]:
    names = command.__struct_fields__[1:]
    return tuple(getattr(command, name) for name in names)


class InThread(InsecureDirectEnclave):
    """An enclave on a thread of this process, its model loaded, so that a test can stop it where it
    likes."""

    def __init__(self, sealed: Sealed, threads: int) -> None:
        near, far = socket.socketpair()
        loaded = loaded_model(sealed)
        quoter = InsecureEmulatedQuoter(bytes(32), signer=bytes(32))
        self.inner = Enclave(far, Limits(BUDGET, threads, DEFAULT_FRAME_LIMIT), quoter)
        self.inner._models[loaded.digest] = loaded
        self._next = self._requests = 0
        self._socket, self._far = near, far
        self._socket.settimeout(30)
        self.digest = loaded.digest
        claims = SimpleNamespace(
            service_id=loaded.service.service_id, public_key=loaded.service.public_key
        )
        self._claims = cast(Any, claims)
        self._thread = threading.Thread(target=self.inner.serve, daemon=True)
        self._thread.start()
        self.hello = self.receive(m.Hello)

    def close(self) -> None:
        self._socket.close()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the enclave does not end"
        self._far.close()


@contextmanager
def in_thread(sealed: Sealed, threads: int = 1) -> Iterator[InThread]:
    enclave = InThread(sealed, threads)
    try:
        yield enclave
    finally:
        enclave.close()
