"""Promise: the pictures of a plan show every part, to scale, as its server would hold it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from tests.policy.machine import MB, linear

from lasagna.cli.plan_drawing import extent_of, plan_figure, plan_html, plan_png
from lasagna.cli.plan_lanes import Lane, lanes_of
from lasagna.errors import BudgetError, UsageError
from lasagna.policy.cluster import Cluster, Part, Server
from lasagna.policy.costs import ModelCosts, SliceCosts
from lasagna.policy.memory import divide_best
from lasagna.policy.placed import Bound, PartCosts, Placement
from lasagna.policy.stages import Machine

MACHINE: Final = Machine(40 * MB, 1, 1, 3e9, 0.0003)
BIG: Final = "</script>$x_1$"
SMALL: Final = Part("small", 0, 2, "a")
HEAD: Final = Part(BIG, 0, 2, "a")
TAILS: Final = (Part(BIG, 2, 6, "b"), Part(BIG, 2, 6, "c"))


def cluster_of(budget: int = 40 * MB) -> Cluster:
    """Servers a to c, and one that stays empty; a small model, and one of 86 MB."""
    big = linear([MB, 5 * MB, *[20 * MB] * 4], [100_000] * 6, [0.01] * 6)
    small = linear([2 * MB, 2 * MB], [10_000] * 2, [0.01] * 2)
    machine = replace(MACHINE, budget=budget)
    servers = tuple(Server(name, machine, bandwidth=10e6) for name in ("a", "b", "c", "spare"))
    return Cluster(servers, {"small": (small,), BIG: (big,)}, {"small": 4.0, BIG: 2.0})


def costs(rate: float) -> PartCosts:
    return PartCosts(0.05, 0.06, 1_000_000, 500_000, rate)


PLACEMENT: Final = Placement(
    parts={SMALL: costs(8.0), HEAD: costs(4.0), TAILS[0]: costs(2.0), TAILS[1]: costs(2.0)},
    scale=2.0,
    throughput=12.0,
    latency_s={"small": 0.06, BIG: 0.13},
    bottleneck="a's processors",
    bound=Bound(2.5, "by hand"),
    ceiling=Bound(4.0, "by guess"),
)


@pytest.fixture(scope="module")
def lanes() -> list[Lane]:
    return lanes_of(cluster_of(), PLACEMENT)


def panel_named(name: str, lanes: list[Lane]) -> Axes:
    figure = plan_figure(cluster_of(), PLACEMENT, lanes)
    (panel,) = [panel for panel in figure.axes if panel.get_label() == name]
    return panel


def test_a_lane_has_all_slices_of_its_parts_once_and_fits(lanes: list[Lane]) -> None:
    """Promise: what is drawn is what the server's own planner would pin, stream and reserve."""
    placed = {part: Counter[int]() for part in PLACEMENT.parts}
    for lane in lanes:
        assert lane.used_bytes <= lane.server.machine.budget
        assert set(lane.parts) == set(PLACEMENT.on(lane.server.name))
        for block in lane.blocks:
            placed[block.part].update(block.slices)
            assert len(block.sizes) == len(block.slices)
    for part, slices in placed.items():
        assert slices == Counter(range(part.first, part.last))
    first, second, third, spare = lanes
    assert (first.pinned_bytes, first.streamed_bytes) == (10 * MB, 0)
    assert second.streamed_bytes >= 60 * MB
    assert second.ring_bytes >= 20 * MB
    assert second.blocks[0].slices == third.blocks[0].slices
    assert (spare.blocks, spare.used_bytes) == ((), 0)


def test_shares_are_of_a_second_and_of_the_link(lanes: list[Lane]) -> None:
    """Promise: a full bar is a server, or a link, that can take no more."""
    assert lanes[0].busy == pytest.approx(12 * 0.05)
    assert lanes[0].link_in == pytest.approx(12 * 1e6 / 10e6)
    assert lanes[0].link_out == pytest.approx(12 * 0.5e6 / 10e6)


