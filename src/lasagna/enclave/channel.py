"""The socket to the host: frames in, replies out."""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from lasagna.enclave import frames
from lasagna.enclave.messages import Reply


@dataclass(slots=True)
class Frame:
    """One message as it came.

    Attributes:
        body: its bytes.
    """

    body: memoryview
    _memory: bytearray | None = None
    _home: queue.Queue[bytearray] | None = None

    def release(self) -> None:
        """Nobody reads it any more; again if need be."""
        memory, self._memory = self._memory, None
        if memory is not None and self._home is not None:
            self._home.put(memory)


class Channel:
    """Both directions. One thread receives, any may send.

    Runs bring the ciphertext of whole batches. It lies in memory that the plan has set aside for
    it, used again and again: each batch in memory of its own would grow the enclave beyond its plan
    (docs/experiments/0006-where-two-threads-lost-time.md).
    """

    def __init__(self, connection: socket.socket, limit: int) -> None:
        """Nothing is set aside.

        Args:
            connection: to the host.
            limit: longest frame accepted.
        """
        self._socket = connection
        self._limit = limit
        self._sending = threading.Lock()
        self._free: queue.Queue[bytearray] = queue.Queue()
        self._size = 0

    def provide(self, memories: Sequence[bytearray]) -> None:
        """Set memory aside for frames instead of what was; nobody may hold a frame."""
        self._free = queue.Queue()
        self._size = min(map(len, memories), default=0)
        for memory in memories:
            self._free.put(memory)

    def receive(self) -> Frame | None:
        """The next frame, or None when the host has closed the connection.

        What is larger than the memory set aside gets memory of its own. Else it may wait until a
        run that came before has opened its rows.

        Raises:
            ProtocolError: it announces more than the limit.
        """
        head = memoryview(bytearray(frames.LENGTH.size))
        if not self._fill(head):
            return None
        length = frames.frame_length(head, self._limit)
        if not frames.SMALL < length <= self._size:
            frame = Frame(memoryview(bytearray(length)))
        else:
            memory = self._free.get()
            frame = Frame(memoryview(memory)[:length], memory, self._free)
        return frame if self._fill(frame.body) else None

    def send(self, reply: Reply) -> None:
        """Send a reply; a host that is gone is noticed by who receives."""
        frame = frames.encode_frame(reply)
        with self._sending:
            try:
                self._socket.sendall(frame)
            except OSError:
                return

    def _fill(self, view: memoryview) -> bool:
        """Read exactly so many bytes; False at the end of the connection."""
        while view:
            got = self._socket.recv_into(view)
            if got == 0:
                return False
            view = view[got:]
        return True
