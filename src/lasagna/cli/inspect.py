"""``lasagna inspect``: what a sealed package says, to anybody and to the holder of its key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lasagna.cli.costs_file import write_costs
from lasagna.errors import PackageError, UsageError
from lasagna.models.draw import draw_slices, slice_picture
from lasagna.package.format import (
    PROFILE_BATCHES,
    Details,
    Manifest,
    SliceDetails,
    SliceFacts,
    TensorSpec,
    Variant,
)
from lasagna.package.reader import OpenPackage, Package
from lasagna.secret_file import read_private
from lasagna.trust.model_keys import ModelKeys, decode_model_keys
from lasagna.units import format_bytes

_BAR_WIDTH = 28
_LAST = len(PROFILE_BATCHES) - 1


def inspect(
    *,
    path: Annotated[Path, typer.Argument(metavar="PACKAGE", help="The sealed package.")],
    key: Annotated[
        Path | None, typer.Option(help="Its key: checks the signature, shows the layers.")
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which variant. [default: the first]")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Decrypt and check every section; needs --key.")
    ] = False,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the slices into a file.")
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what lasagna plan needs of it into a file."),
    ] = None,
    measured_on: Annotated[
        str, typer.Option(metavar="TEXT", help="A note in that file: where it was sealed.")
    ] = "",
    json_: Annotated[bool, typer.Option("--json", help="Report as JSON.")] = False,
) -> None:
    """Show what is in a sealed package.

    Without a key this is what a server's owner can see: sizes, slices and times, no layers.
    """
    if verify and key is None:
        raise UsageError("--verify opens every section, and that takes the package's --key")
    with Package(path) as package:
        chosen = _choose(package.manifest, variant)
        opened = None if key is None else _open(package, decode_model_keys(read_private(key)))
        if opened and verify:
            _verify(opened, quiet=json_)
        details = opened.details(chosen) if opened else None
        if png:
            title = _title(package.manifest.name, chosen)
            inner = details.slices if details else None
            draw_slices(png, title, slice_picture(chosen, inner))
        if costs:
            write_costs(costs, package.manifest, chosen, measured_on)
        if json_:
            facts = _facts(package, opened is not None, verify)
            facts["variants"] = [
                _variant_facts(one, opened.details(one) if opened else None)
                for one in ([chosen] if variant else package.manifest.variants)
            ]
            typer.echo(json.dumps(facts, indent=2))
        else:
            _show(Console(), _facts(package, opened is not None, verify), chosen, details)


def _title(name: str, variant: Variant) -> str:
    what = f"{format_bytes(variant.weight_bytes)} of weights in {len(variant.slices)} slices"
    return f"{_plain(name)} ({_plain(variant.name)}): {what}"


def _choose(manifest: Manifest, name: str | None) -> Variant:
    for variant in manifest.variants:
        if name in (None, variant.name):
            return variant
    there = ", ".join(variant.name for variant in manifest.variants)
    raise UsageError(f"the package has no variant {name!r}: it has {there}")


def _open(package: Package, keys: ModelKeys) -> OpenPackage:
    if keys.package_id != package.manifest.package_id:
        raise PackageError(
            f"this key is for package {keys.package_id.hex()}, the file is package "
            f"{package.manifest.package_id.hex()}"
        )
    package.verify_signature(keys.owner_public_key)
    return OpenPackage(package, keys.content_key.reveal())


def _verify(opened: OpenPackage, *, quiet: bool) -> None:
    """Decrypt every section, and check every variant's details against the manifest."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        for section in bar.track(range(len(opened.manifest.sections)), description="verify"):
            opened.read_section(section)
    for variant in opened.manifest.variants:
        opened.details(variant)


