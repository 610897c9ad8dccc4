"""Opening what a request brings into enclave memory, and sealing what leaves it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lasagna.enclave.cuts import Owner
from lasagna.enclave.messages import Part, PartResult, SealedRows
from lasagna.enclave.pool import Memory
from lasagna.errors import RecordError
from lasagna.package.format import TensorSpec
from lasagna.trust.keys import Direction, ServiceKeys
from lasagna.trust.records import RecordContext, open_record_into, seal_record
from lasagna.trust.request import EnclaveRequestKeys, RequestScope, open_capsule


class OpenRequest:
    """One request inside the enclave: its keys.

    Attributes:
        owner: of its rows at cuts.
        request_id: the client's.
        model: digest of the model that it is for.
        rows: of the whole request.
        left: rows that have not left the enclave.
    """

    def __init__(
        self, number: int, sealed: SealedRows, service: ServiceKeys, model_digest: bytes
    ) -> None:
        """Open the capsule of the request that the host gives this number.

        Raises:
            RecordError: it is for another service, model or request, or was changed.
        """
        self.owner = Owner(number)
        self.request_id = sealed.request_id
        self.model = model_digest
        self.rows = sealed.rows
        self.left = sealed.rows
        self._scope = RequestScope(
            service_id=service.service_id, model_digest=model_digest, request_id=sealed.request_id
        )
        self._keys: EnclaveRequestKeys = open_capsule(service, self._scope, sealed.capsule)

    def open_into(
        self,
        part: Part,
        sealed: SealedRows,
        specs: Sequence[TensorSpec],
        places: Sequence[Memory],
        at: int,
        cut: tuple[str, int],
    ) -> None:
        """Decrypt rows of every tensor to their places in the batch.

        Args:
            part: which rows.
            sealed: their records.
            specs: the tensors that cross the cut; the model's inputs at cut 0.
            places: memory of each tensor for the whole batch.
            at: where these rows begin in the batch.
            cut: name of the variant that they were made in, and number of the cut.

        Raises:
            RecordError: a record is missing, or does not open here.
        """
        if len(sealed.records) != len(specs):
            raise RecordError(f"{len(sealed.records)} tensors were sent, {len(specs)} are needed")
        variant, number = cut
        key = self._keys.activation if number else self._keys.input
        for index, records in enumerate(sealed.records):
            spec, place = specs[index], places[index]
            if len(records) != part.count:
                which = f"tensor {index} at cut {number}" if number else f"input {spec.name!r}"
                raise RecordError(f"{which} has {len(records)} records for {part.count} rows")
            direction = Direction.ACTIVATION if number else Direction.INPUT
            context = self._context(spec, direction, variant, number)
            size = spec.row_bytes
            for row, record in enumerate(records):
                start = (at + row) * size
                out = place[start : start + size].data
                open_record_into(key, context, part.first + row, record, out)

    def seal(
        self,
        part: Part,
        specs: Sequence[TensorSpec],
        places: Sequence[Memory],
        at: int,
        cut: tuple[str, int] | None,
    ) -> PartResult:
        """Encrypt rows of some tensors.

        Args:
            part: which rows.
            specs: the model's outputs, or the tensors that cross the cut.
            places: their memory for the whole batch.
            at: where these rows begin in the batch.
            cut: name of the variant and number of the cut, or None at the model's end.
        """
        variant, number = cut or ("", 0)
        direction = Direction.ACTIVATION if cut else Direction.OUTPUT
        key = self._keys.activation if cut else self._keys.output
        sealed = []
        for spec, place in zip(specs, places, strict=True):
            context = self._context(spec, direction, variant, number)
            size, rows = spec.row_bytes, []
            for row in range(part.count):
                start = (at + row) * size
                plain = place[start : start + size].data
                rows.append(seal_record(key, context, part.first + row, plain, os.urandom(12)))
            sealed.append(tuple(rows))
        return PartResult(records=tuple(sealed))

    def _context(
        self, spec: TensorSpec, direction: Direction, variant: str, cut: int
    ) -> RecordContext:
        inner = direction is Direction.ACTIVATION
        return RecordContext.of(
            self._scope,
            direction,
            spec,
            self.rows,
            variant=variant if inner else "",
            boundary=cut if inner else 0,
        )
