"""Reading files with secrets in them, for the commands and for the key broker."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from lasagna.errors import UsageError
from lasagna.units import KIB

MAX_SECRET_BYTES: Final = 64 * KIB
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO


def read_private(path: Path) -> bytes:
    """Read a file that its owner alone may read.

    Raises:
        UsageError: it can't be read, is longer than any key, or others may read it too.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & _OTHERS:
                raise UsageError(
                    f"{path} is a secret that others may read (mode {mode:04o}): run chmod 600 "
                    f"{path}, and think about who has read it"
                )
            content = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from None
    if len(content) > MAX_SECRET_BYTES:
        raise UsageError(f"{path} is longer than any key: at most {MAX_SECRET_BYTES} bytes")
    return content