def _facts(package: Package, has_key: bool, verified: bool) -> dict[str, Any]:
    manifest = package.manifest
    return {
        "package": str(package.path),
        "name": manifest.name,
        "package_id": manifest.package_id.hex(),
        "model_digest": package.model_digest.hex(),
        "owner": manifest.owner.hex(),
        "signature": "verified" if has_key else "not checked",
        "sections": len(manifest.sections),
        "sections_verified": verified,
        "file_bytes": package.path.stat().st_size,
        "batchable": manifest.batchable,
        "batch_note": manifest.batch_note,
        "inputs": [_tensor_facts(spec) for spec in manifest.inputs],
        "outputs": [_tensor_facts(spec) for spec in manifest.outputs],
    }


def _tensor_facts(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "row_shape": list(spec.row_shape),
        "row_bytes": spec.row_bytes,
    }


def _variant_facts(variant: Variant, details: Details | None) -> dict[str, Any]:
    inner = details.slices if details else [None] * len(variant.slices)
    pairs = zip(variant.slices, inner, strict=True)
    return {
        "name": variant.name,
        "block": variant.block,
        "weight_bytes": variant.weight_bytes,
        "slices": [_slice_facts(variant, facts, one, details) for facts, one in pairs],
        "whole": _slice_facts(variant, variant.whole, None, None),
    }


def _slice_facts(
    variant: Variant, facts: SliceFacts, inner: SliceDetails | None, details: Details | None
) -> dict[str, Any]:
    taken, given = _moved(variant, facts)
    found: dict[str, Any] = {
        "weight_bytes": facts.weight_bytes,
        "in_bytes": taken,
        "out_bytes": given,
        "layers": facts.layers,
        "workspace_bytes": _by_batch(facts.workspace),
        "compute_s": _by_batch(facts.compute_s),
    }
    if inner and details:
        found["inputs"] = [_tensor_facts(details.tensors[number]) for number in facts.inputs]
        found["outputs"] = [_tensor_facts(details.tensors[number]) for number in facts.outputs]
        found["layer"] = [
            {
                "name": layer.name,
                "op": layer.op,
                "tile": layer.tile,
                "weight_bytes": layer.weight_bytes,
            }
            for layer in inner.layers
        ]
    return found


def _by_batch(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(map(str, PROFILE_BATCHES), values, strict=False))


def _moved(variant: Variant, facts: SliceFacts) -> tuple[int, int]:
    """Bytes a row that a slice takes and gives."""
    taken = sum(variant.tensor_bytes[number] for number in facts.inputs)
    return taken, sum(variant.tensor_bytes[number] for number in facts.outputs)


def _show(
    console: Console, facts: dict[str, Any], variant: Variant, details: Details | None
) -> None:
    batches = "takes batches" if facts["batchable"] else "takes no batches"
    signature = "the owner's" if facts["signature"] == "verified" else "not checked: give --key"
    sections = f"{facts['sections']}, {format_bytes(facts['file_bytes'])}"
    lines = [
        ("name", facts["name"]),
        ("package id", facts["package_id"]),
        ("digest", facts["model_digest"]),
        ("owner", facts["owner"]),
        ("signature", signature),
        ("sections", sections + (", every one opens" if facts["sections_verified"] else "")),
        ("batches", f"{batches}: {facts['batch_note']}"),
        *(("input", _tensor_line(spec)) for spec in facts["inputs"]),
        *(("output", _tensor_line(spec)) for spec in facts["outputs"]),
        ("variant", _variant_line(variant)),
    ]
    grid = Table.grid(padding=(0, 2))
    for title, text in lines:
        grid.add_row(Text(title, style="bold"), Text(_plain(text), overflow="fold"))
    console.print(grid)
    console.print()
    console.print(_slice_table(variant))
    console.print()
    console.print(_picture(variant))
    if details:
        console.print()
        _show_layers(console, variant, details)


def _tensor_line(spec: dict[str, Any]) -> str:
    return f"{spec['name']}, {spec['dtype']} {spec['row_shape']}, {format_bytes(spec['row_bytes'])}"


