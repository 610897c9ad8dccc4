"""Sealed rows: round trips, sizes, nonces, and associated data that names one place only."""

from __future__ import annotations

import mmap
import os
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from lasagna.errors import RecordError, UsageError
from lasagna.trust.encoding import canonical, u32
from lasagna.trust.keys import Direction, RecordKey
from lasagna.trust.records import (
    MAX_NAME_BYTES,
    MAX_RECORDS_PER_REQUEST,
    MAX_ROW_BYTES,
    MAX_ROWS,
    RECORD_OVERHEAD,
    RecordContext,
    open_record_into,
    require_record_budget,
    seal_record,
    seal_record_into,
)
from lasagna.trust.request import RequestScope

SCOPE = RequestScope(service_id=b"s" * 16, model_digest=b"m" * 32, request_id=b"r" * 16)
CONTEXT = RecordContext(
    scope=SCOPE,
    direction=Direction.ACTIVATION,
    tensor="conv1",
    dtype="float32",
    row_shape=(2, 3),
    rows=4,
    variant="nchwc8",
    boundary=1,
)
RAW_KEY = b"k" * 32
KEYS = {direction: RecordKey(direction, AESGCM(RAW_KEY)) for direction in Direction}
KEY = KEYS[Direction.ACTIVATION]
ROW = bytes(range(24))
NONCE = b"n" * 12


def open_record(context: RecordContext, row: int, record: bytes) -> bytes:
    out = bytearray(context.row_bytes)
    open_record_into(KEYS[context.direction], context, row, record, memoryview(out))
    return bytes(out)


def test_a_row_opens_where_it_was_sealed_for() -> None:
    record = seal_record(KEY, CONTEXT, 3, ROW, NONCE)
    assert len(record) == CONTEXT.record_bytes == len(ROW) + RECORD_OVERHEAD
    assert open_record(CONTEXT, 3, record) == ROW


def test_the_wire_format_is_as_documented() -> None:
    """Checked by hand with AES-GCM, label and lengths written out."""
    record = seal_record(KEY, CONTEXT, 3, ROW, NONCE)
    aad = canonical(
        "lasagna/v1/record",
        b"activation",
        b"s" * 16 + b"m" * 32 + b"r" * 16,
        b"nchwc8",
        u32(1),
        b"conv1",
        b"float32",
        u32(2) + u32(3),
        u32(4),
    ) + u32(3)
    assert record[:13] == b"\x01" + NONCE
    assert AESGCM(RAW_KEY).decrypt(NONCE, record[13:], aad) == ROW


def test_sealing_into_memory_gives_the_same_bytes() -> None:
    out = bytearray(CONTEXT.record_bytes + 10)
    seal_record_into(KEY, CONTEXT, 0, ROW, NONCE, memoryview(out)[5:-5])
    assert out == bytes(5) + seal_record(KEY, CONTEXT, 0, ROW, NONCE) + bytes(5)


def test_typed_buffers_are_rows_too() -> None:
    floats = memoryview(bytearray(ROW)).cast("f", (2, 3))
    record = seal_record(KEY, CONTEXT, 0, floats, NONCE)
    out = memoryview(bytearray(24)).cast("f", (2, 3))
    open_record_into(KEY, CONTEXT, 0, memoryview(b"??" + record)[2:], out)
    assert out == floats


def contexts() -> st.SearchStrategy[RecordContext]:
    scope = st.builds(
        RequestScope,
        service_id=st.sampled_from([b"a" * 16, b"b" * 16]),
        model_digest=st.sampled_from([b"a" * 32, b"b" * 32]),
        request_id=st.sampled_from([b"a" * 16, b"b" * 16]),
    )
    names = st.text(st.sampled_from("ab1é\0"), min_size=1, max_size=3)
    activation = st.fixed_dictionaries(
        {
            "direction": st.just(Direction.ACTIVATION),
            "variant": names,
            "boundary": st.integers(0, 2**32 - 1),
        }
    )
    outer = st.fixed_dictionaries(
        {"direction": st.sampled_from([Direction.INPUT, Direction.OUTPUT])}
    )
    common = st.fixed_dictionaries(
        {
            "scope": scope,
            "tensor": names,
            "dtype": st.sampled_from(["float32", "int32", "uint8", "int8"]),
            "row_shape": st.lists(st.integers(1, 3), max_size=3).map(tuple),
            "rows": st.integers(1, MAX_ROWS),
        }
    )
    return st.builds(
        lambda fields, kind: RecordContext(**fields, **kind), common, activation | outer
    )


