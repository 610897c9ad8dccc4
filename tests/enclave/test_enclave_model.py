"""Promise: what was measured wrongly, or elsewhere, is found when a model is loaded and not when a
request runs; and a processor gets a variant that it can run."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from lasagna.enclave.model import choose_variant, prepare_model
from lasagna.enclave.sessions import native_block
from lasagna.errors import BudgetError, PackageError
from lasagna.package.format import SliceFacts
from lasagna.package.reader import OpenPackage, Package
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


def test_the_variant_of_this_processor_before_the_portable_one(squeezenet: Sealed) -> None:
    (native,) = squeezenet.manifest.variants
    portable = replace(native, name="portable", block=0)
    other = replace(native, name="nchwc99", block=99)
    block = native_block()
    assert choose_variant([portable, other, native], block) is native
    assert choose_variant([other, portable], block) is portable
    with pytest.raises(PackageError, match=rf"NCHWc block {block}; the package has only nchwc99"):
        choose_variant([other], block)
