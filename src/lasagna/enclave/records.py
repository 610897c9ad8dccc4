"""Opening what a request brings into enclave memory, and sealing what leaves it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lasagna.enclave.messages import InferResult, SealedRows
from lasagna.enclave.pool import Memory
from lasagna.errors import RecordError
from lasagna.package.format import TensorSpec
from lasagna.trust.keys import Direction, ServiceKeys
from lasagna.trust.records import RecordContext, open_record_into, seal_record
from lasagna.trust.request import EnclaveRequestKeys, RequestScope, open_capsule


class OpenRequest:
    """One request inside the enclave: its keys, and where its rows stand in the batch.

    Attributes:
        rows: how many.
        first_row: its first row in the batch.
    """

    def __init__(
        self, sealed: SealedRows, service: ServiceKeys, model_digest: bytes, variant: str
    ) -> None:
        """Open the capsule.

        Raises:
            RecordError: it is for another service, model or request, or was changed.
        """
        self.rows = sealed.rows
        self.first_row = 0
        self._variant = variant
        self._records = sealed.records
        self._scope = RequestScope(
            service_id=service.service_id, model_digest=model_digest, request_id=sealed.request_id
        )
        self._keys: EnclaveRequestKeys = open_capsule(service, self._scope, sealed.capsule)

    def open_into(
        self, specs: Sequence[TensorSpec], places: Sequence[Memory], first_row: int, cut: int
    ) -> None:
        """Decrypt every row of every tensor to its place in the batch.

        Args:
            specs: the tensors that cross the cut; the model's inputs when ``cut`` is 0.
            places: memory of each tensor for the whole batch.
            first_row: where this request's rows begin.
            cut: number of the cut.

        Raises:
            RecordError: a record is missing, or does not open here.
        """
        if len(self._records) != len(specs):
            raise RecordError(f"{len(self._records)} tensors were sent, {len(specs)} are needed")
        self.first_row = first_row
        key = self._keys.activation if cut else self._keys.input
        for index, records in enumerate(self._records):
            spec, place = specs[index], places[index]
            if len(records) != self.rows:
                which = f"tensor {index} at cut {cut}" if cut else f"input {spec.name!r}"
                raise RecordError(f"{which} has {len(records)} records for {self.rows} rows")
            context = self._context(spec, Direction.ACTIVATION if cut else Direction.INPUT, cut)
            size = spec.row_bytes
            for row, record in enumerate(records):
                start = (first_row + row) * size
                open_record_into(key, context, row, record, place[start : start + size].data)
        self._records = ()

    def seal(
        self, specs: Sequence[TensorSpec], places: Sequence[Memory], cut: int | None
    ) -> InferResult:
        """Encrypt this request's rows of some tensors.

        Args:
            specs: the model's outputs, or the tensors that cross the cut.
            places: their memory for the whole batch.
            cut: number of the cut, or None at the model's end.
        """
        end = cut is None
        key = self._keys.output if end else self._keys.activation
        sealed = []
        for spec, place in zip(specs, places, strict=True):
            direction = Direction.OUTPUT if end else Direction.ACTIVATION
            context = self._context(spec, direction, cut or 0)
            size, rows = spec.row_bytes, []
            for row in range(self.rows):
                start = (self.first_row + row) * size
                plain = place[start : start + size].data
                rows.append(seal_record(key, context, row, plain, os.urandom(12)))
            sealed.append(tuple(rows))
        return InferResult(records=tuple(sealed))

    def _context(self, spec: TensorSpec, direction: Direction, cut: int) -> RecordContext:
        inner = direction is Direction.ACTIVATION
        return RecordContext.of(
            self._scope,
            direction,
            spec,
            self.rows,
            variant=self._variant if inner else "",
            boundary=cut if inner else 0,
        )