@settings(deadline=None)
@given(contexts(), contexts(), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_distinct_places_have_distinct_associated_data(
    one: RecordContext, other: RecordContext, row: int, other_row: int
) -> None:
    same = one == other and row == other_row
    assert (one.aad_prefix + u32(row) == other.aad_prefix + u32(other_row)) == same


@settings(deadline=None)
@given(contexts(), st.data())
def test_changing_one_field_changes_the_associated_data(
    context: RecordContext, data: st.DataObject
) -> None:
    other = data.draw(contexts())
    field = data.draw(st.sampled_from(["scope", "tensor", "dtype", "row_shape", "rows"]))
    changes: dict[str, Any] = {field: getattr(other, field)}
    changed = replace(context, **changes)
    assert (changed.aad_prefix == context.aad_prefix) == (changed == context)


@settings(deadline=None)
@given(contexts(), st.data())
def test_every_row_of_every_context_opens_there(
    context: RecordContext, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, context.rows - 1))
    plaintext = data.draw(st.binary(min_size=context.row_bytes, max_size=context.row_bytes))
    record = seal_record(KEYS[context.direction], context, row, plaintext, NONCE)
    assert open_record(context, row, record) == plaintext


CHANGES: list[tuple[str, Any]] = [
    ("tensor", "conv2"),
    ("dtype", "int32"),
    ("row_shape", (3, 2)),
    ("row_shape", (6,)),
    ("rows", 5),
    ("variant", "nchwc16"),
    ("boundary", 2),
    ("scope", replace(SCOPE, service_id=b"t" * 16)),
    ("scope", replace(SCOPE, model_digest=b"n" * 32)),
    ("scope", replace(SCOPE, request_id=b"q" * 16)),
]


@pytest.mark.parametrize(("field", "value"), CHANGES)
def test_a_record_does_not_open_in_any_other_place(field: str, value: Any) -> None:
    record = seal_record(KEY, CONTEXT, 1, ROW, NONCE)
    with pytest.raises(RecordError, match="does not open"):
        open_record(replace(CONTEXT, **{field: value}), 1, record)


def test_a_record_does_not_open_as_another_row() -> None:
    record = seal_record(KEY, CONTEXT, 1, ROW, NONCE)
    with pytest.raises(RecordError, match="row 2 of an activation at cut 1 of request"):
        open_record(CONTEXT, 2, record)


def test_an_input_is_not_an_output_even_under_one_key() -> None:
    given_ = replace(CONTEXT, direction=Direction.INPUT, variant="", boundary=0)
    record = seal_record(KEYS[Direction.INPUT], given_, 1, ROW, NONCE)
    with pytest.raises(RecordError, match="does not open"):
        open_record(replace(given_, direction=Direction.OUTPUT), 1, record)


@pytest.mark.parametrize("place", [0, 1, 12, 13, 30, 36, 37, 52])
def test_a_changed_record_does_not_open(place: int) -> None:
    record = bytearray(seal_record(KEY, CONTEXT, 1, ROW, NONCE))
    record[place] ^= 1
    with pytest.raises(RecordError):
        open_record(CONTEXT, 1, bytes(record))


def test_a_forged_record_leaves_no_plaintext_behind() -> None:
    """OpenSSL writes the plaintext before it checks the tag: here that would be the row itself."""
    record = bytearray(seal_record(KEY, CONTEXT, 1, ROW, NONCE))
    record[-1] ^= 1
    out = bytearray(b"\xff" * 24)
    with pytest.raises(RecordError):
        open_record_into(KEY, CONTEXT, 1, record, memoryview(out))
    assert out == bytes(24)


@pytest.mark.parametrize("size", [0, 1, 28, 29, 52, 54, 10**6])
def test_a_record_has_exactly_one_size(size: int) -> None:
    with pytest.raises(RecordError, match=f"has 53 bytes, not {size}"):
        open_record(CONTEXT, 0, b"\x01" * size)


def test_a_record_of_a_later_version_is_named_as_such() -> None:
    with pytest.raises(RecordError, match="version 2; known is 1"):
        open_record(CONTEXT, 0, b"\x02" * 53)


@settings(deadline=None)
@given(st.binary(max_size=80) | st.binary(min_size=53, max_size=53).map(lambda b: b"\x01" + b[1:]))
def test_property_any_bytes_open_as_sealed_or_raise_record_error(record: bytes) -> None:
    with pytest.raises(RecordError):
        open_record(CONTEXT, 0, record)


@pytest.mark.parametrize("row", [-1, 4, 2**32])
def test_only_rows_of_the_request_are_sealed_or_opened(row: int) -> None:
    record = seal_record(KEY, CONTEXT, 0, ROW, NONCE)
    with pytest.raises(RecordError, match="not among the request's 4"):
        seal_record(KEY, CONTEXT, row, ROW, NONCE)
    with pytest.raises(RecordError, match="not among the request's 4"):
        open_record(CONTEXT, row, record)


def test_a_record_in_memory_that_may_be_shared_is_refused() -> None:
    """AES-GCM reads a ciphertext twice; what the host changes in between would pass."""
    record = seal_record(KEY, CONTEXT, 0, ROW, NONCE)
    out = memoryview(bytearray(24))
    with mmap.mmap(-1, len(record)) as shared:
        shared[:] = record
        with pytest.raises(UsageError, match="copy it into bytes"):
            open_record_into(KEY, CONTEXT, 0, shared, out)
        open_record_into(KEY, CONTEXT, 0, bytes(shared), out)
    assert out == ROW