def test_replicas_are_planned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: a hundred servers alike take no longer than one; progress is told for each."""
    calls: list[object] = []
    told: list[tuple[int, int]] = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return divide_best(*arguments)

    monkeypatch.setattr("lasagna.cli.plan_lanes.divide_best", counted)
    lanes_of(cluster_of(), PLACEMENT, lambda done, total: told.append((done, total)))

    assert len(calls) == 2
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_model_that_is_run_in_one_piece_is_pinned_in_all_its_slices() -> None:
    """Promise: the forms that are one slice are drawn as the slices of the placement."""
    cluster = cluster_of()
    (small,) = cluster.models["small"]
    one = SliceCosts(4 * MB, (0.001,) * 4, (1000,) * 4)
    ends = small.cut_bytes[0], small.cut_bytes[-1]
    whole = ModelCosts((one,), ends, (20_000,), small.max_rows, "whole")
    models = {**cluster.models, "small": (small, whole)}
    placement = replace(PLACEMENT, parts={SMALL: costs(8.0)})

    lane = lanes_of(replace(cluster, models=models), placement)[0]
    assert [(block.pinned, block.slices) for block in lane.blocks] == [(True, (0, 1))]


def test_a_server_that_its_parts_do_not_fit_is_named() -> None:
    """Promise: no picture shows what a server would refuse."""
    with pytest.raises(BudgetError, match=r"server 'a': .* needs a budget of"):
        lanes_of(cluster_of(3 * MB), PLACEMENT)


def test_the_picture_has_each_part_to_scale(lanes: list[Lane]) -> None:
    """Promise: a block's length is its bytes; pinned is solid and inside, streamed is outside."""
    panel = panel_named("memory", lanes)
    boxes = {p.get_gid(): p for p in panel.patches if isinstance(p, Rectangle) and p.get_gid()}
    for lane in lanes:
        for block in lane.blocks:
            how = "pinned" if block.pinned else "streamed"
            box = boxes[f"{lane.server.name} {block.part.key} {how}"]
            assert box.get_width() == pytest.approx(block.size / MB)
            end = box.get_x() + box.get_width()
            assert (end <= 40) if block.pinned else (box.get_x() > 40)
            assert bool(box.get_hatch()) is not block.pinned
    drawn = [text.get_text() for text in panel.texts]
    for part, own in PLACEMENT.parts.items():
        assert any(text.startswith(f"{part.key}  {own.rate:g}/s") for text in drawn)
    assert "nothing is placed here" in drawn
    assert panel.get_xlim()[1] * MB == pytest.approx(extent_of(lanes), rel=1e-6)


def test_the_title_has_throughput_bottleneck_bound_and_gap(lanes: list[Lane]) -> None:
    """Promise: the picture by itself says what the plan reaches and how good that is."""
    figure = plan_figure(cluster_of(), PLACEMENT, lanes)
    said = "\n".join(text.get_text() for text in figure.texts)

    for words in ("12 requests/s", "a's processors", "15 requests/s, 2.5 times", "gap 20.0 %"):
        assert words in said


def test_a_server_far_larger_than_the_others_is_cut_off() -> None:
    """Promise: one server of 68 GB does not make the others' blocks too thin to see."""
    cluster = cluster_of()
    *others, last = cluster.servers
    large = replace(last, machine=replace(MACHINE, budget=68_000 * MB))
    cluster = replace(cluster, servers=(*others, large))
    lanes = lanes_of(cluster, PLACEMENT)

    assert extent_of(lanes) < 300 * MB
    (panel, _) = plan_figure(cluster, PLACEMENT, lanes).axes
    assert "spare\n68.0 GB ..." in [text.get_text() for text in panel.texts]


def test_png_takes_names_as_text_and_says_what_it_can_not_write(
    lanes: list[Lane], tmp_path: Path
) -> None:
    """Promise: a model's name is no formula; a wrong suffix is an error in one line."""
    plan_png(cluster_of(), PLACEMENT, lanes, tmp_path / "p.png")

    assert (tmp_path / "p.png").stat().st_size > 20_000
    with pytest.raises(UsageError, match=r"can't draw .*p\.doc"):
        plan_png(cluster_of(), PLACEMENT, lanes, tmp_path / "p.doc")


def test_the_page_has_each_slice_and_needs_no_network(lanes: list[Lane], tmp_path: Path) -> None:
    """Promise: the page can be mailed; pointing at a slice says part, bytes, and rates."""
    plan_html(cluster_of(), PLACEMENT, lanes, tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()

    data, _ = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    page = json.loads(data)
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}
    assert re.findall(r"<(?:link|img)|\bsrc=|@import", text) == []
    assert list(page["colours"]) == [BIG, "small"]
    for lane, drawn in zip(lanes, page["lanes"], strict=True):
        assert drawn["name"] == lane.server.name
        assert [
            (block["pinned"], [tuple(one) for one in block["slices"]]) for block in drawn["blocks"]
        ] == [
            (block.pinned, list(zip(block.slices, block.sizes, strict=True)))
            for block in lane.blocks
        ]
    tail = page["lanes"][1]["blocks"][-1]
    assert tail["part"] == f"{TAILS[0].key}  2/s"
    assert "in 1.00 MB, out 500 kB a request; 50 ms of the server" in tail["facts"]
