"""Promise: one enclave process serves batches and threads correctly, keeps requests apart, keeps to
its budget, and answers or dies, but never hangs, on bad input."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lasagna.bench.direct import ClientRequest, InsecureDirectEnclave
from lasagna.enclave import messages as m
from lasagna.enclave.frames import LENGTH
from lasagna.errors import (
    BudgetError,
    EnclaveLostError,
    InvalidInputError,
    PackageError,
    TrustError,
)
from lasagna.trust.keys import ContentKey, SecretKey
from lasagna.trust.model_keys import ModelKeys
from lasagna.units import MIB

from .conftest import Sealed

pytestmark = pytest.mark.integration

SMALL = 9_500_000  # far less than batch 2 with everything pinned: some slices are streamed


@pytest.fixture(scope="module")
def enclave(squeezenet: Sealed) -> Iterator[InsecureDirectEnclave]:
    with InsecureDirectEnclave(
        squeezenet.path, squeezenet.keys, 80 * MIB, max_batch=4, pin=False
    ) as running:
        yield running


def infer(
    enclave: InsecureDirectEnclave, requests: Sequence[ClientRequest]
) -> tuple[m.PartResult, ...]:
    """Run them as one batch."""
    return enclave.call(enclave.run(*requests), m.Ran).results


def test_rows_of_different_requests_run_in_one_batch_and_stay_apart(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    inputs = [squeezenet.inputs(rows, seed) for seed, rows in enumerate((1, 2, 1))]
    requests = [enclave.seal(squeezenet.manifest.inputs, values) for values in inputs]
    before = enclave.stats()
    results = infer(enclave, requests)
    after = enclave.stats()
    assert after.slice_runs - before.slice_runs == enclave.plan.slices, "one run for all"
    assert after.rows - before.rows == 4
    for values, request, result in zip(inputs, requests, results, strict=True):
        got = squeezenet.output(enclave.open(squeezenet.manifest.outputs, request, result))
        np.testing.assert_allclose(got, squeezenet.expected(values), rtol=1e-4, atol=1e-6)


def test_a_request_that_does_not_open_leaves_its_batch_alone(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    inputs = [squeezenet.inputs(1, seed) for seed in range(3)]
    requests = [enclave.seal(squeezenet.manifest.inputs, values) for values in inputs]
    bad = bytearray(requests[1].rows.records[0][0])
    bad[-1] ^= 1
    rows = requests[1].rows
    changed = m.SealedRows(rows.request_id, rows.capsule, 1, ((memoryview(bad),),))
    requests[1] = replace(requests[1], rows=changed)
    results = infer(enclave, requests)
    assert results[1].kind == "TrustError"
    assert "does not open" in results[1].error
    for index in (0, 2):
        got = enclave.open(squeezenet.manifest.outputs, requests[index], results[index])
        expected = squeezenet.expected(inputs[index])
        np.testing.assert_allclose(squeezenet.output(got), expected, rtol=1e-4, atol=1e-6)


def test_one_clients_answer_does_not_open_for_another(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    requests = [enclave.seal(squeezenet.manifest.inputs, squeezenet.inputs(1, s)) for s in (0, 1)]
    results = infer(enclave, requests)
    with pytest.raises(TrustError):
        enclave.open(squeezenet.manifest.outputs, requests[0], results[1])


def test_nan_and_infinity_pass_through_as_in_onnx_runtime(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    values = squeezenet.inputs(1)
    image = next(iter(values.values()))
    image[0, 0, 10, 10], image[0, 1, 20, 20] = np.nan, np.inf
    request = enclave.seal(squeezenet.manifest.inputs, values)
    (result,) = infer(enclave, [request])
    got = squeezenet.output(enclave.open(squeezenet.manifest.outputs, request, result))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(squeezenet.expected(values)))


@pytest.mark.parametrize("together", [False, True])
def test_two_threads_give_the_same_answers(squeezenet: Sealed, together: bool) -> None:
    with InsecureDirectEnclave(
        squeezenet.path,
        squeezenet.keys,
        30 * MIB,
        threads=2,
        together=together,
        pin=False,
    ) as running:
        inputs = [squeezenet.inputs(1, seed) for seed in range(12)]
        requests = {}
        for values in inputs:
            request = running.seal(squeezenet.manifest.inputs, values)
            command = running.run(request)
            requests[command.id] = (values, request)
            running.send(command)
        for _ in inputs:
            reply = running.receive(m.Ran)
            values, request = requests.pop(reply.id)
            got = running.open(squeezenet.manifest.outputs, request, reply.results[0])
            expected = squeezenet.expected(values)
            np.testing.assert_allclose(squeezenet.output(got), expected, rtol=1e-4, atol=1e-6)


def _anonymous_bytes(pid: int) -> int:
    """Private memory of a process, as the kernel counts it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])
        * 1024
    )


