"""Promise: any bytes are a command or a ProtocolError, and no frame exceeds its limit."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.enclave import messages as m
from lasagna.enclave.frames import (
    LENGTH,
    decode_command,
    encode_frame,
    error_kind,
    frame_length,
)
from lasagna.errors import (
    BudgetError,
    KeyRefusedError,
    ProtocolError,
    RecordError,
    UsageError,
)
from lasagna.package.forms import Form

SEALED = m.SealedRows(bytes(16), b"capsule", 1, ((memoryview(b"record"),),))
SAMPLE = m.Run(7, bytes(32), 0, 3, (m.Part(1, 0, 1, SEALED), m.Part(2, 5, 1)), keep=True)
WISH = m.ModelWish(
    bytes(32), Form.SLICED, (m.StageWish(0, 2, 1, 0), m.StageWish(2, 5, 8, 17)), (0, 3)
)


def body(message: m.Command | m.Reply) -> bytes:
    return bytes(encode_frame(message)[LENGTH.size :])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_command_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        decode_command(data)


@given(st.data())
def test_a_changed_command_is_a_command_or_a_protocol_error(data: st.DataObject) -> None:
    sample = bytearray(body(SAMPLE))
    for _ in range(data.draw(st.integers(1, 4))):
        sample[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ProtocolError):
        decode_command(sample)


@pytest.mark.parametrize(
    "command",
    [
        SAMPLE,
        m.Attest(1, bytes(32), b"nonce"),
        m.RequestKeys(2, "/p"),
        m.Load(3, b"grant"),
        m.Unload(4, bytes(32)),
        m.Arrange(5, (WISH,), 2, 3, 1000, 2, 300, 4000, 50),
        m.Forget(6, 1),
        m.Pin(7, bytes(32), 1),
        m.Unpin(8, bytes(32), 1),
        m.TakeSpans(9, True),
        m.GetStats(10),
        m.Stop(11),
    ],
)
def test_commands_survive_the_journey(command: m.Command) -> None:
    frame = encode_frame(command)
    assert frame_length(frame[: LENGTH.size], 10**6) == len(frame) - LENGTH.size
    assert body(decode_command(frame[LENGTH.size :])) == body(command)


@pytest.mark.parametrize(
    "command",
    [
        m.Run(1, bytes(32), 0, 1, ()),
        m.Run(1, bytes(31), 0, 1, (m.Part(1, 0, 1),)),
        m.Run(1, bytes(32), -1, 1, (m.Part(1, 0, 1),)),
        m.Run(1, bytes(32), 0, 1, (m.Part(-1, 0, 1),)),
        m.Run(1, bytes(32), 0, 1, (m.Part(1, -1, 1),)),
        m.Run(1, bytes(32), 0, 1, (m.Part(1, 0, 0),)),
        m.Run(1, bytes(32), 0, 1, (m.Part(1, 0, 4097),)),
        m.Arrange(1, (WISH,), 0, 1, 0, 0, 0, 0, 0),
        m.Arrange(1, (WISH,), 1, -1, 0, 0, 0, 0, 0),
        m.Arrange(1, (WISH,), 1, 65, 0, 0, 0, 0, 0),
        m.Arrange(1, (WISH,), 1, 0, 2**53 + 1, 0, 0, 0, 0),
        m.Arrange(1, (WISH,), 1, 0, 0, 0, 0, -1, 0),
        m.Pin(1, bytes(32), -1),
        m.Unpin(1, bytes(32), -1),
    ],
)
def test_numbers_out_of_range_are_refused_before_anybody_counts_with_them(
    command: m.Command,
) -> None:
    with pytest.raises(ProtocolError):
        decode_command(body(command))


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match="the limit is 1000"):
        frame_length(LENGTH.pack(1001), 1000)


def test_a_deeply_nested_message_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        decode_command(b"\x91" * 100_000)


def test_an_error_crosses_as_the_nearest_class_that_the_host_knows() -> None:
    assert error_kind(BudgetError("")) == "BudgetError"
    assert error_kind(RecordError("")) == error_kind(KeyRefusedError("")) == "TrustError"
    assert error_kind(UsageError("")) == "EnclaveError"
