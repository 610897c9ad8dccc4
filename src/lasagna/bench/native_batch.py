"""Plain ONNX Runtime with dynamic batching: what unprotected inference takes of the same load."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import onnxruntime as ort

from lasagna.models.graph import Array

BATCHES: Final = (1, 2, 4, 8, 16, 32)
CALIBRATE_S: Final = 0.6
ENOUGH: Final = 0.99
"""Of the best rate: beyond it a larger batch only makes everybody wait, and measuring harder."""


class NativeBatcher:
    """Takes what waits for one model, up to its best batch, whenever a thread is free.

    Attributes:
        best: the smallest batch of each model that gave nearly most rows a second on one thread.
    """

    def __init__(
        self,
        sessions: Mapping[str, ort.InferenceSession],
        inputs: Mapping[str, Mapping[str, Array]],
        threads: int,
    ) -> None:
        """Find the best batch sizes, which takes some seconds.

        Args:
            sessions: of one thread each; several threads may run one at once.
            inputs: of one row of each model.
            threads: that compute.
        """
        self._sessions = sessions
        self._free = threads
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: deque[tuple[str, asyncio.Future[None]]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._feeds = {
            name: {
                rows: {key: np.concatenate([value] * rows) for key, value in one.items()}
                for rows in range(1, BATCHES[-1] + 1)
            }
            for name, one in inputs.items()
        }
        self.best = {name: self._calibrate(name) for name in sessions}

    async def infer(self, model: str) -> None:
        """Answer one request of one row."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((model, done))
        self._start()
        await done

    async def idle(self) -> None:
        """Forget who no longer waits, and let what runs end."""
        self._waiting.clear()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self) -> None:
        while self._free and self._waiting:
            model = self._waiting[0][0]
            chosen = [one for one in self._waiting if one[0] == model][: self.best[model]]
            for one in chosen:
                self._waiting.remove(one)
            self._free -= 1
            self._begin(model, [done for _, done in chosen])

    def _begin(self, model: str, batch: list[asyncio.Future[None]]) -> None:
        task = asyncio.create_task(self._run(model, batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, model: str, batch: list[asyncio.Future[None]]) -> None:
        loop = asyncio.get_running_loop()
        feeds = self._feeds[model][len(batch)]
        await loop.run_in_executor(self._pool, self._sessions[model].run, None, feeds)
        self._free += 1
        for done in batch:
            if not done.done():
                done.set_result(None)
        self._start()

    def _calibrate(self, model: str) -> int:
        rates = {}
        for rows in BATCHES:
            feeds = self._feeds[model][rows]
            self._sessions[model].run(None, feeds)
            begin, count = time.perf_counter(), 0
            while time.perf_counter() - begin < CALIBRATE_S:
                self._sessions[model].run(None, feeds)
                count += rows
            rates[rows] = count / (time.perf_counter() - begin)
        enough = ENOUGH * max(rates.values())
        return min(rows for rows in BATCHES if rates[rows] >= enough)