def test_the_process_grows_by_no_more_than_its_budget_and_its_sessions(squeezenet: Sealed) -> None:
    """Compared with an enclave of the smallest budget: what differs is what the budget buys."""
    grown = {}
    for budget in (SMALL, 40 * MIB):
        with InsecureDirectEnclave(squeezenet.path, squeezenet.keys, budget, pin=False) as running:
            for seed in range(5):
                values = squeezenet.inputs(1, seed)
                running.infer(squeezenet.manifest.inputs, squeezenet.manifest.outputs, values)
            stats = running.stats()
            used = running.plan.total_bytes
            assert stats.pool_high_water + stats.workspace_bytes <= used <= budget
            grown[budget] = _anonymous_bytes(running.pid) - used
    # Python, NumPy, ONNX Runtime and its sessions, the frame of a request: no weights among it.
    assert max(grown.values()) < 60 * MIB
    assert abs(grown[SMALL] - grown[40 * MIB]) < 8 * MIB


def test_a_budget_that_is_too_small_is_refused_with_a_reason(squeezenet: Sealed) -> None:
    with pytest.raises(BudgetError) as refused:
        InsecureDirectEnclave(squeezenet.path, squeezenet.keys, 3_000_000)
    said = re.match(
        r"'squeezenet' needs a budget of ([\d.]+) MB or more, it has 3.00 MB. One row takes "
        r"[\d.]+ MB in slice \d+ of 'squeezenet'",
        str(refused.value),
    )
    assert said
    with InsecureDirectEnclave(
        squeezenet.path, squeezenet.keys, round(float(said[1]) * 1e6)
    ) as running:
        inputs = squeezenet.inputs(1)
        outputs = running.infer(squeezenet.manifest.inputs, squeezenet.manifest.outputs, inputs)
    np.testing.assert_allclose(
        squeezenet.output(outputs), squeezenet.expected(inputs), rtol=1e-4, atol=1e-6
    )


def test_a_key_of_another_package_is_refused(squeezenet: Sealed) -> None:
    wrong = ContentKey(SecretKey(os.urandom(32)))
    keys = ModelKeys(squeezenet.keys.package_id, wrong, squeezenet.keys.owner_public_key)
    with pytest.raises(PackageError, match="does not open"):
        InsecureDirectEnclave(squeezenet.path, keys, 40 * MIB)


def test_another_owners_package_is_refused(squeezenet: Sealed) -> None:
    keys = ModelKeys(squeezenet.keys.package_id, squeezenet.keys.content_key, bytes(32))
    with pytest.raises(PackageError, match="not signed"):
        InsecureDirectEnclave(squeezenet.path, keys, 40 * MIB)


def test_more_rows_than_were_planned_for_are_refused_and_the_next_ones_work(
    enclave: InsecureDirectEnclave, squeezenet: Sealed
) -> None:
    request = enclave.seal(squeezenet.manifest.inputs, squeezenet.inputs(1))
    many = enclave.seal(squeezenet.manifest.inputs, squeezenet.inputs(5))
    with pytest.raises(InvalidInputError, match="have room for 4"):
        infer(enclave, [many])
    (result,) = infer(enclave, [request])
    assert not result.error


def test_a_malformed_frame_ends_the_enclave_without_a_hang(squeezenet: Sealed) -> None:
    running = InsecureDirectEnclave(squeezenet.path, squeezenet.keys, 40 * MIB)
    running._socket.sendall(LENGTH.pack(3) + b"\xff\xff\xff")
    with pytest.raises(EnclaveLostError):
        running.receive(m.Stats)
    assert running._process.wait(10) == 1
    running.close()


def test_an_enclave_killed_in_a_request_is_noticed(squeezenet: Sealed) -> None:
    running = InsecureDirectEnclave(squeezenet.path, squeezenet.keys, 40 * MIB)
    request = running.seal(squeezenet.manifest.inputs, squeezenet.inputs(1))
    running.send(running.run(request))
    os.kill(running.pid, signal.SIGKILL)
    os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(EnclaveLostError):  # an answer may have been on its way
        list(iter(lambda: running.receive(m.Ran), None))
    running.close()


def test_the_enclave_reads_no_file_but_its_package(squeezenet: Sealed) -> None:
    """After it has served: the package, its socket, and what it was started with. ONNX Runtime's
    telemetry, which is on by default, would show here as a database and another thread."""
    with InsecureDirectEnclave(squeezenet.path, squeezenet.keys, 40 * MIB) as running:
        values = squeezenet.inputs(1)
        running.infer(squeezenet.manifest.inputs, squeezenet.manifest.outputs, values)
        folder = Path(f"/proc/{running.pid}/fd")
        opened = {str(link.readlink()) for link in folder.iterdir() if int(link.name) > 2}
        threads = len(list(Path(f"/proc/{running.pid}/task").iterdir()))
    assert all(name.startswith("socket:") or name == str(squeezenet.path) for name in opened)
    assert threads == 3, "the main thread, the loader and one compute thread"