@pytest.mark.parametrize("size", [0, 8, 11, 13, 16])
def test_sealing_refuses_a_nonce_of_another_length(size: int) -> None:
    with pytest.raises(UsageError, match="12 bytes"):
        seal_record(KEY, CONTEXT, 0, ROW, bytes(size))


def test_sealing_the_same_place_again_with_fresh_nonces_never_repeats() -> None:
    """A task retried in another batch gives slightly different rows for the same place."""
    records = [seal_record(KEY, CONTEXT, 0, ROW, os.urandom(12)) for _ in range(1000)]
    assert len({record[1:13] for record in records}) == 1000
    assert len({record[13:] for record in records}) == 1000
    assert all(open_record(CONTEXT, 0, record) == ROW for record in records[:10])


def test_why_nonces_are_not_made_from_the_place() -> None:
    """What a deterministic nonce would do to a retried task: both rows' difference is public."""
    retried = bytes(byte ^ 1 for byte in ROW)
    one = seal_record(KEY, CONTEXT, 0, ROW, NONCE)
    other = seal_record(KEY, CONTEXT, 0, retried, NONCE)
    leaked = bytes(a ^ b for a, b in zip(one[13:-16], other[13:-16], strict=True))
    assert leaked == b"\x01" * 24


@pytest.mark.parametrize("size", [0, 23, 25])
def test_sealing_refuses_a_row_of_another_size(size: int) -> None:
    with pytest.raises(UsageError, match="24 contiguous bytes"):
        seal_record(KEY, CONTEXT, 0, bytes(size), NONCE)


def test_memory_that_does_not_fit_is_refused() -> None:
    record = seal_record(KEY, CONTEXT, 0, ROW, NONCE)
    for out in (
        memoryview(bytearray(23)),
        memoryview(bytearray(25)),
        memoryview(bytearray(48))[::2],
        memoryview(bytes(24)),
    ):
        with pytest.raises(UsageError, match="contiguous writable"):
            open_record_into(KEY, CONTEXT, 0, record, out)
    with pytest.raises(UsageError, match="contiguous writable"):
        seal_record_into(KEY, CONTEXT, 0, ROW, NONCE, memoryview(bytearray(52)))
    with pytest.raises(UsageError, match="contiguous"):
        seal_record(KEY, CONTEXT, 0, memoryview(bytearray(48))[::2], NONCE)


@pytest.mark.parametrize("direction", [Direction.INPUT, Direction.OUTPUT])
def test_an_activation_is_never_sealed_under_a_key_that_the_client_has(
    direction: Direction,
) -> None:
    with pytest.raises(UsageError, match=f"{direction} records is used for activation"):
        seal_record(KEYS[direction], CONTEXT, 0, ROW, NONCE)


def test_errors_name_inputs_but_nothing_inside_the_network() -> None:
    """The host reads an enclave's errors, and inner names are encrypted in the package."""
    at_input = replace(CONTEXT, direction=Direction.INPUT, variant="", boundary=0)
    for context, named in ((CONTEXT, False), (at_input, True)):
        for record in (bytes(52), bytes(53), b"\x01" + bytes(52)):
            with pytest.raises(RecordError) as caught:
                open_record_into(KEYS[context.direction], context, 0, record, bytearray(24))
            assert (context.tensor in str(caught.value)) == (named and record != bytes(53))


REFUSED: list[dict[str, Any]] = [
    {"rows": 0},
    {"rows": MAX_ROWS + 1},
    {"boundary": -1},
    {"boundary": 2**32},
    {"variant": ""},
    {"variant": "v" * (MAX_NAME_BYTES + 1)},
    {"tensor": ""},
    {"tensor": "t" * (MAX_NAME_BYTES + 1)},
    {"tensor": "\ud800"},
    {"dtype": "object"},
    {"dtype": ">f4"},
    {"row_shape": (0,)},
    {"row_shape": (-1, -1)},
    {"row_shape": (1,) * 9},
    {"row_shape": (MAX_ROW_BYTES,)},
    {"row_shape": (2**62, 4)},
    {"direction": Direction.INPUT},
    {"direction": Direction.INPUT, "variant": ""},
    {"direction": Direction.OUTPUT, "boundary": 0},
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_a_context_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        replace(CONTEXT, **changes)


def test_a_request_has_a_budget_of_records() -> None:
    require_record_budget(MAX_ROWS, MAX_RECORDS_PER_REQUEST // MAX_ROWS)
    with pytest.raises(RecordError, match="split it"):
        require_record_budget(MAX_ROWS, MAX_RECORDS_PER_REQUEST // MAX_ROWS + 1)


def test_the_budget_leaves_room_under_the_bound_of_sp_800_38d() -> None:
    assert MAX_RECORDS_PER_REQUEST * 4096 == 2**32
