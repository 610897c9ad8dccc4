"""A picture of a sliced model: where its weights are, and where its activations are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lasagna.errors import UsageError
from lasagna.package.format import PROFILE_BATCHES, SliceDetails, Variant
from lasagna.package.forms import live_at_cut
from lasagna.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEALED: Final = ""
"""The kind of a slice whose layers are not known, for want of a key."""

# Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS: Final = {
    "Conv": "#0072B2",
    "Gemm": "#D55E00",
    "MatMul": "#E69F00",
    "Gather": "#009E73",
    "LSTM": "#CC79A7",
}
_OTHER: Final = "#999999"
_CROSSING: Final = "#56B4E9"
_TIMES: Final = ("#000000", "#E69F00")
_MB: Final = 1e6


@dataclass(frozen=True, slots=True)
class SlicePicture:
    """What is drawn of a variant, a value a slice unless it says otherwise.

    Attributes:
        kinds: the operator with the most of the slice's weights, or ``SEALED``.
        weight_bytes: of weights.
        crossing_bytes: bytes a row that are kept across each cut; one more than slices, since it
            begins with the model's inputs and ends with its outputs.
        compute_s: seconds by batch, for each of ``PROFILE_BATCHES``; None if not measured.
    """

    kinds: tuple[str, ...]
    weight_bytes: tuple[int, ...]
    crossing_bytes: tuple[int, ...]
    compute_s: tuple[tuple[float, ...], ...] | None


def slice_picture(variant: Variant, details: Sequence[SliceDetails] | None) -> SlicePicture:
    """What to draw of a variant; without its details the kinds stay unknown."""
    times = tuple(facts.compute_s for facts in variant.slices)
    return SlicePicture(
        kinds=(SEALED,) * len(times) if details is None else tuple(map(main_op, details)),
        weight_bytes=tuple(facts.weight_bytes for facts in variant.slices),
        crossing_bytes=crossing_bytes(variant),
        compute_s=times if all(times) else None,
    )


def crossing_bytes(variant: Variant) -> tuple[int, ...]:
    """Bytes a row that are made before a place and needed behind it, for every place.

    The places are before the first slice, between every two, and behind the last.
    """
    return tuple(
        sum(variant.tensor_bytes[tensor] for tensor in live_at_cut(variant, place))
        for place in range(len(variant.slices) + 1)
    )


def main_op(details: SliceDetails) -> str:
    """The operator that has most of a slice's weights, or the most frequent one without weights.

    Fused operators count as what they began as.
    """
    votes: Counter[str] = Counter()
    for layer in details.layers:
        votes[layer.op.removeprefix("Fused")] += layer.weight_bytes
    if not votes.total():
        votes = Counter(layer.op.removeprefix("Fused") for layer in details.layers)
    return votes.most_common(1)[0][0] if votes else SEALED


def draw_slices(path: Path, title: str, picture: SlicePicture) -> None:
    """Draw weights, crossing activations and, if measured, compute times over the slice number.

    Args:
        path: the file; its suffix chooses the format.
        title: of the figure.
        picture: what to draw.

    Raises:
        UsageError: matplotlib does not know the format, or the file can't be written.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    count = len(picture.kinds)
    width = min(14.0, max(7.0, 3.0 + 0.13 * count))
    panel_count = 2 if picture.compute_s is None else 3
    figure = Figure(figsize=(width, 0.8 + 2.1 * panel_count), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    panels = figure.subplots(panel_count, 1, sharex=True, squeeze=False)[:, 0]
    _weights(panels[0], picture)
    _crossings(panels[1], picture)
    if picture.compute_s is not None:
        _times(panels[2], picture.compute_s)
    panels[-1].set_xlabel("slice")
    panels[-1].set_xlim(-1, count)
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.set_ylim(bottom=0)
    figure.align_ylabels(panels)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UsageError(f"can't draw {path}: {error}") from None


def _weights(panel: Axes, picture: SlicePicture) -> None:
    panel.set_title("Weights of each slice", loc="left", fontsize=10)
    panel.set_ylabel("MB")
    totals: Counter[str] = Counter()
    for kind, size in zip(picture.kinds, picture.weight_bytes, strict=True):
        totals[kind] += size
    for kind, total in totals.most_common():
        places = [place for place, other in enumerate(picture.kinds) if other == kind]
        panel.bar(
            places,
            [picture.weight_bytes[place] / _MB for place in places],
            width=0.85,
            color=_COLOURS.get(kind, _OTHER),
            label=f"{kind or 'sealed layers'}, {format_bytes(total)}",
        )
    _legend(panel, len(totals))


def _crossings(panel: Axes, picture: SlicePicture) -> None:
    panel.set_title(
        "Activations kept across each cut, the model's inputs and outputs included",
        loc="left",
        fontsize=10,
    )
    panel.set_ylabel("MB at batch 1")
    # A cut is between two slices, so its bar is between two bars of the panel above.
    places = [place - 0.5 for place in range(len(picture.crossing_bytes))]
    panel.bar(places, [size / _MB for size in picture.crossing_bytes], width=0.6, color=_CROSSING)


def _times(panel: Axes, compute_s: Sequence[Sequence[float]]) -> None:
    panel.set_title("Compute time of each slice on one thread", loc="left", fontsize=10)
    panel.set_ylabel("ms a row")
    for position, colour in zip((0, len(PROFILE_BATCHES) - 1), _TIMES, strict=True):
        batch = PROFILE_BATCHES[position]
        panel.plot(
            [1000 * times[position] / batch for times in compute_s],
            marker="o",
            markersize=3,
            linewidth=0.8,
            color=colour,
            label=f"batch {batch}",
        )
    _legend(panel, 2)


def _legend(panel: Axes, columns: int) -> None:
    """Beside the panel's title, where no bar can be."""
    panel.legend(
        fontsize=8,
        frameon=False,
        ncols=columns,
        loc="lower right",
        bbox_to_anchor=(1, 0.98),
        borderaxespad=0,
        handlelength=1.2,
        columnspacing=1.2,
    )
