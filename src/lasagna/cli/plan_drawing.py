"""Pictures of a plan: each server's enclave memory to scale, and what is in it and beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lasagna.cli.files import write_figure, write_file
from lasagna.cli.plan_lanes import Block, Lane
from lasagna.policy.cluster import Cluster, Part
from lasagna.policy.placed import PartCosts, Placement
from lasagna.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS: Final = (
    *("#1f6aa5", "#d9822b", "#8e3a80", "#2e8b57", "#b8433f", "#0b7f86"),
    *("#6b4a2f", "#5b3fa0", "#8a8420", "#4a5a78"),
)
_RING: Final = "#9aa3ab"
_RUNNING: Final = "#cfd4d9"
_FREE: Final = "#ffffff"
_EDGE: Final = "#1b1f23"
_MB: Final = 1e6
# Inches.
_LEFT, _MEMORY, _BETWEEN, _SHARES, _RIGHT = 1.35, 9.2, 0.35, 1.35, 1.0
_TOP, _BOTTOM = 1.05, 1.0
_BOX, _LINE, _GAP = 0.36, 0.17, 0.14
_CHARACTER: Final = 0.0605
"""Width of one, on average, at the size of a label."""
_LABEL: Final = 7.5
_NAME: Final = 20
"""Characters of a server's name that fit beside its lane."""
_TORN: Final = 1.15
"""A server's box is cut off where it is so many times as large as what is to be seen."""
_WORDS: Final = {"busy": "processors", "link_in": "link, in", "link_out": "link, out"}


def plan_png(cluster: Cluster, placement: Placement, lanes: Sequence[Lane], path: Path) -> None:
    """Draw a placement into a file, whose suffix chooses the format.

    Raises:
        UsageError: the file can't be written, or there are too many servers for one picture.
    """
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False, "hatch.linewidth": 1.6}):
        write_figure(path, plan_figure(cluster, placement, lanes))


def plan_figure(cluster: Cluster, placement: Placement, lanes: Sequence[Lane]) -> Figure:
    """The picture: a lane a server, its memory to the left and its shares to the right."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    labels = [_wrapped(lane) for lane in lanes]
    heights = [_BOX + _LINE * len(lines) + _GAP for lines in labels]
    width, height = _LEFT + _MEMORY + _BETWEEN + _SHARES + _RIGHT, sum(heights)
    total = _TOP + height + _BOTTOM
    figure = Figure(figsize=(width, total))
    colours = colours_of(cluster)
    figure.text(0.15 / width, 1 - 0.3 / total, headline(placement), fontsize=13, weight="bold")
    for place, line in enumerate(subtitles(cluster, placement)):
        figure.text(0.15 / width, 1 - (0.54 + 0.2 * place) / total, line, fontsize=9)
    memory = figure.add_axes(
        (_LEFT / width, _BOTTOM / total, _MEMORY / width, height / total), label="memory"
    )
    shares = figure.add_axes(
        (
            (_LEFT + _MEMORY + _BETWEEN) / width,
            _BOTTOM / total,
            _SHARES / width,
            height / total,
        ),
        label="shares",
    )
    extent = extent_of(lanes)
    memory.set_xlim(0, extent / _MB)
    shares.set_xlim(0, 1)
    top = 0.0
    for lane, lines, tall in zip(lanes, labels, heights, strict=True):
        _draw_lane(memory, lane, colours, extent, top)
        _draw_labels(memory, lines, colours, extent, top + _BOX)
        _draw_shares(shares, lane, top)
        top += tall
    for panel in (memory, shares):
        panel.set_ylim(height, -0.02)
        panel.set_yticks([])
        panel.spines[["top", "left", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    note = "MB of enclave memory; what is streamed lies outside of it, to the same scale"
    memory.set_xlabel(note, fontsize=9)
    shares.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    shares.set_xlabel("share in use", fontsize=9)
    _draw_legend(figure, colours)
    return figure


def plain(text: str) -> str:
    """Text from a file that anybody may have written, without what a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def headline(placement: Placement) -> str:
    """What a plan promises, in one line."""
    return (
        f"{placement.throughput:.3g} requests/s, {placement.scale:.3g} times the demand, predicted"
    )


def subtitles(cluster: Cluster, placement: Placement) -> list[str]:
    """What limits a plan, and how good it is."""
    demand = sum(cluster.demand[name] for name in cluster.wanted)
    bound, ceiling = placement.bound, placement.ceiling
    lines = [
        f"Bottleneck: {plain(placement.bottleneck)}.  "
        f"Bound: {bound.value * demand:.3g} requests/s, "
        f"{bound.value:.3g} times the demand ({bound.how});  gap {gap_of(placement)}",
        f"Ceiling: {ceiling.value * demand:.3g} requests/s ({ceiling.how})",
    ]
    fastest = placement.latency_bound
    if fastest is not None and math.isfinite(placement.mean_s):
        lines.append(
            f"Mean latency at the demand: {1000 * placement.mean_s:.3g} ms.  Bound: "
            f"{1000 * fastest.value:.3g} ms ({fastest.how});  "
            f"gap {100 * max(0.0, placement.latency_gap):.1f} %"
        )
    return lines


