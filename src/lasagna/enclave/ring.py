"""What the slots of the ring hold, and which chunk is to be decrypted next. No threads, no locks.

``weights`` calls all of it with its lock held.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from lasagna.enclave.pieces import NEVER, Courses, Piece, Slot


@dataclass(slots=True)
class Ring:
    """Slots that pieces pass through, and where pieces are, those that stay included.

    Attributes:
        pieces: of all models, numbered through.
        slots: of the ring.
        where: the slot of each piece that is there, or on its way.
        streamed: pieces that pass through the ring, in order.
        courses: announced runs.
        filling: slots with chunks that nobody has taken.
    """

    pieces: Sequence[Piece]
    slots: Sequence[Slot]
    where: dict[int, Slot] = field(default_factory=dict)
    streamed: list[int] = field(init=False)
    courses: Courses = field(default_factory=Courses)
    filling: list[Slot] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Everything is absent."""
        self.streamed = list(range(len(self.pieces)))

    def stay(self, piece: int, slot: Slot) -> None:
        """The piece is in a slot of its own from now on."""
        self.where[piece] = slot
        self.streamed.remove(piece)

    def pass_through(self, piece: int, slot: Slot) -> None:
        """The piece gives up that slot, and passes through the ring again."""
        if self.where.get(piece) is slot:
            del self.where[piece]
        self.streamed.insert(bisect_left(self.streamed, piece), piece)

    def started(self) -> tuple[Slot, int, int] | None:
        """A chunk of a piece that is on its way, the one that is needed first; or nothing."""
        while self.filling:
            slot = min(self.filling, key=lambda s: self.courses.distance(s.holds))
            if self.left(slot):
                return slot, slot.holds, self.take_chunk(slot)
            self.filling.remove(slot)
        return None

    def next_chunk(self) -> tuple[Slot, int, int] | None:
        """A chunk of what is needed next, or nothing."""
        if (begun := self.started()) is not None:
            return begun
        nearest = self._nearest_absent()
        claimed = None if nearest is None else self.claim(nearest, urgent=False)
        if nearest is None or claimed is None:
            return None
        return claimed, nearest, self.take_chunk(claimed)

    def _nearest_absent(self) -> int | None:
        """The absent piece that any run needs next; a few steps, as few slots hold pieces."""
        best, best_distance = None, NEVER
        for offset, course in self.courses.starts():
            at = bisect_left(self.streamed, course.at)
            for piece in self.streamed[at : at + len(self.slots) + 1]:
                distance = offset + piece - course.at
                if piece >= course.last or distance >= best_distance:
                    break
                if piece not in self.where:
                    best, best_distance = piece, distance
                    break
        return best

    def _slot_distance(self, slot: Slot) -> int:
        """Steps until a run needs what the slot holds; what was pinned meanwhile is not needed."""
        needed = slot.holds >= 0 and self.where.get(slot.holds) is slot
        return self.courses.distance(slot.holds) if needed else NEVER

    def claim(self, piece: int, *, urgent: bool) -> Slot | None:
        """The slot for an absent piece, or nothing while all are needed sooner.

        Its own slot, the same one each time, if that will do: at the same address its graph is
        bound to it once. Else the one whose piece is needed last.
        """
        own = self.slots[bisect_left(self.streamed, piece) % len(self.slots)]
        limit = -1 if urgent else self.courses.distance(piece)
        chosen, furthest = None, limit
        for slot in (own, *self.slots):
            if slot.users or slot.missing:
                continue
            if urgent and self.courses.behind(slot.holds, piece):
                continue
            distance = self._slot_distance(slot)
            if distance > furthest:
                chosen, furthest = slot, distance
                if slot is own and not urgent:
                    break
        if chosen is None:
            return None
        if chosen.holds >= 0:
            self.empty(chosen)
        chosen.holds = piece
        chosen.next_chunk = 0
        chosen.missing = len(self.pieces[piece].chunks)
        self.where[piece] = chosen
        self.filling.append(chosen)
        return chosen

    def empty(self, slot: Slot) -> None:
        """Nothing is in the slot, whatever was."""
        if self.where.get(slot.holds) is slot:
            del self.where[slot.holds]
        if slot in self.filling:
            self.filling.remove(slot)
        slot.holds, slot.error, slot.missing, slot.next_chunk = -1, None, 0, 0

    def left(self, slot: Slot) -> bool:
        """Whether the slot has a chunk that nobody has taken."""
        return slot.next_chunk < len(self.pieces[slot.holds].chunks)

    def take_chunk(self, slot: Slot) -> int:
        """The next chunk of what is in the slot, for the caller to decrypt."""
        slot.next_chunk += 1
        return slot.next_chunk - 1
