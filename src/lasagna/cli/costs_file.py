"""What planning needs of a model, as a file: sizes and measured times, JSON, no weights and no key.

``lasagna inspect PACKAGE --costs FILE`` writes it from the public part of a sealed package. So a
cluster can be planned on a machine that has none of the packages, for processors that it has not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from lasagna.cli.decoding import converted, read_limited
from lasagna.errors import PackageError, UsageError
from lasagna.package.format import MAGIC, MAX_MODEL_NAME, Manifest, Variant
from lasagna.package.forms import Form, choose_variant
from lasagna.package.reader import Package
from lasagna.policy.costs import BATCHES, SLICED, Forms, ModelCosts, SliceCosts
from lasagna.server.costs import forms_of
from lasagna.units import MIB

FORMAT: Final = 1
MAX_ROWS: Final = 4096
"""Of one batch, where the package takes any; servers decide on fewer."""
_MAX_BYTES: Final = 16 * MIB
_MAX_SLICES: Final = 65_536
_WHAT: Final = "a file of costs (lasagna inspect PACKAGE --costs FILE)"

_Count = Annotated[int, Meta(ge=0, le=2**48)]
_Seconds = Annotated[float, Meta(ge=0.0, le=1e6)]
_Curve = Meta(min_length=len(BATCHES), max_length=len(BATCHES))


class _Slice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As ``policy.costs.SliceCosts``."""

    weight_bytes: _Count
    compute_s: Annotated[tuple[_Seconds, ...], _Curve]
    workspace_bytes: Annotated[tuple[_Count, ...], _Curve]


class _Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As ``policy.costs.ModelCosts``."""

    form: Form
    max_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    copies_bytes: _Count
    cut_bytes: tuple[_Count, ...]
    running_bytes: tuple[_Count, ...]
    slices: Annotated[tuple[_Slice, ...], Meta(min_length=1, max_length=_MAX_SLICES)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file.

    Attributes:
        format: of the file.
        name: of the model.
        variant: of the package that these are the costs of.
        measured_on: for people: the machine on which the times were measured; "" if not known.
        batches: rows to which the values of a curve belong.
        forms: the sliced one first.
    """

    format: int
    name: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_NAME)]
    variant: Annotated[str, Meta(max_length=MAX_MODEL_NAME)]
    measured_on: Annotated[str, Meta(max_length=MAX_MODEL_NAME)]
    batches: tuple[int, ...]
    forms: Annotated[tuple[_Form, ...], Meta(min_length=1)]


class _Version(msgspec.Struct):
    """What every version of the file has."""

    format: int


def write_costs(path: Path, manifest: Manifest, variant: Variant, measured_on: str) -> None:
    """Write the costs of one variant of a package.

    Args:
        path: of the file; one that is there is overwritten.
        manifest: the public part of the package.
        variant: one of its variants.
        measured_on: the machine on which the package was sealed, for people; "" if not known.

    Raises:
        UsageError: the file can't be written, or the text is too long.
    """
    if len(measured_on) > MAX_MODEL_NAME:
        raise UsageError(f"the name of the machine has more than {MAX_MODEL_NAME} characters")
    file = _File(
        FORMAT,
        manifest.name,
        variant.name,
        measured_on,
        BATCHES,
        tuple(map(_encoded, _forms(manifest, variant))),
    )
    try:
        path.write_bytes(msgspec.json.encode(file) + b"\n")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None


def read_costs(path: Path) -> tuple[str, Forms]:
    """A model's name and its costs in every form.

    Args:
        path: of a file that `write_costs` wrote; or of a sealed package, of which the variant is
            taken that fits this processor.

    Raises:
        UsageError: it is neither, or a malformed one.
        PackageError: it is a package, but malformed, or for other processors only.
    """
    try:
        with path.open("rb") as file:
            is_package = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise UsageError(f"can't read {path}: {error.strerror}") from None
    return _from_package(path) if is_package else _from_json(path)


def _from_package(path: Path) -> tuple[str, Forms]:
    with Package(path) as package:
        manifest = package.manifest
    block = 0
    if any(variant.block for variant in manifest.variants):
        from lasagna.enclave.sessions import native_block  # ONNX Runtime: it takes a second

        block = native_block()
    try:
        variant = choose_variant(manifest.variants, block)
    except PackageError as error:
        raise PackageError(
            f"{path}: {error}, or give the costs that lasagna inspect --costs writes"
        ) from None
    return manifest.name, _forms(manifest, variant)


def _forms(manifest: Manifest, variant: Variant) -> Forms:
    return forms_of(variant, MAX_ROWS if manifest.batchable else 1)


def _from_json(path: Path) -> tuple[str, Forms]:
    content = read_limited(path, _WHAT, _MAX_BYTES)
    try:
        tree = msgspec.json.decode(content)
        version = msgspec.convert(tree, _Version).format
    except (ValueError, RecursionError):  # msgspec's errors, and UnicodeDecodeError
        raise UsageError(f"{path} is neither a sealed package nor {_WHAT}") from None
    if version != FORMAT:
        raise UsageError(f"{path}, format: it is {version}, expected {FORMAT}: write it again")
    file = converted(tree, _File, str(path))
    if file.batches != BATCHES:
        raise UsageError(f"{path}, batches: expected {list(BATCHES)}, got {list(file.batches)}")
    kinds = [one.form for one in file.forms]
    if kinds[0] != SLICED or len(set(kinds)) < len(kinds):
        raise UsageError(f'{path}, forms: expected "{SLICED}" first, and each form once')
    for place, form in enumerate(file.forms):
        if not any(min(one.compute_s) for one in form.slices):
            raise UsageError(f"{path}, forms[{place}].slices: none takes time at every batch")
    forms = [_decoded(one, f"{path}, forms[{place}]") for place, one in enumerate(file.forms)]
    return file.name, tuple(forms)


def _encoded(costs: ModelCosts) -> _Form:
    return _Form(
        Form(costs.form),
        costs.max_rows,
        costs.copies_bytes,
        costs.cut_bytes,
        costs.running_bytes,
        tuple(_Slice(one.weight_bytes, one.compute_s, one.workspace_bytes) for one in costs.slices),
    )


def _decoded(form: _Form, where: str) -> ModelCosts:
    count = len(form.slices)
    if form.form is not Form.SLICED and count != 1:
        raise UsageError(f"{where}.slices: the form {form.form} has one, here are {count}")
    for key, found, wanted in (
        ("cut_bytes", form.cut_bytes, count + 1),
        ("running_bytes", form.running_bytes, count),
    ):
        if len(found) != wanted:
            raise UsageError(
                f"{where}.{key}: expected {wanted} values for {count} slices, got {len(found)}"
            )
    return ModelCosts(
        slices=tuple(
            SliceCosts(one.weight_bytes, one.compute_s, one.workspace_bytes) for one in form.slices
        ),
        cut_bytes=form.cut_bytes,
        running_bytes=form.running_bytes,
        max_rows=form.max_rows,
        form=form.form.value,
        copies_bytes=form.copies_bytes,
    )