def gap_of(placement: Placement) -> str:
    """The share by which a plan may be below the best one, for people."""
    return f"{100 * max(0.0, placement.gap):.1f} %"


def colours_of(cluster: Cluster) -> dict[str, str]:
    """A colour for each model that is asked for; they repeat after ten."""
    return {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(cluster.wanted)}


def label_of(part: Part, costs: PartCosts) -> str:
    """A part and its requests a second."""
    return f"{plain(part.key)}  {costs.rate:.3g}/s"


def extent_of(lanes: Sequence[Lane]) -> int:
    """Bytes from left to right, where all that is used can be seen."""
    seen = max(max(lane.used_bytes, lane.streamed_bytes) for lane in lanes)
    widest = max(
        min(lane.server.machine.budget, int(_TORN * seen)) + lane.streamed_bytes for lane in lanes
    )
    return max(1, int(1.05 * widest))


def box_of(lane: Lane, extent: int) -> int:
    """Bytes of a server's memory that are drawn: all, but where the picture ends before."""
    return max(lane.used_bytes, min(lane.server.machine.budget, extent - lane.streamed_bytes))


def _wrapped(lane: Lane) -> list[list[tuple[Part | None, str]]]:
    """The labels of a server's parts in lines that fit its width."""
    if not lane.parts:
        return [[(None, "nothing is placed here")]]
    lines: list[list[tuple[Part | None, str]]] = [[]]
    room = _MEMORY
    for part, costs in lane.parts.items():
        text = _details(lane, part, costs)
        need = _CHARACTER * len(text) + 0.35
        if need > room and lines[-1]:
            lines.append([])
            room = _MEMORY
        lines[-1].append((part, text))
        room -= need
    return lines


def _details(lane: Lane, part: Part, costs: PartCosts) -> str:
    own = {block.pinned: block.size for block in lane.blocks if block.part == part}
    words = [f"{format_bytes(own[True])} pinned"] if own.get(True) else []
    words += [f"{format_bytes(own[False])} streamed"] if own.get(False) else []
    return f"{label_of(part, costs)}  {', '.join(words)}"


