"""Promise: pictures and shares count every moment once, and no name in a recording can do harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lasagna.bench.spans import IDLE, WORDS, Rate, fault_rates, pieces, slice_totals, threads
from lasagna.bench.timeline import batch_growth_png, percent, shares, timeline_html, timeline_png
from lasagna.errors import UsageError
from lasagna.server.trace import Faults, Header, Kind, Span, Trace

HOSTILE = "</script><script>alert(1)</script>"
EVIL = (HOSTILE, "<!--<script>", r"$\frac{", "_hidden", "a\x1b[2J\u202eb", "@TRACE@", "n" * 500, "")


def trace(
    *spans: Span,
    faults: tuple[Faults, ...] = (),
    models: tuple[str, ...] = ("net",),
    lanes: int = 1,
) -> Trace:
    header = Header(
        started="now", models=models, lanes=lanes, emulated="", policy="lasagna", machine="here"
    )
    return Trace(header, spans, faults)


def span(
    kind: Kind,
    begin_s: float,
    end_s: float,
    thread: str = "compute 0",
    *,
    model: str = "net",
    number: int = -1,
    rows: int = 0,
) -> Span:
    return Span(thread, kind, begin_s, end_s, model, number, rows)


def page(path: Path) -> tuple[str, dict[str, Any]]:
    """A page, and what it draws."""
    text = path.read_text()
    data = text.partition('id="trace">')[2].partition("</script>")[0]
    found: dict[str, Any] = json.loads(data)
    return text, found


# On a grid: times coincide often, and sums are exact.
ticks = st.integers(0, 64)


@st.composite
def grid_spans(draw: st.DrawFn) -> Span:
    begin, end = sorted((draw(ticks), draw(ticks)))
    thread = draw(st.sampled_from(["compute 0", "compute 1", "loader"]))
    return span(draw(st.sampled_from(get_args(Kind))), begin, end, thread)


@given(st.lists(grid_spans(), max_size=20), ticks, st.integers(1, 64))
def test_shares_are_those_of_a_stopwatch(spans: list[Span], begin: int, length: int) -> None:
    """Every tick belongs to the innermost span, or is idle; the shares of a lane add up to 1."""
    found = shares(trace(*spans, lanes=2), begin, begin + length)

    assert {"compute 0", "compute 1"} <= set(found)
    for thread, own in found.items():
        assert sum(own.values()) == pytest.approx(1)
        assert min(own.values()) >= 0
        assert list(own) == [kind for kind in WORDS if kind in own]
        counted = dict.fromkeys(own, 0.0)
        for tick in range(begin, begin + length):
            running = [
                one
                for one in spans
                if one.thread == thread and one.begin_s <= tick and one.end_s > tick
            ]
            # The last in this order; of equals the last in the file.
            inner = sorted(running, key=lambda one: (one.begin_s, -one.end_s))
            counted[inner[-1].kind if inner else IDLE] += 1 / length
        assert own == pytest.approx(counted)


def test_stall_inside_a_run_counts_once() -> None:
    one = trace(span("compute", 0, 10), span("stall", 2, 4), span("seal", 9, 12))

    assert shares(one, 0, 20)["compute 0"] == pytest.approx(
        {"compute": 0.35, "stall": 0.1, "seal": 0.15, "idle": 0.4}
    )


def test_what_was_interrupted_goes_on_behind() -> None:
    outer, inner = span("compute", 0, 10), span("stall", 2, 4)

    found = [(one.span, one.begin_s, one.end_s) for one in pieces([inner, outer], 1, 9)]

    assert found == [(outer, 1, 2), (inner, 2, 4), (outer, 4, 9)]


def test_lanes_stand_in_order_also_without_spans() -> None:
    spans = [span("load", 0, 1, thread) for thread in ("main", "other", "loader", "compute 2")]

    assert threads(trace(*spans, lanes=11)) == (
        *(f"compute {number}" for number in range(11)),
        "loader",
        "main",
        "other",
    )


@pytest.mark.parametrize(("begin", "end"), [(1, 1), (2, 1), (float("nan"), 1)])
def test_empty_window_is_refused(tmp_path: Path, begin: float, end: float) -> None:
    one = trace(span("compute", 0, 1))
    for draw in (timeline_png, timeline_html):
        with pytest.raises(UsageError, match="a window ends after it begins"):
            draw(one, tmp_path / "out.png", begin, end)
    with pytest.raises(UsageError, match="a window ends after it begins"):
        shares(one, begin, end)


def test_slice_totals_add_all_threads_and_count_batches() -> None:
    one = trace(
        span("compute", 0, 4, number=3, rows=2),
        span("stall", 1, 2, number=3),
        span("compute", 4, 6, "compute 1", number=3, rows=5),
        span("load", 0, 1, "loader", number=7),
        span("seal", 6, 9),
    )
    first, second = slice_totals(one, 0, 10)

    assert (first.model, first.slice, first.runs, first.mean_rows) == ("net", 3, 2, 3.5)
    assert first.seconds == {"compute": 5, "stall": 1}
    assert (second.slice, second.runs, second.mean_rows) == (7, 0, 0)


def test_fault_rates_are_of_the_time_since_the_sample_before() -> None:
    samples = (Faults(6, 40, 0.5), Faults(2, 10, 1.0), Faults(6, 3, 0.25), Faults(8, 1, 0.25))

    assert fault_rates(samples, 1, 7) == [
        Rate(1, 2, 5, 0.5),
        Rate(2, 6, 10, 0.125),
        Rate(6, 7, 2, 0.25),
    ]


def test_share_for_people_hides_nothing() -> None:
    assert [percent(share) for share in (0, 0.001, 0.81, 1)] == ["0 %", "<1 %", "81 %", "100 %"]


@pytest.mark.parametrize(("models", "emulated"), [(("net",), ""), (EVIL, "sgx1-128")])
def test_pictures_are_drawn_of_any_names(
    tmp_path: Path, models: tuple[str, ...], emulated: str
) -> None:
    spans = [
        span(kind, number, number + 1.5, thread, model=model, number=number % 3 - 1, rows=number)
        for number, kind in enumerate(get_args(Kind))
        for model in models
        for thread in ("compute 0", "$x^{$", "_")
    ]
    one = trace(*spans, faults=(Faults(4, 9, 0.1),), models=models)
    header = Header(
        started="now", models=models, lanes=2, emulated=emulated, policy="$_{$", machine="_"
    )
    one = Trace(header, one.spans, one.faults)
    timeline_png(one, tmp_path / "timeline.png", 0.5, 8)
    batch_growth_png(one, tmp_path / "batches.png")

    for name in ("timeline.png", "batches.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_picture_says_that_the_epc_is_emulated(tmp_path: Path) -> None:
    one = trace(span("compute", 0, 1, number=1, rows=1))
    header = Header(
        started="now", models=("net",), lanes=1, emulated="sgx1-128", policy="", machine=""
    )
    for name, header_ in (("real", one.header), ("emulated", header)):
        timeline_html(Trace(header_, one.spans, ()), tmp_path / f"{name}.html", 0, 1)
        timeline_png(Trace(header_, one.spans, ()), tmp_path / f"{name}.svg", 0, 1)

    assert page(tmp_path / "real.html")[1]["warning"] == ""
    warning = "EMULATED EPC (sgx1-128): it protects nothing"
    assert page(tmp_path / "emulated.html")[1]["warning"] == warning
    assert "EMULATED" in (tmp_path / "emulated.svg").read_text()
    assert "EMULATED" not in (tmp_path / "real.svg").read_text()


def test_page_holds_the_spans_with_their_own_time(tmp_path: Path) -> None:
    one = trace(
        span("compute", 0, 10, number=12, rows=8),
        span("stall", 2, 4, number=12),
        span("compute", 20, 30, number=13),
        faults=(Faults(5, 10, 1.0),),
    )
    timeline_html(one, tmp_path / "page.html", 1, 15)
    _, data = page(tmp_path / "page.html")

    assert data["lanes"] == [
        {
            "name": "compute 0",
            "spans": [
                [0, 10, "compute", 0, 12, 8, 0, [1, 2, 4, 10]],
                [2, 4, "stall", 0, 12, 0, 0, [2, 4]],
            ],
        }
    ]
    assert data["faults"] == [[1, 5, 2, 0.2]]
    assert [word for word, _ in data["legend"]] == ["computing", "stalled", "idle"]


def test_no_name_leaves_its_place_in_the_page(tmp_path: Path) -> None:
    """A hostile name is data, in one script element, whatever it holds; so are all other texts."""
    plain = trace(span("compute", 0, 1))
    header = Header(
        started=HOSTILE, models=EVIL, lanes=1, emulated=HOSTILE, policy=HOSTILE, machine=HOSTILE
    )
    spans = tuple(span("load", 0, 1, HOSTILE, model=model) for model in EVIL)
    timeline_html(plain, tmp_path / "plain.html", 0, 1)
    timeline_html(Trace(header, spans, ()), tmp_path / "page.html", 0, 1)
    plain_text, _ = page(tmp_path / "plain.html")
    text, data = page(tmp_path / "page.html")

    assert text.count("<") == plain_text.count("<")
    assert "alert(1)</script>" not in text
    assert data["models"][0] == HOSTILE
    assert data["models"][4] == "a\ufffd[2J\ufffdb"
    assert data["models"][5] == "@TRACE@"
    assert len(data["models"][6]) == 40


def test_page_needs_no_network(tmp_path: Path) -> None:
    timeline_html(trace(span("compute", 0, 1)), tmp_path / "page.html", 0, 1)
    text, _ = page(tmp_path / "page.html")

    assert "default-src 'none'" in text
    assert not [word for word in ("http:", "https:", " src=", "href", "@import") if word in text]


def test_page_makes_no_markup_of_text() -> None:
    template = Path(timeline_html.__code__.co_filename).with_suffix(".html").read_text()

    assert not [
        word for word in ("innerHTML", "outerHTML", "insertAdj", "eval") if word in template
    ]


def test_batches_need_slices_that_ran(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no slice that ran"):
        batch_growth_png(trace(span("load", 0, 1, number=1, rows=4)), tmp_path / "out.png")


def test_files_that_can_not_be_written(tmp_path: Path) -> None:
    one = trace(span("compute", 0, 1, number=1, rows=1))

    with pytest.raises(UsageError, match="can't draw"):
        timeline_png(one, tmp_path / "none" / "out.png", 0, 1)
    with pytest.raises(UsageError, match="can't draw"):
        timeline_png(one, tmp_path / "out.unknown", 0, 1)
    with pytest.raises(UsageError, match="can't draw"):
        batch_growth_png(one, tmp_path / "none" / "out.png")
    with pytest.raises(UsageError, match="can't write"):
        timeline_html(one, tmp_path / "none" / "out.html", 0, 1)


def test_picture_without_a_suffix_is_a_png_of_that_name(tmp_path: Path) -> None:
    timeline_png(trace(span("compute", 0, 1)), tmp_path / "out", 0, 1)

    assert (tmp_path / "out").read_bytes().startswith(b"\x89PNG")
