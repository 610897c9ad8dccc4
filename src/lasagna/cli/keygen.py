"""``lasagna keygen``, and how every command writes files with keys in them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lasagna.errors import UsageError
from lasagna.secret_file import read_private

PRIVATE = 0o600
PUBLIC = 0o644


def keygen(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("owner.pem"),
) -> None:
    """Make a model owner's signing key.

    It signs what `lasagna seal` writes. Whoever has it can publish models in your name: keep it
    where you seal, and nowhere else. An existing file is never replaced.
    """
    typer.echo(f"wrote {path}; its public key is {owner_public_key(create_owner_key(path)).hex()}")


def create_owner_key(path: Path) -> Ed25519PrivateKey:
    """Draw a key and write it as PEM (PKCS #8), for its owner's eyes only.

    Raises:
        UsageError: the file exists, or can't be written.
    """
    key = Ed25519PrivateKey.generate()
    try:
        with staged(path, PRIVATE, replace=False) as temporary:
            temporary.write_bytes(encode_owner_key(key))
    except FileExistsError:
        raise UsageError(f"{path} exists; a key is never replaced, choose another file") from None
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None
    return key


def encode_owner_key(key: Ed25519PrivateKey) -> bytes:
    """The key as PEM, in the clear: write it readable for its owner only."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_owner_key(path: Path) -> Ed25519PrivateKey:
    """Read an owner's signing key.

    Raises:
        UsageError: it can't be read, is no Ed25519 key in PEM, or others may read it too.
    """
    data = read_private(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise UsageError(
            f"{path} has a passphrase, which isn't supported: decrypt it to a file that only "
            "you can read"
        ) from None
    except ValueError:
        raise UsageError(f"{path} is no private key in PEM") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"{path} is no Ed25519 key; `lasagna keygen` makes one")
    return key


def owner_public_key(key: Ed25519PrivateKey) -> bytes:
    """The 32 bytes that a package's signature is verified with."""
    return key.public_key().public_bytes_raw()


@contextmanager
def staged(path: Path, mode: int, *, replace: bool) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place when the block ends well.

    The file has its mode from its first byte on, and is gone when the block fails.

    Args:
        path: the file to write.
        mode: its permissions; the umask can take some away.
        replace: whether an existing file may go.

    Raises:
        FileExistsError: it may not, and there is one.
        OSError: as files do.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "rb"):
            os.fchmod(handle, mode & ~umask)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            path.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)
