"""Promise: what was measured wrongly, or elsewhere, is found when a model is loaded and not when a
request runs; and a processor gets a variant that it can run."""

from __future__ import annotations

import socket
import threading
import time

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from lasagna.enclave.executor import Job, run_job
from lasagna.enclave.model import Lane, Model, choose_variant, prepare_model
from lasagna.enclave.service import Enclave, Limits
from lasagna.enclave.sessions import native_block
from lasagna.errors import BudgetError, EnclaveError, PackageError
from lasagna.package.format import SliceFacts
from lasagna.package.reader import OpenPackage, Package
from lasagna.trust.evidence import InsecureEmulatedQuoter
from lasagna.units import MIB

from .conftest import Sealed


def starved(facts: SliceFacts) -> SliceFacts:
    return replace(facts, workspace=(1024,) * 4)


@pytest.mark.parametrize("pin", [True, False])
def test_workspace_that_was_measured_too_small_is_found_when_loading(
    squeezenet: Sealed, pin: bool
) -> None:
    opened = OpenPackage(Package(squeezenet.path), squeezenet.keys.content_key.reveal())
    (variant,) = opened.manifest.variants
    slices = tuple(starved(facts) for facts in variant.slices)
    variant = replace(variant, slices=slices, whole=starved(variant.whole))
    opened.manifest = replace(opened.manifest, variants=(variant,))
    with pytest.raises(BudgetError, match=r"slice \d+ of 'squeezenet' needs more than the 1024 "):
        prepare_model(
            opened,
            block=native_block(),
            budget=60 * MIB,
            threads=1,
            intra_op_threads=1,
            max_batch=2,
            pin=pin,
        )


def prepared(squeezenet: Sealed, budget: int, *, vanilla: bool = False) -> Model:
    opened = OpenPackage(Package(squeezenet.path), squeezenet.keys.content_key.reveal())
    block = native_block()
    model, _ = prepare_model(
        opened,
        block=block,
        budget=budget,
        threads=1,
        intra_op_threads=1,
        max_batch=1,
        vanilla=vanilla,
    )
    return model


def test_the_whole_model_as_one_slice_goes_by_another_name(squeezenet: Sealed) -> None:
    """Its slice 0 is not the slice 0 of the model in slices, and neither are their cuts."""
    (sliced,) = squeezenet.manifest.variants
    roomy = prepared(squeezenet, 60 * MIB)
    assert (roomy.variant.name, len(roomy.variant.slices)) == (f"{sliced.name}/whole", 1)
    tight = prepared(squeezenet, 10 * MIB)
    assert (tight.variant.name, len(tight.variant.slices)) == (sliced.name, len(sliced.slices))


def test_frozen_bound_and_sliced_weights_compute_the_same(squeezenet: Sealed) -> None:
    """Constants that ONNX Runtime packs, inputs that it does not, and slices: one model."""
    frozen = prepared(squeezenet, 60 * MIB)
    assert frozen.plan.session_bytes >= 2 * frozen.plan.weight_bytes
    bound = prepared(squeezenet, frozen.plan.total_bytes - frozen.plan.session_bytes)
    assert (bound.variant.name, bound.plan.session_bytes) == (frozen.variant.name, 0)
    vanilla = prepared(squeezenet, MIB, vanilla=True)  # whatever memory it takes
    models = (frozen, bound, prepared(squeezenet, 10 * MIB), vanilla)
    answers = [run_once(model) for model in models]
    assert np.ptp(answers[0]) > 0
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], rtol=1e-4, atol=1e-6)


def run_once(model: Model) -> NDArray[np.float32]:
    """The first output for a ramp as the first input."""
    (lane,) = model.lanes
    inputs = model.input_slots[0] if model.input_slots else []
    (place,) = lane.places(model, inputs, model.variant.inputs)
    row = model.inputs[0].row_bytes
    place[:row].view(np.float32)[:] = np.linspace(0, 1, row // 4, dtype=np.float32)
    loader = threading.Thread(target=model.store.load_ahead)
    loader.start()
    for number in range(len(model.variant.slices)):
        weights = model.store.acquire(0, number)
        lane.run_slice(model, number, 1, weights, inputs)
        model.store.release(0, number)
    model.store.close()
    loader.join()
    (out,) = lane.places(model, inputs, model.variant.outputs)
    return out[: model.outputs[0].row_bytes].view(np.float32).copy()


def test_time_is_charged_once_whether_a_request_waits_or_is_opened(
    squeezenet: Sealed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compute thread that opens the inputs itself is not waited for meanwhile."""
    model = prepared(squeezenet, 60 * MIB)
    one, other = socket.socketpair()
    with one, other:
        enclave = Enclave(one, Limits(60 * MIB, 1, 1, MIB), InsecureEmulatedQuoter(b"", b""))
        monkeypatch.setattr(enclave, "_open", lambda *_: time.sleep(0.1))
        job = Job(1, 0, 1, [], queued_at=time.perf_counter() - 0.2)
        timings = enclave._run(model, model.lanes[0], job).timings
    assert timings.open_s >= 0.1
    assert 0.2 <= timings.wait_s < 0.29


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("indices element out of data bounds, idx=31337", "values do not suit the model"),
        ("Available memory of 5 is smaller than requested 31337", "more workspace than was"),
    ],
)
def test_why_a_run_failed_is_told_without_its_values(
    squeezenet: Sealed, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"{said}\nand more")

    model = prepared(squeezenet, 60 * MIB)
    monkeypatch.setattr(Lane, "run_slice", fail)
    with pytest.raises(
        EnclaveError, match=rf"^slice 0 failed: .*{told}.* \(RuntimeError\)$"
    ) as caught:
        run_job(model, model.lanes[0], Job(1, 0, 1, [], rows=1))
    assert "31337" not in str(caught.value)


def test_the_variant_of_this_processor_before_the_portable_one(squeezenet: Sealed) -> None:
    (native,) = squeezenet.manifest.variants
    portable = replace(native, name="portable", block=0)
    other = replace(native, name="nchwc99", block=99)
    block = native_block()
    assert choose_variant([portable, other, native], block) is native
    assert choose_variant([other, portable], block) is portable
    with pytest.raises(PackageError, match=rf"NCHWc block {block}; the package has only nchwc99"):
        choose_variant([other], block)