def _draw_lane(
    panel: Axes, lane: Lane, colours: Mapping[str, str], extent: int, top: float
) -> None:
    from matplotlib.patches import Rectangle

    budget, box = lane.server.machine.budget, box_of(lane, extent)
    note = format_bytes(budget) + (" ..." if box < budget else "")
    name = plain(lane.server.name)
    short = name if len(name) <= _NAME else name[: _NAME - 3] + "..."
    panel.annotate(
        f"{short}\n{note}",
        (0, top + _BOX / 2),
        (-6, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
    )

    def put(begin: int, size: int, colour: str, gid: str, hatch: str | None = None) -> None:
        panel.add_patch(
            Rectangle(
                (begin / _MB, top),
                size / _MB,
                _BOX,
                facecolor=_FREE if hatch else colour,
                edgecolor=colour if hatch else "white",
                linewidth=0.8 if hatch else 0.4,
                hatch=hatch,
                gid=gid,
            )
        )

    at, outside = 0, box + extent // 100
    for block in lane.blocks:
        colour = colours[block.part.model]
        begin = at if block.pinned else outside
        gid = f"{block.part.server} {block.part.key} {'pinned' if block.pinned else 'streamed'}"
        put(begin, block.size, colour, gid, None if block.pinned else "////")
        _write(panel, block, colour, begin, extent, top)
        if block.pinned:
            at += block.size
        else:
            outside += block.size
    put(at, lane.ring_bytes, _RING, f"{lane.server.name} ring")
    put(at + lane.ring_bytes, lane.running_bytes, _RUNNING, f"{lane.server.name} running")
    panel.plot(
        [box / _MB, 0, 0, box / _MB],
        [top, top, top + _BOX, top + _BOX],
        color=_EDGE,
        linewidth=1.4,
        clip_on=False,
    )
    if box == budget:
        panel.plot([box / _MB] * 2, [top, top + _BOX], color=_EDGE, linewidth=1.4)


def _write(panel: Axes, block: Block, colour: str, begin: int, extent: int, top: float) -> None:
    """The part's slices into a block that has room for them."""
    text = f"[{block.part.first}:{block.part.last}]"
    if _CHARACTER * (len(text) + 1) > block.size / extent * _MEMORY:
        return
    panel.text(
        (begin + block.size / 2) / _MB,
        top + _BOX / 2,
        text,
        color="white" if block.pinned else colour,
        fontsize=_LABEL,
        ha="center",
        va="center",
        bbox=None if block.pinned else {"facecolor": _FREE, "edgecolor": "none", "pad": 1.5},
    )


def _draw_labels(
    panel: Axes,
    lines: Sequence[Sequence[tuple[Part | None, str]]],
    colours: Mapping[str, str],
    extent: int,
    top: float,
) -> None:
    from matplotlib.patches import Rectangle

    inch = extent / _MB / _MEMORY
    for number, line in enumerate(lines):
        at, middle = 0.0, top + _LINE * (number + 0.6)
        for part, text in line:
            if part is not None:
                swatch = Rectangle(
                    (at * inch, middle - 0.04), 0.08 * inch, 0.08, color=colours[part.model]
                )
                panel.add_patch(swatch)
                at += 0.12
            panel.text(at * inch, middle, text, fontsize=_LABEL, va="center")
            at += _CHARACTER * len(text) + 0.23


def _draw_shares(panel: Axes, lane: Lane, top: float) -> None:
    for number, share in enumerate((lane.busy, lane.link_in, lane.link_out)):
        middle = top + 0.06 + 0.15 * number
        colour = "#3c4650" if number == 0 else "#5b8fb9"
        panel.barh(middle, 1, 0.1, color="#eef0f2")
        panel.barh(middle, min(share, 1.0), 0.1, color=colour)
        word = list(_WORDS.values())[number]
        panel.text(
            1.03, middle, f"{100 * share:.0f} % {word}", fontsize=6.5, va="center", clip_on=False
        )


def _draw_legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=plain(name)) for name, colour in colours.items()]
    handles += [
        Patch(facecolor="#4a5a78", label="solid: pinned"),
        Patch(facecolor=_FREE, edgecolor="#4a5a78", hatch="////", label="hatched: streamed"),
        Patch(facecolor=_RING, label="ring that streamed weights pass"),
        Patch(facecolor=_RUNNING, label="activations, workspace"),
        Patch(facecolor=_FREE, edgecolor=_EDGE, label="box: enclave memory for models"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=6, fontsize=8, frameon=False)


def plan_html(cluster: Cluster, placement: Placement, lanes: Sequence[Lane], path: Path) -> None:
    """Write the same as one page to zoom, which needs nothing else and no network.

    Raises:
        UsageError: the file can't be written.
    """
    data = msgspec.json.encode(_page(cluster, placement, lanes)).decode()
    template = resources.files("lasagna.cli").joinpath("plan.html").read_text("utf-8")
    # No name can end the script element: JSON has no "<" outside of strings.
    page = template.replace("@PLAN@", data.replace("<", "\\u003c"), 1)
    write_file(path, page.encode())


def _page(cluster: Cluster, placement: Placement, lanes: Sequence[Lane]) -> dict[str, object]:
    """What the page draws; sizes in bytes."""
    extent = extent_of(lanes)
    return {
        "title": headline(placement),
        "subtitles": subtitles(cluster, placement),
        "extent": extent,
        "colours": colours_of(cluster),
        "ring_colour": _RING,
        "running_colour": _RUNNING,
        "lanes": [
            {
                "name": lane.server.name,
                "budget": lane.server.machine.budget,
                "box": box_of(lane, extent),
                "facts": _facts(lane),
                "ring": lane.ring_bytes,
                "running": lane.running_bytes,
                "shares": [
                    [_WORDS["busy"], lane.busy],
                    [_WORDS["link_in"], lane.link_in],
                    [_WORDS["link_out"], lane.link_out],
                ],
                "labels": [
                    [part.model, _details(lane, part, costs)] for part, costs in lane.parts.items()
                ],
                "blocks": [_block(lane, block) for block in lane.blocks],
            }
            for lane in lanes
        ],
    }


def _facts(lane: Lane) -> str:
    server, machine = lane.server, lane.server.machine
    return (
        f"{server.name}: {format_bytes(machine.budget)} for models, {machine.lanes} threads on "
        f"{machine.cores} cores, speed {server.speed:g}\n"
        f"link of {server.bandwidth * 8 / 1e6:g} Mbit/s, {server.delay_s * 1000:g} ms"
    )


def _block(lane: Lane, block: Block) -> dict[str, object]:
    costs = lane.parts[block.part]
    return {
        "model": block.part.model,
        "part": label_of(block.part, costs),
        "facts": (
            f"in {format_bytes(costs.in_bytes)}, out {format_bytes(costs.out_bytes)} a request; "
            f"{1000 * costs.work_s:.3g} ms of the server, {1000 * costs.through_s:.3g} ms through"
        ),
        "pinned": block.pinned,
        "slices": list(zip(block.slices, block.sizes, strict=True)),
    }