def _variant_line(variant: Variant) -> str:
    layout = f"for NCHWc blocks of {variant.block}" if variant.block else "for any processor"
    whole = variant.whole
    times = f", {_milliseconds(whole, 0)} ms a request" if whole.compute_s else ""
    return (
        f"{variant.name} ({layout}): {format_bytes(variant.weight_bytes)} of weights in "
        f"{len(variant.slices)} slices; whole, it takes {format_bytes(whole.workspace[0])} of "
        f"workspace{times}"
    )


def _slice_table(variant: Variant) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=("", "dim"))
    for title in ("slice", "layers", "weights", "in", "out", "workspace"):
        table.add_column(title, justify="right", no_wrap=True)
    timed = all(facts.compute_s for facts in variant.slices)
    if timed:
        for place in (0, _LAST):
            table.add_column(f"ms at {PROFILE_BATCHES[place]}", justify="right", no_wrap=True)
    for number, facts in enumerate(variant.slices):
        taken, given = _moved(variant, facts)
        sizes = map(format_bytes, (facts.weight_bytes, taken, given, facts.workspace[0]))
        row = [str(number), str(facts.layers), *sizes]
        if timed:
            row += [_milliseconds(facts, 0), _milliseconds(facts, _LAST)]
        table.add_row(*row)
    return table


def _milliseconds(facts: SliceFacts, place: int) -> str:
    return f"{1000 * facts.compute_s[place]:.2f}"


def _picture(variant: Variant) -> Table:
    """Weights to the left, activations to the right, on one scale."""
    moved = [sum(_moved(variant, facts)) for facts in variant.slices]
    weights = [facts.weight_bytes for facts in variant.slices]
    largest = max(1, *moved, *weights)
    table = Table(box=None, padding=0, pad_edge=False, header_style="bold", collapse_padding=True)
    table.add_column("slice ", justify="right", no_wrap=True)
    table.add_column("weights ", justify="right", no_wrap=True, min_width=_BAR_WIDTH + 1)
    table.add_column(" activations in and out, at batch 1", no_wrap=True)
    for number, (left, right) in enumerate(zip(weights, moved, strict=True)):
        table.add_row(
            f"{number} ",
            Text(_bar(left, largest, leftwards=True), style="dark_orange"),
            Text("│", style="dim") + Text(_bar(right, largest), style="deep_sky_blue1"),
        )
    table.add_row("", Text(f"{'█' * 3} of {format_bytes(3 * largest // _BAR_WIDTH)} ", style="dim"))
    return table


def _bar(value: int, largest: int, *, leftwards: bool = False) -> str:
    """A bar of whole and half cells; whatever is there at all shows."""
    cells, half = divmod(round(2 * _BAR_WIDTH * value / largest), 2)
    if leftwards:
        return ("▐" if half else "") + "█" * cells or "▕" * bool(value)
    return "█" * cells + ("▌" if half else "") or "▏" * bool(value)


def _show_layers(console: Console, variant: Variant, details: Details) -> None:
    for number, (facts, inner) in enumerate(zip(variant.slices, details.slices, strict=True)):
        ops = Counter(layer.op for layer in inner.layers).most_common()
        what = ", ".join(op if count == 1 else f"{op} x{count}" for op, count in ops)
        console.print(Text(f"slice {number}", style="bold") + Text(f"  {_plain(what)}"))
        for title, tensors in (("takes", facts.inputs), ("gives", facts.outputs)):
            for spec in (details.tensors[tensor] for tensor in tensors):
                _line(console, title, _tensor_line(_tensor_facts(spec)))
        for layer in inner.layers:
            size = format_bytes(layer.weight_bytes) if layer.weight_bytes else ""
            parts = (layer.op, f"tile {layer.tile}" if layer.tile else "", layer.name, size)
            _line(console, "layer", "  ".join(filter(None, parts)))


def _line(console: Console, title: str, text: str) -> None:
    console.print(Text(f"  {title}  ", style="dim") + Text(_plain(text)), soft_wrap=True)


def _plain(text: str | Iterable[str]) -> str:
    """Text from a file that anybody may have written, without what a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
