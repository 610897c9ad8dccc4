"""Files that a command writes at its end: what can't be written is said before the work begins."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lasagna.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI: Final = 120


def check_writable(*files: Path | None) -> None:
    """Check where these files are to be.

    Raises:
        UsageError: one is a folder, or is to be in a folder that is not there.
    """
    for file in filter(None, files):
        try:
            if file.is_dir():
                raise UsageError(f"can't write {file}: it is a folder")
            if not file.parent.is_dir():
                raise UsageError(f"can't write {file}: there is no folder {file.parent}")
        except OSError as error:  # such as a name that is too long
            raise UsageError(f"can't write {file}: {error.strerror}") from None


def check_drawable(picture: Path | None) -> None:
    """Check also that a picture's ending is that of a format.

    Raises:
        UsageError: it is not, or as of ``check_writable``.
    """
    check_writable(picture)
    if picture:
        from matplotlib.backend_bases import FigureCanvasBase  # with a library of some size

        endings = sorted(FigureCanvasBase.get_supported_filetypes())
        if _ending(picture) not in endings:
            raise UsageError(f"can't draw {picture}: it must end with one of {', '.join(endings)}")


def write_file(path: Path, content: bytes) -> None:
    """Write a report, with a line's end.

    Raises:
        UsageError: it can't be written.
    """
    try:
        path.write_bytes(content + b"\n")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None


def write_figure(path: Path, figure: Figure) -> None:
    """Draw into a file, whose ending chooses the format; a PNG without one.

    Raises:
        UsageError: it can't be written.
    """
    drawn = BytesIO()  # a pipe can't be drawn into
    try:
        figure.savefig(drawn, dpi=DPI, format=_ending(path))
        path.write_bytes(drawn.getvalue())
    except (OSError, RuntimeError, ValueError) as error:  # a format may need another program
        raise UsageError(f"can't draw {path}: {error}") from None


def _ending(path: Path) -> str:
    return path.suffix[1:].lower() or "png"
