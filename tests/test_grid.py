"""Token orders and gather tables, checked on grids whose values are the tokens' own coordinates."""

import itertools
import re

import pytest
import torch

from paroattn.grid import ORDERS, TILES, Grid, Layout, TextSpan, check_order, token_order

GRID = Grid(3, 5, 7)


def coordinates(grid: Grid) -> list[tuple[int, int, int]]:
    """(frame, row, column) of every token in the model's order."""
    return list(itertools.product(*map(range, grid)))


def walk(grid: Grid, order: str) -> list[tuple[int, int, int]]:
    """The same coordinates in the order of nested loops over axes, outermost first."""
    axes = ["FHW".index(axis) for axis in order]
    sizes = tuple(grid)
    found = []
    for place in itertools.product(*(range(sizes[axis]) for axis in axes)):
        token = [0, 0, 0]
        for axis, value in zip(axes, place, strict=True):
            token[axis] = value
        found.append(tuple(token))
    return found


def walk_tiles(grid: Grid, tile: Grid) -> list[tuple[int, int, int]]:
    """The same coordinates box by box."""
    starts = [range(0, size, step) for size, step in zip(grid, tile, strict=True)]
    found = []
    for corner in itertools.product(*starts):
        ends = [min(first + step, size) for first, step, size in zip(corner, tile, grid, strict=True)]
        found += itertools.product(*(range(first, end) for first, end in zip(corner, ends, strict=True)))
    return found


@pytest.mark.parametrize("order", ORDERS)
def test_an_axis_order_visits_tokens_as_nested_loops_do(order):
    assert [coordinates(GRID)[token] for token in token_order(GRID, order)] == walk(GRID, order)


@pytest.mark.parametrize("tile", [*TILES, "2x2x3", "3x5x7", "1x1x1", "99x99x99"])
@pytest.mark.parametrize("grid", [GRID, Grid(8, 8, 8), Grid(17, 6, 9)], ids=str)
def test_a_tile_visits_tokens_box_by_box_with_smaller_boxes_at_the_border(grid, tile):
    visited = [coordinates(grid)[token] for token in token_order(grid, tile)]
    assert visited == walk_tiles(grid, Grid.parse(tile))


def test_known_orders_of_a_small_grid():
    grid = Grid(2, 1, 3)
    assert token_order(grid, "FHW").tolist() == [0, 1, 2, 3, 4, 5]
    assert token_order(grid, "WHF").tolist() == [0, 3, 1, 4, 2, 5]
    assert token_order(grid, "2x1x2").tolist() == [0, 1, 3, 4, 2, 5]


def test_the_six_orders_differ_from_each_other():
    assert len({tuple(token_order(GRID, order).tolist()) for order in ORDERS}) == 6


@pytest.mark.parametrize("order", [*ORDERS, *TILES])
def test_reordering_and_going_back_changes_nothing(order):
    index = token_order(GRID, order)
    x = torch.randn(GRID.tokens, 3)
    assert index.dtype == torch.int64
    assert torch.equal(x[index][index.argsort()], x)


@pytest.mark.parametrize("text", [TextSpan(), TextSpan(4, "prefix"), TextSpan(4, "suffix")], ids=str)
def test_a_table_puts_reordered_video_first_and_text_last(text):
    layout = Layout(GRID, text)
    prompt = [("text", n, 0) for n in range(text.tokens)]
    sequence = prompt + coordinates(GRID) if text.side == "prefix" else coordinates(GRID) + prompt
    table = layout.table(("WFH", "2x2x3", "FHW"))
    assert table.dtype == torch.int32
    assert table.shape == (3, layout.tokens)
    expected = [walk(GRID, "WFH"), walk_tiles(GRID, Grid(2, 2, 3)), walk(GRID, "FHW")]
    assert [[sequence[position] for position in row] for row in table] == [video + prompt for video in expected]


@pytest.mark.parametrize(("text", "grid"), [("13x30x45", Grid(13, 30, 45)), ("1x2x3", Grid(1, 2, 3))])
def test_a_grid_reads_what_it_writes(text, grid):
    assert Grid.parse(text) == grid
    assert str(grid) == text
    assert tuple(grid) == tuple(map(int, text.split("x")))


@pytest.mark.parametrize("text", ["", "1x2", "1x2x3x4", "0x1x1", "01x1x1", "1x-2x3", "1 x 2 x 3", "1x2x3\n", "axbxc"])
def test_malformed_grids_are_refused(text):
    with pytest.raises(ValueError, match=r"FRAMESxHEIGHTxWIDTH.*; got " + re.escape(repr(text))):
        Grid.parse(text)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3", None])
def test_grid_sizes_must_be_positive_integers(size):
    with pytest.raises(ValueError, match="height of a grid must be a positive integer"):
        Grid(1, size, 1)


@pytest.mark.parametrize("order", ["fhw", "FHH", "FH", "", "4x4", "0x4x4"])
def test_unknown_orders_are_refused(order):
    with pytest.raises(ValueError, match=r"an order must be one of FHW, .* or a tile such as 4x4x4"):
        check_order(order)
    with pytest.raises(ValueError, match="an order must be one of"):
        token_order(GRID, order)


def test_malformed_text_spans_are_refused():
    with pytest.raises(ValueError, match="prefix or suffix; got 'left'"):
        TextSpan(3, "left")
    with pytest.raises(ValueError, match="0 or more tokens; got -1"):
        TextSpan(-1)
