"""What ``weights`` is about: pieces, the slots that hold them, and the runs that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from lasagna.enclave.pool import Memory
from lasagna.errors import LasagnaError, PackageError
from lasagna.package.format import SliceFacts, weight_chunks
from lasagna.package.reader import OpenPackage

NEVER: Final = 1 << 40
"""Distance of a piece that no announced run needs."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One slice's weights in its package.

    Attributes:
        model: digest of the model, slice: number in it.
        package: where they come from.
        size: bytes in memory.
        chunks: (section, chunk, begin, end), see ``package.format.weight_chunks``.
    """

    model: bytes
    slice: int
    package: OpenPackage
    size: int
    chunks: tuple[tuple[int, int, int, int], ...]


def pieces_of(
    model: bytes, package: OpenPackage, slices: Sequence[SliceFacts]
) -> tuple[Piece, ...]:
    """All slices of a model."""
    return tuple(
        Piece(
            model,
            number,
            package,
            facts.weight_bytes,
            tuple(weight_chunks(package.manifest, facts)),
        )
        for number, facts in enumerate(slices)
    )


@dataclass(slots=True, eq=False)
class Slot:
    """Memory for weights, of the ring or a pinned slice's own, in one of these states.

    ==========  =====  =======  ==========  =====  ==============================================
    state       holds  missing  next_chunk  error  leaves it
    ==========  =====  =======  ==========  =====  ==============================================
    free        -1     0        0                  ``Ring.claim``: to filling
    filling     piece  > 0      < chunks           ``Ring.take_chunk`` of the last one: to finishing
    finishing   piece  > 0      chunks             ``Weights._fill`` of the last one: to ready
    ready       piece  0        chunks             ``Ring.claim`` for another piece, without users
    broken      piece  >= 0     chunks      set    ``release`` by who was told, or ``Ring.claim``
    ==========  =====  =======  ==========  =====  ==============================================

    ``missing`` counts chunks that are not decrypted, ``users`` threads between acquire and release.
    From filling or finishing, a chunk that does not open leads to broken. A slot stays broken until
    somebody needs its piece and is told; were it freed at once, the loader would try it again and
    again. A pinned slice's slot is made ready and never claimed.
    """

    memory: Memory
    holds: int = -1
    users: int = 0
    next_chunk: int = 0
    missing: int = 0
    error: PackageError | None = None

    @property
    def ready(self) -> bool:
        """Whether a run may read it."""
        return self.holds >= 0 and self.missing == 0 and self.error is None


@dataclass(slots=True, eq=False)
class Course:
    """An announced run: it needs pieces ``at`` to ``last``, exclusive, in order."""

    at: int
    last: int
    running: bool = False


@dataclass(slots=True)
class Courses:
    """Runs that were announced, in order, until they are over.

    Steps are slices run. Those of runs under way come first and side by side, the others' follow
    them, one run after the other.
    """

    announced: list[Course] = field(default_factory=list)

    def starts(self) -> list[tuple[int, Course]]:
        """Each run, and how many steps lie before what it needs first."""
        found, offset = [(0, course) for course in self.announced if course.running], 0
        if found:
            offset = min(course.last - course.at for _, course in found)
        for course in self.announced:
            if not course.running:
                found.append((offset, course))
                offset += course.last - course.at
        return found

    def distance(self, piece: int) -> int:
        """Steps until a run needs this piece."""
        return min(
            (
                offset + piece - course.at
                for offset, course in self.starts()
                if course.at <= piece < course.last
            ),
            default=NEVER,
        )

    def behind(self, held: int, piece: int) -> bool:
        """Whether a run on the same way, behind who wants a piece, still needs the one held.

        It will need the wanted one as well, so who is ahead waits for it, and one load serves both.
        The run that is furthest behind waits for nobody.
        """
        return any(
            course.running and course.at <= held < piece < course.last for course in self.announced
        )


@dataclass(slots=True)
class LoadCounters:
    """What loading has cost so far: slices, bytes, and processor seconds of all threads."""

    loads: int = 0
    loaded_bytes: int = 0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Move:
    """A piece to pin, or to unpin; ``done`` is told when that is done, or why not."""

    piece: int
    pin: bool
    done: Callable[[LasagnaError | None], None]
