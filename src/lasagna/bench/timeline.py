"""Pictures of a recording (``server.trace``): what ran when, and where each thread's time went."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from lasagna.bench.spans import (
    IDLE,
    WORDS,
    Piece,
    Rate,
    batches,
    fault_rates,
    models,
    pieces_by_thread,
    shares,
)
from lasagna.errors import UsageError
from lasagna.server.trace import Span, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "batch_growth_png",
    "emulation_note",
    "percent",
    "shares",
    "shown",
    "timeline_html",
    "timeline_png",
]

# A dark shade for even slices, a light one for odd ones.
_Shades = tuple[str, str]
_MODEL_COLOURS: Final[tuple[_Shades, ...]] = (
    ("#1f6aa5", "#7db4de"),
    ("#b96a00", "#f2b552"),
    ("#8e3a80", "#d79bcd"),
    ("#0b7f86", "#7accd0"),
    ("#6b4a2f", "#bf9c7c"),
    ("#4a5a78", "#a3b0c9"),
)
_KIND_COLOURS: Final[dict[str, _Shades]] = {
    "stall": ("#d0021b", "#ff5a5f"),
    "load": ("#2e8b57", "#8fd0aa"),
    "open": ("#e07bb0", "#f2b8d6"),
    "seal": ("#5b3fa0", "#a08ad6"),
    "gather": ("#8a8420", "#cdc766"),
    "pin": ("#333333", "#777777"),
}
_BACKGROUND: Final = "#eef0f2"
_COMPUTE: Final = "#3c4650"
_FAULTS: Final = "#bc4b51"
_INKS: Final = ("#ffffff", "#000000")
_MAX_NAME: Final = 40
_SMALL: Final = 7


def shown(name: str) -> str:
    """A name from a file that anybody may have written: short, and without control characters."""
    plain = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
    return plain if len(plain) <= _MAX_NAME else plain[: _MAX_NAME - 3] + "..."


def percent(share: float) -> str:
    """A share for people: ``81 %``; ``<1 %`` for what is there but hardly."""
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def emulation_note(trace: Trace) -> str:
    """What a title says of an emulated EPC; "" if there was none."""
    profile = trace.header.emulated
    return f"EMULATED EPC ({shown(profile)}): it protects nothing" if profile else ""


def _subtitle(trace: Trace) -> str:
    header = trace.header
    lanes = f"{header.lanes} compute thread{'s' if header.lanes > 1 else ''}"
    facts = (f"policy {header.policy}", lanes, header.machine, header.started)
    return ", ".join(shown(fact) for fact in facts if fact)


def _hue(model: int) -> _Shades:
    return _MODEL_COLOURS[model % len(_MODEL_COLOURS)]


def _shades(span: Span, order: Mapping[str, int]) -> _Shades:
    if span.kind == "compute":
        return _hue(order[span.model])
    return _KIND_COLOURS[span.kind]


def _compute_colour(trace: Trace) -> str:
    """For all models together."""
    return _MODEL_COLOURS[0][0] if len(models(trace)) == 1 else _COMPUTE


def _shade(span: Span) -> int:
    return span.slice % 2 if span.slice >= 0 else 0


def _label(span: Span) -> str:
    if span.slice < 0:
        return ""
    return f"s{span.slice} x{span.rows}" if span.rows else f"s{span.slice}"


def _legend(trace: Trace) -> list[tuple[str, str]]:
    """Words and colours of what occurs."""
    order = {model: place for place, model in enumerate(models(trace))}
    words = list(WORDS)
    found: dict[tuple[int, int], tuple[str, str]] = {}
    for span in trace.spans:
        own = span.kind == "compute" and len(order) > 1
        word = WORDS[span.kind] + (f", {shown(span.model)}" if own else "")
        place = words.index(span.kind), order[span.model] if own else 0
        found[place] = word, _shades(span, order)[0]
    return [found[place] for place in sorted(found)]


def timeline_png(trace: Trace, path: Path, begin_s: float, end_s: float) -> None:
    """Draw a window: a lane a thread, where its time went, and page faults if there were any.

    Args:
        trace: the recording.
        path: the file; its suffix chooses the format.
        begin_s: of the window.
        end_s: of the window.

    Raises:
        UsageError: the window is empty, or the file can't be written.
    """
    from matplotlib.patches import Patch

    lanes = pieces_by_thread(trace, begin_s, end_s)
    rates = [rate for rate in fault_rates(trace.faults, begin_s, end_s) if rate.pages]
    height = 0.62 * len(lanes)
    with _drawing((15, 1.7 + height + (0.9 if rates else 0)), path) as figure:
        heights = [height, 0.9] if rates else [height]
        panels = figure.subplots(
            len(heights), 2, squeeze=False, width_ratios=[5, 1.4], height_ratios=heights
        )
        note = emulation_note(trace)
        figure.suptitle(
            "  |  ".join(filter(None, [note, ", ".join(map(shown, trace.header.models))])),
            color="#b00020" if note else "black",
            fontweight="bold",
        )
        _lanes(panels[0, 0], trace, lanes, 72 * 15 * 0.72 / (end_s - begin_s))
        panels[0, 0].set_title(_subtitle(trace), loc="left", fontsize=9)
        _share_bars(panels[0, 1], shares(trace, begin_s, end_s), _compute_colour(trace))
        if rates:
            _fault_strip(panels[1, 0], rates)
            panels[0, 0].tick_params(labelbottom=False)
            panels[1, 1].axis("off")
        for panel in panels[:, 0]:
            panel.set_xlim(begin_s, end_s)
            panel.spines[["top", "right"]].set_visible(False)
            panel.ticklabel_format(axis="x", useOffset=False)
        panels[-1, 0].set_xlabel("seconds since the recording began")
        swatches = [*_legend(trace.between(begin_s, end_s)), (IDLE, _BACKGROUND)]
        figure.legend(
            handles=[Patch(color=colour, label=word) for word, colour in swatches],
            loc="outside lower center",
            ncols=min(9, len(swatches)),
            fontsize=8,
            frameon=False,
        )


@contextmanager
def _drawing(size: tuple[float, float], path: Path) -> Iterator[Figure]:
    """A figure that is saved at the end. Names in it are text, never formulas."""
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        try:
            figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")
        except (OSError, ValueError) as error:
            raise UsageError(f"can't draw {path}: {error}") from None


def _lanes(
    panel: Axes, trace: Trace, lanes: Mapping[str, Sequence[Piece]], points_a_second: float
) -> None:
    order = {model: place for place, model in enumerate(models(trace))}
    for lane, own in enumerate(lanes.values()):
        panel.axhspan(lane - 0.4, lane + 0.4, color=_BACKGROUND, linewidth=0)
        if not own:
            continue
        bars = [(piece.begin_s, piece.end_s - piece.begin_s) for piece in own]
        colours = [_shades(piece.span, order)[_shade(piece.span)] for piece in own]
        panel.broken_barh(bars, (lane - 0.4, 0.8), facecolors=colours, linewidth=0)
        if len(order) > 1:  # whose weights, whose wait
            others = [place for place, piece in enumerate(own) if piece.span.kind != "compute"]
            panel.broken_barh(
                [bars[place] for place in others],
                (lane + 0.3, 0.1),
                facecolors=[_hue(order[own[place].span.model])[0] for place in others],
                linewidth=0,
            )
        for piece in own:
            _write(panel, lane, piece, points_a_second)
    panel.set_yticks(range(len(lanes)), list(map(shown, lanes)))
    panel.set_ylim(len(lanes) - 0.5, -0.5)


def _write(panel: Axes, lane: int, piece: Piece, points_a_second: float) -> None:
    """The slice and its rows into a bar, or the slice alone, or nothing."""
    label = _label(piece.span)
    room = (piece.end_s - piece.begin_s) * points_a_second / (0.7 * _SMALL)
    for text in (label.replace(" ", "\n"), label.partition(" ")[0]):
        if text and max(map(len, text.split("\n"))) < room:
            panel.text(
                (piece.begin_s + piece.end_s) / 2,
                lane,
                text,
                color=_INKS[_shade(piece.span)],
                fontsize=_SMALL,
                ha="center",
                va="center",
            )
            return


def _share_bars(panel: Axes, lanes: Mapping[str, Mapping[str, float]], compute: str) -> None:
    for lane, found in enumerate(lanes.values()):
        left = 0.0
        for kind, share in found.items():
            colour = {"compute": compute, IDLE: _BACKGROUND}.get(kind)
            colour = colour or _KIND_COLOURS[kind][0]
            panel.barh(lane - 0.28, share, 0.24, left=left, color=colour)
            left += share
        text = ", ".join(f"{WORDS[kind]} {percent(share)}" for kind, share in found.items())
        lines = textwrap.fill(text.replace(" %", "\xa0%"), 46)
        panel.text(0, lane - 0.1, lines, fontsize=_SMALL, va="top", linespacing=1.1)
    panel.set_xlim(0, 1)
    panel.set_ylim(len(lanes) - 0.5, -0.5)
    panel.set_title("share of time", loc="left", fontsize=9)
    panel.axis("off")


def _fault_strip(panel: Axes, rates: Sequence[Rate]) -> None:
    panel.bar(
        [rate.begin_s for rate in rates],
        [rate.pages for rate in rates],
        [rate.end_s - rate.begin_s for rate in rates],
        align="edge",
        color=_FAULTS,
    )
    panel.set_ylabel("page faults\na second", fontsize=8)
    panel.yaxis.set_major_formatter("{x:,.0f}")


def batch_growth_png(trace: Trace, path: Path) -> None:
    """Draw the mean rows of a batch over the slice number, and their range, for each model.

    Raises:
        UsageError: no slice ran, or the file can't be written.
    """
    found = batches(trace)
    if not found:
        raise UsageError("the recording has no slice that ran with a number of rows")
    with _drawing((9, 4.2), path) as figure:
        panel = figure.subplots()
        for place, model in enumerate(models(trace)):
            numbers = sorted(number for name, number in found if name == model)
            if not numbers:
                continue
            rows = [found[model, number] for number in numbers]
            dark, light = _hue(place)
            panel.fill_between(
                numbers,
                [min(own) for own in rows],
                [max(own) for own in rows],
                step="mid",
                color=light,
                alpha=0.25,
                linewidth=0,
            )
            means = [sum(own) / len(own) for own in rows]
            label = f"{shown(model)}, {sum(map(len, rows)):,} batches"
            panel.step(numbers, means, where="mid", color=dark, label=label)
        panel.set_title("Rows of a batch by slice: mean, smallest and largest", loc="left")
        panel.set_xlabel("slice")
        panel.set_ylabel("rows")
        panel.set_ylim(bottom=0)
        panel.locator_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        note = emulation_note(trace)
        if note:
            figure.suptitle(note, color="#b00020", fontsize=10, fontweight="bold")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def timeline_html(trace: Trace, path: Path, begin_s: float, end_s: float) -> None:
    """Write the same as one page to zoom and pan, which needs nothing else and no network.

    Raises:
        UsageError: the window is empty, or the file can't be written.
    """
    data = msgspec.json.encode(_page(trace, begin_s, end_s)).decode()
    template = resources.files("lasagna.bench").joinpath("timeline.html").read_text("utf-8")
    # No name can end the script element: JSON has no "<" outside of strings.
    page = template.replace("@TRACE@", data.replace("<", "\\u003c"), 1)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"can't write {path}: {error.strerror}") from None


def _page(trace: Trace, begin_s: float, end_s: float) -> dict[str, object]:
    """What the page draws; ``timeline.html`` tells how it reads a span."""
    names = models(trace)
    order = {model: place for place, model in enumerate(names)}
    lanes = []
    for thread, own in pieces_by_thread(trace, begin_s, end_s).items():
        parts: dict[Span, list[float]] = {}
        for piece in own:
            parts.setdefault(piece.span, []).extend((piece.begin_s, piece.end_s))
        rows = [
            [
                round(span.begin_s, 7),
                round(span.end_s, 7),
                span.kind,
                order[span.model],
                span.slice,
                span.rows,
                span.run,
                [round(second, 7) for second in seconds],
            ]
            for span, seconds in parts.items()
        ]
        lanes.append({"name": shown(thread), "spans": rows})
    return {
        "title": ", ".join(map(shown, trace.header.models)),
        "warning": emulation_note(trace),
        "subtitle": _subtitle(trace),
        "begin": begin_s,
        "end": end_s,
        "models": [shown(name) for name in names],
        "model_colours": list(map(_hue, range(len(names)))),
        "compute_colour": _compute_colour(trace),
        "kind_colours": _KIND_COLOURS,
        "background": _BACKGROUND,
        "faults_colour": _FAULTS,
        "inks": _INKS,
        "words": WORDS,
        "legend": [*_legend(trace.between(begin_s, end_s)), (IDLE, _BACKGROUND)],
        "lanes": lanes,
        "faults": [
            (rate.begin_s, rate.end_s, rate.pages, rate.threads)
            for rate in fault_rates(trace.faults, begin_s, end_s)
        ],
    }
