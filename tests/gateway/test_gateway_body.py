"""What may come in as a body, and how answers go out."""

from __future__ import annotations

import contextlib
import gzip
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.errors import InvalidInputError
from lasagna.gateway.body import COMPRESS_FROM, compress, decompress

BODY = b"lasagna " * 1000
ZIPPED = gzip.compress(BODY, mtime=0)  # without the time: it is part of tests' names


@pytest.mark.parametrize("packed", [ZIPPED, zlib.compress(BODY)])
def test_gzip_and_deflate_are_read(packed: bytes) -> None:
    assert decompress(packed, len(BODY)) == BODY


def test_a_bomb_is_refused_without_being_unpacked() -> None:
    bomb = zlib.compress(bytes(50_000_000))
    with pytest.raises(InvalidInputError, match=r"at most 1000 bytes \(1\.00 kB\)"):
        decompress(bomb, 1000)


@pytest.mark.parametrize(
    "packed",
    [b"", b"plain text", ZIPPED[:-1], ZIPPED + b"!", b"\x1f\x8b\x08"],
)
def test_damaged_compression_is_refused(packed: bytes) -> None:
    with pytest.raises(InvalidInputError, match="compressed"):
        decompress(packed, len(BODY))


@given(st.binary(max_size=200))
def test_any_bytes_decompress_or_are_refused(packed: bytes) -> None:
    for body in (packed, zlib.compress(packed), zlib.compress(packed)[:-2]):
        with contextlib.suppress(InvalidInputError):
            assert len(decompress(body, 100)) <= 100


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("br, gzip;q=0.5", "gzip"),
        ("gzip;q=0, deflate", "deflate"),
        ("GZIP", "gzip"),
        ("*", "gzip"),
        ("identity", None),
        ("br", None),
        ("", None),
    ],
)
def test_answers_are_compressed_as_the_client_likes(accepted: str, encoding: str | None) -> None:
    packed, used = compress(BODY, accepted)
    assert used == encoding
    assert (decompress(packed, len(BODY)) if used else packed) == BODY


def test_short_answers_stay_as_they_are() -> None:
    assert compress(bytes(COMPRESS_FROM - 1), "gzip")[1] is None
