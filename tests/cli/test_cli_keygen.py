from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from typer.testing import CliRunner, Result

from lasagna.cli import main
from lasagna.cli.keygen import (
    PRIVATE,
    PUBLIC,
    create_owner_key,
    owner_public_key,
    read_owner_key,
    staged,
)
from lasagna.errors import UsageError
from lasagna.secret_file import MAX_SECRET_BYTES, read_private


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main.app, ["keygen", *arguments])


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def pem(key: Ed25519PrivateKey | X25519PrivateKey, password: bytes | None = None) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption(),
    )


def test_keygen_writes_a_key_and_tells_its_public_half(tmp_path: Path) -> None:
    path = tmp_path / "owner.pem"
    result = run(str(path))

    assert result.exit_code == 0
    assert owner_public_key(read_owner_key(path)).hex() in result.stdout
    assert pem(read_owner_key(path)) == path.read_bytes()
    assert [one.name for one in tmp_path.iterdir()] == ["owner.pem"]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_key_is_for_its_owners_eyes(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        create_owner_key(tmp_path / "owner.pem")
    finally:
        os.umask(before)

    assert mode(tmp_path / "owner.pem") == 0o600


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "owner.pem"
    path.write_bytes(b"precious")
    result = run(str(path))

    assert result.exit_code == 2
    assert "exists; a key is never replaced" in result.stderr
    assert path.read_bytes() == b"precious"


def test_two_keys_differ(tmp_path: Path) -> None:
    one, other = (create_owner_key(tmp_path / name) for name in "ab")

    assert owner_public_key(one) != owner_public_key(other)


def test_missing_folder(tmp_path: Path) -> None:
    result = run(str(tmp_path / "none" / "owner.pem"))

    assert (result.exit_code, result.stdout) == (2, "")
    assert "No such file or directory" in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no private key in PEM"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no private key"),
        (pem(X25519PrivateKey.generate()), "is no Ed25519 key"),
        (pem(Ed25519PrivateKey.generate(), b"secret"), "has a passphrase"),
    ],
)
def test_files_that_are_no_owner_key(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "owner.pem"
    path.touch(0o600)
    path.write_bytes(content)

    with pytest.raises(UsageError, match=message):
        read_owner_key(path)


def test_missing_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"can't read .*owner.pem: No such file"):
        read_owner_key(tmp_path / "owner.pem")


@pytest.mark.parametrize("permissions", [0o640, 0o620, 0o604, 0o606, 0o644, 0o777])
def test_key_that_others_can_read_is_refused(tmp_path: Path, permissions: int) -> None:
    path = tmp_path / "owner.pem"
    create_owner_key(path)
    path.chmod(permissions)

    with pytest.raises(UsageError, match=f"mode {permissions:04o}.*chmod 600"):
        read_private(path)


def test_file_longer_than_any_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "owner.pem"
    path.touch(0o600)
    path.write_bytes(bytes(MAX_SECRET_BYTES + 1))

    with pytest.raises(UsageError, match="longer than any key"):
        read_private(path)


@pytest.mark.parametrize("permissions", [0o400, 0o600])
def test_key_for_its_owner_alone_is_read(tmp_path: Path, permissions: int) -> None:
    path = tmp_path / "owner.pem"
    create_owner_key(path)
    path.chmod(permissions)

    assert read_private(path) == path.read_bytes()


def test_staged_file_has_its_mode_from_the_beginning(tmp_path: Path) -> None:
    with staged(tmp_path / "key", PRIVATE, replace=False) as temporary:
        assert mode(temporary) == 0o600
        temporary.write_bytes(b"secret")
        assert not (tmp_path / "key").exists()

    assert (mode(tmp_path / "key"), (tmp_path / "key").read_bytes()) == (0o600, b"secret")


def test_staged_public_file_heeds_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "package", PUBLIC, replace=False):
            pass
    finally:
        os.umask(before)

    assert mode(tmp_path / "package") == 0o640


def fail(path: Path, *, replace: bool) -> None:
    with staged(path, PRIVATE, replace=replace) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("replace", [False, True])
def test_failed_block_leaves_nothing(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "key"
    if replace:
        path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        fail(path, replace=replace)

    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"before"] * replace


def test_staged_file_replaces_only_if_it_may(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(FileExistsError), staged(path, PRIVATE, replace=False):
        pass
    assert path.read_bytes() == b"before"

    with staged(path, PRIVATE, replace=True) as temporary:
        temporary.write_bytes(b"after")
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"after"]
