"""Promise: any bytes are a command or a ProtocolError, and no frame exceeds its limit."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.enclave import messages as m
from lasagna.errors import (
    BudgetError,
    KeyRefusedError,
    ProtocolError,
    RecordError,
    UsageError,
)

SAMPLE = m.Infer(
    7,
    bytes(32),
    (m.SealedRows(bytes(16), b"capsule", 1, ((memoryview(b"record"),),)),),
)


def body(message: m.Command | m.Reply) -> bytes:
    return bytes(m.encode_frame(message)[m.LENGTH.size :])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_command_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        m.decode_command(data)


@given(st.data())
def test_a_changed_command_is_a_command_or_a_protocol_error(data: st.DataObject) -> None:
    sample = bytearray(body(SAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        sample[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        m.decode_command(sample)


@pytest.mark.parametrize(
    "command",
    [
        SAMPLE,
        m.Attest(1, b"nonce"),
        m.RequestKeys(2, "/p"),
        m.Load(3, b"grant", 4),
        m.GetStats(5),
        m.Stop(6),
    ],
)
def test_commands_survive_the_journey(command: m.Command) -> None:
    frame = m.encode_frame(command)
    assert m.frame_length(frame[: m.LENGTH.size], 10**6) == len(frame) - m.LENGTH.size
    assert body(m.decode_command(frame[m.LENGTH.size :])) == body(command)


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="the limit is 1000"):
        m.frame_length(m.LENGTH.pack(1001), 1000)


def test_a_deeply_nested_message_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        m.decode_command(b"\x91" * 100_000)


def test_an_error_crosses_as_the_nearest_class_that_the_host_knows() -> None:
    assert m.error_kind(BudgetError("")) == "BudgetError"
    assert m.error_kind(RecordError("")) == m.error_kind(KeyRefusedError("")) == "TrustError"
    assert m.error_kind(UsageError("")) == "EnclaveError"
