"""Canonical bytes: what is bound by them can't be read as anything else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lasagna.trust.encoding import canonical, u32

LISTS = st.tuples(st.text("ab/", max_size=3), st.lists(st.binary(max_size=3), max_size=4))


def decode(raw: bytes) -> tuple[str, list[bytes], bytes]:
    """The reader that the production code doesn't need: it shows that the encoding is injective."""
    count, raw = int.from_bytes(raw[:4], "big"), raw[4:]
    parts = []
    for _ in range(count):
        size = int.from_bytes(raw[:4], "big")
        parts.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return parts[0].decode(), parts[1:], raw


@settings(deadline=None)
@given(LISTS, st.binary(max_size=4))
def test_the_encoding_can_be_read_back_whatever_follows_it(
    fields: tuple[str, list[bytes]], rest: bytes
) -> None:
    label, values = fields
    assert decode(canonical(label, *values) + rest) == (label, values, rest)


@settings(deadline=None)
@given(LISTS, LISTS)
def test_distinct_lists_have_distinct_bytes_and_none_begins_another(
    one: tuple[str, list[bytes]], other: tuple[str, list[bytes]]
) -> None:
    first, second = canonical(one[0], *one[1]), canonical(other[0], *other[1])
    assert (first == second) == (one == other)
    assert first.startswith(second) == (one == other)


def test_the_layout_is_as_documented() -> None:
    assert canonical("L", b"", b"xy") == (u32(3) + u32(1) + b"L" + u32(0) + u32(2) + b"xy")
