"""How a slice's graph is opened in ONNX Runtime: by the enclave to run it, by the owner to measure.

One place, because the measurement is only worth something if both open it alike.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from lasagna.errors import BudgetError, PackageError

_SLACK: Final = 4096
"""The arena's first chunk must be a little smaller than its limit, or it is not granted."""

_NCHWC_PROBE: Final = base64.b64decode(
    "CAg6WgopCgF4EgF5IgxSZW9yZGVySW5wdXQ6E2NvbS5taWNyb3NvZnQubmNod2MSBXByb2JlWhsKAXgS"
    "FgoUCAESEAoCCAEKAghACgIIAQoCCAJiCQoBeRIECgIIAUIECgAQEUIXChNjb20ubWljcm9zb2Z0Lm5j"
    "aHdjEAE="
)
"""An ONNX graph of one node, ReorderInput, from [1, 64, 1, 2] to the NCHWc layout. The enclave has
no library to build graphs with; tests/enclave/test_enclave_sessions.py builds this one again."""


def native_block() -> int:
    """Channels in a block of the NCHWc layout that this processor's kernels use: 8, 16, ...

    Found by asking: blocked memory is [channel block][pixel][channel], so the place of channel 0's
    second pixel is the block. A graph made for another block would run and give nonsense.
    """
    session = ort.InferenceSession(_NCHWC_PROBE, providers=["CPUExecutionProvider"])
    pixels = np.arange(128, dtype=np.float32).reshape(1, 64, 1, 2)
    (blocked,) = session.run(None, {"x": pixels})
    return int(np.flatnonzero(np.asarray(blocked).ravel() == 1.0)[0])


def set_workspace_arena(size: int) -> None:
    """Limit what ONNX Runtime allocates for intermediate results, for all sessions opened later.

    They share one arena of one region of ``size`` bytes: an allocation beyond it fails, nothing
    grows. Sessions opened earlier keep the arena they have.

    Raises:
        BudgetError: ONNX Runtime can't count so far.
    """
    info = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    sizes = {
        "max_mem": size + _SLACK,
        "arena_extend_strategy": 0,  # one region, split and joined as needed
        "initial_chunk_size_bytes": size,
        "max_dead_bytes_per_chunk": 2**30,
    }
    try:
        ort.create_and_register_allocator(info, ort.OrtArenaCfg(sizes))
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        kind = type(error).__name__
        raise BudgetError(f"there is no workspace of {size} bytes ({kind})") from None


def share_threads(threads: int, processors: Sequence[int]) -> None:
    """Let all sessions that this process opens from now on compute with the same threads.

    With a pool for each of its sessions a model in 30 slices would have 30 of them. For good: ONNX
    Runtime makes this pool once, and then opens no session with one of its own.

    Args:
        threads: that compute a layer, the calling one included.
        processors: that the others may use. They inherit them from who makes them.
    """
    with on_processors(processors):
        ort.set_global_thread_pool_sizes(threads, 1)


@contextlib.contextmanager
def on_processors(processors: Sequence[int]) -> Iterator[None]:
    """Keep the calling thread to these processors, where the system lets it choose."""
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, set(processors) & before or before)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def open_slice_session(
    model: bytes,
    constants: Mapping[str, NDArray[Any]] | None = None,
    *,
    own_arena: bool = False,
    shared_threads: bool = False,
) -> ort.InferenceSession:
    """A session of a slice's graph as it stands, in the shared workspace arena.

    Args:
        model: the slice's serialised graph.
        constants: values of a frozen graph's weights. The session copies them into the
            arena, packed for its kernels where that helps.
        own_arena: as ONNX Runtime does it by default: an arena of the session's own, that grows,
            and reuse of blocks by a pattern of earlier runs.
        shared_threads: compute with those of ``share_threads``, which don't sleep while a run
            lasts; else with the calling thread alone.

    Raises:
        PackageError: ONNX Runtime does not accept the graph.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if shared_threads:
        options.use_per_session_threads = False
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if not own_arena:
        options.enable_mem_pattern = False  # its blocks are larger than what a run needs at once
        options.add_session_config_entry("session.use_env_allocators", "1")
    if constants:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in constants.values()]
        options.add_external_initializers(list(constants), values)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base but this
        # Its message quotes the graph, which is encrypted in the package.
        kind = type(error).__name__
        raise PackageError(f"ONNX Runtime does not accept a slice's graph ({kind})") from None
