"""The EPC emulator from outside: its library, its settings, and whether it runs here.

It protects nothing. It gives any program a hard limit of resident memory, with page traffic and
costs as an SGX enclave has them: see docs/adr/0005-epc-emulator.md.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

import lasagna
from lasagna.errors import LasagnaError, UsageError
from lasagna.tee.epc_profiles import Costs
from lasagna.tee.epc_stats import StatsFile
from lasagna.units import GIB, PAGE, Bytes, format_bytes

CANNOT_START: Final = 125
"""Exit status where a program can't run under the emulator, as with ``env`` and ``timeout``."""
MIN_PAGES: Final = 256
_REGION_PAGES: Final = 64 * GIB // PAGE
_FILE: Final = "liblasagna_epc.so"
_PROBE_TIMEOUT_S: Final = 20.0


def emulator_library() -> Path:
    """The shared library that LD_PRELOAD brings into a process.

    Raises:
        LasagnaError: it was not built.
    """
    for folder in lasagna.__path__:
        path = Path(folder) / _FILE
        if path.is_file():
            return path
    raise LasagnaError(
        f"{_FILE} was not built: it needs Linux on x86-64 or aarch64 and OpenSSL's headers "
        "(apt install libssl-dev); then install Lasagna again"
    )


def emulator_environment(
    costs: Costs,
    stats: Path | None = None,
    limit_pages: int | None = None,
    *,
    keep: bool = False,
) -> dict[str, str]:
    """Variables that make a program run under the emulator.

    Args:
        costs: from a profile.
        stats: the folder for its statistics; without one nobody can read them.
        limit_pages: resident pages allowed, if not the profile's.
        keep: leave the file of statistics behind when the process ends.

    Raises:
        LasagnaError: the library was not built.
        UsageError: the limit is too small, or the folder's name can't be handed over.
    """
    pages = costs.limit_pages if limit_pages is None else limit_pages
    if not MIN_PAGES <= pages <= _REGION_PAGES:
        raise UsageError(
            f"the limit must be {format_bytes(MIN_PAGES * PAGE)} to "
            f"{format_bytes(_REGION_PAGES * PAGE)}, not {format_bytes(pages * PAGE)}"
        )
    items = {
        "limit_pages": pages,
        "region_pages": _REGION_PAGES,
        "load_ns": costs.load_ns,
        "add_ns": costs.add_ns,
        "evict_ns": costs.evict_ns,
        "entry_ns": costs.entry_ns,
    }
    text = ",".join(f"{name}={value}" for name, value in items.items())
    if stats is not None:
        if "," in str(stats):
            raise UsageError(f"a folder for statistics must not have a comma in its name: {stats}")
        text += f",stats={stats},keep={int(keep)}"
    library = str(emulator_library())
    if " " in library or ":" in library:
        raise LasagnaError(
            f"a library with a blank or a colon in its path can't be used: {library}"
        )
    return {"LD_PRELOAD": library, "LASAGNA_EPC": text}


def stats_folder() -> Path:
    """Where emulated processes of this user tell what they do; made if missing.

    Raises:
        LasagnaError: somebody else's folder is in its place.
    """
    memory = Path("/dev/shm")  # noqa: S108 - a folder of one's own, checked below
    base = memory if memory.is_dir() else Path(tempfile.gettempdir())
    folder = base / f"lasagna-epc-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise LasagnaError(f"{folder} is not a folder of yours alone: remove it")
    return folder


@cache
def why_not() -> str | None:
    """Why the emulator does not run here, found by trying; None if it does."""
    free = Costs(Bytes(MIN_PAGES * PAGE), 0, 0, 0, 0)
    try:
        with tempfile.TemporaryDirectory(prefix="lasagna-epc-") as folder:
            environment = os.environ | emulator_environment(free, Path(folder), keep=True)
            done = subprocess.run(
                ["/bin/true"],
                env=environment,
                check=True,
                capture_output=True,
                text=True,
                timeout=_PROBE_TIMEOUT_S,
            )
            # The dynamic linker only warns of a library that it can't preload.
            if not any(StatsFile(path).started for path in Path(folder).iterdir()):
                return (done.stderr or "").strip() or "the library was not preloaded"
    except LasagnaError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return (error.stderr or "").strip() or f"a probe ended with status {error.returncode}"
    except (subprocess.TimeoutExpired, OSError) as error:
        return f"a probe did not run: {error}"
    return None
