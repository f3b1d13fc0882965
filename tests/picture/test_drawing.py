"""The geometry of drawings: everything is there, and nothing lies on anything else."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from picture.plans import HALVES, THIRDS, Planned, dealt, planned

from raygraft.graph.graph import Graph
from raygraft.picture.drawing import (
    BAND,
    CHARACTER,
    LABEL_CHARACTER,
    MOST_LINES,
    PADDING,
    Arrow,
    Drawing,
    lane_width,
    lines_of,
    rounded,
    wrap,
)
from raygraft.picture.layout import tracks_of
from raygraft.picture.repeats import Repeat
from raygraft.picture.scene import Scene, draw_scene, repeats_of

Rectangle = tuple[float, float, float, float]


def scene_of(made: Planned, repeats: tuple[Repeat, ...] = ()) -> Scene:
    return draw_scene(made.plan, made.problem.graph, {}, repeats=repeats)


def both(made: Planned) -> list[Scene]:
    return [scene_of(made), scene_of(made, repeats_of(made.plan))]


def cross(a: Rectangle, b: Rectangle) -> bool:
    """Whether the insides of two rectangles (left, top, right, bottom) meet; lines count too."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def label_of(arrow: Arrow) -> Rectangle:
    size = len(arrow.label) * LABEL_CHARACTER
    left = arrow.label_x - {"start": 0.0, "middle": size / 2, "end": size}[arrow.anchor]
    return left, arrow.label_y - 9, left + size, arrow.label_y + 2


def check(drawing: Drawing) -> None:
    """Nothing lies outside, nothing on another; all arrows go down."""
    boxes = [(b.x, b.y, b.x + b.width, b.y + b.height) for b in drawing.boxes]
    labels = [label_of(arrow) for arrow in drawing.arrows if arrow.label]
    for left, top, right, bottom in (*boxes, *labels):
        assert left >= 0
        assert top >= BAND
        assert right <= drawing.width
        assert bottom <= drawing.end
    for one, other in combinations((*boxes, *labels), 2):
        assert not cross(one, other)
    for box in drawing.boxes:
        assert all(len(line) * CHARACTER <= box.width - PADDING for line in box.lines)
        assert 1 <= len(box.lines) <= MOST_LINES
    for arrow in drawing.arrows:
        for (x1, y1), (x2, y2) in pairwise(arrow.points):
            assert x1 == x2 or y1 == y2
            assert y2 >= y1
            line = (min(x1, x2), y1, max(x1, x2), y2)
            assert not any(cross(line, box) for box in boxes)


def test_boxes_of_a_cut(four_blocks: Graph) -> None:
    scene = scene_of(planned(four_blocks, 2, HALVES))
    assert [box.lane for box in scene.drawing.boxes] == [0, 1] * 4
    assert scene.drawing.boxes[0].lines == ("embed", "blk.0.attn")
    assert scene.drawing.boxes[-1].lines == ("blk.3.ffn", "head", "sample")
    tops = [box.y for box in scene.drawing.boxes]
    assert tops == sorted(set(tops))  # a chain: one below the other
    labels = [arrow.label for arrow in scene.drawing.arrows]
    assert labels == ["", *["256 B ring"] * 7, "168 B ring"]
    assert not scene.drawing.folds
    check(scene.drawing)


def test_links_between_nodes_are_of_another_kind(four_blocks: Graph) -> None:
    scene = scene_of(planned(four_blocks, 2, HALVES, nodes=("n0", "n1")))
    kinds = [arrow.kind for arrow in scene.drawing.arrows]
    assert kinds == ["control", *["tcp"] * 8]
    assert scene.drawing.arrows[1].title.startswith("a to b: 256 B tcp, each token: blk.0.attn")


def test_a_fold_holds_what_comes_again(eighty_blocks: Graph) -> None:
    whole, folded = both(planned(eighty_blocks, 2, HALVES))
    assert len(whole.drawing.boxes) == 160
    assert [box.lines for box in folded.drawing.boxes if box.stacked] == [
        ("blk.[1-78].attn",),
        ("blk.[1-78].ffn",),
    ]
    assert len(folded.drawing.boxes) == 6
    (fold,) = folded.drawing.folds
    assert fold.caption == "× 78 more: blk.1 to blk.78"
    assert fold.target in {box.key for box in whole.drawing.boxes}
    assert folded.drawing.height < whole.drawing.height / 10


def test_a_fold_that_begins_within_a_block_says_so(eighty_blocks: Graph) -> None:
    (fold,) = both(planned(eighty_blocks, 3, THIRDS))[1].drawing.folds
    assert fold.caption == "× 78 more: blk.1.attn.core to blk.79.attn.qkv"


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_nothing_lies_on_anything(thirty_blocks: Graph, devices: int) -> None:
    for rules in (HALVES[: devices - 1], THIRDS[: devices - 1], dealt(thirty_blocks, devices)):
        made = planned(thirty_blocks, devices, [rule for rule in rules if devices > 1])
        for scene in both(made):
            check(scene.drawing)
            stages = [number for group in scene.groups for number in group.stages]
            assert sorted(stages) == list(range(len(made.plan.stages)))


@settings(max_examples=40)
@given(data=st.data())
def test_any_plan_can_be_drawn(four_blocks: Graph, data: st.DataObject) -> None:
    devices = data.draw(st.integers(1, 5))
    names = st.sampled_from("abcde"[:devices])
    rules = [f"{atom.name}={data.draw(names)}" for atom in four_blocks.atoms]
    made = planned(four_blocks, devices, rules)
    scene = scene_of(made)
    check(scene.drawing)
    assert len(scene.drawing.boxes) == len(made.plan.stages)
    assert len(scene.drawing.arrows) == len(made.plan.transfers) + 1


@pytest.mark.parametrize(
    ("name", "columns", "lines"),
    [
        ("blk.3.attn", 14, ["blk.3.attn"]),
        ("blk.[8,16,24].attn.qkv", 14, ["blk.[8,16,24]", ".attn.qkv"]),
        ("blk.[1,3,5,7,9,11,13].attn", 12, ["blk.[1,3,5,", "7,9,11,13]", ".attn"]),
        ("an_unbroken_name_of_mine", 10, ["an_unbroke", "n_name_of_", "mine"]),
    ],
)
def test_long_names_are_broken(name: str, columns: int, lines: list[str]) -> None:
    assert wrap(name, columns) == lines


@given(st.text("ab.,[0-9]", min_size=1, max_size=60), st.integers(4, 20))
def test_breaking_loses_nothing(name: str, columns: int) -> None:
    lines = wrap(name, columns)
    assert "".join(lines) == name
    assert all(0 < len(line) <= columns for line in lines)


def test_a_box_counts_what_it_has_no_room_for() -> None:
    names = [f"blk.{n}.attn" for n in range(9)]
    assert lines_of(names, 14) == (*names[:5], "and 4 more")
    assert lines_of(names[:6], 14) == tuple(names[:6])


def test_lanes_share_the_page() -> None:
    widths = [lane_width(lanes) for lanes in (1, 2, 4, 8, 40)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] >= 150


def test_tracks_do_not_overlap() -> None:
    assert tracks_of([(0, 5), (5, 9), (4, 6), (0, 1)]) == [0, 0, 1, 1]


def test_paths_have_round_corners() -> None:
    assert rounded([(0, 0), (0, 20), (40, 20)]) == "M0 0L0 14Q0 20 6 20L40 20"
    assert rounded([(0, 0), (0, 4), (40, 4)]) == "M0 0L0 2Q0 4 6 4L40 4"
