"""Patterns: the rule and the key sets that compute it, with no other code between them; their compositions."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_attn import Grid, create_block, kept
from vision_attn.key_set import Neighbours
from vision_attn.pattern import (
    All,
    BlindSpot,
    Column,
    Global,
    Past,
    PerHead,
    Row,
    Window,
    blind_spot,
    cycle_reach,
)

sizes = st.integers(1, 13)


def patterns(case):
    """Of all steps and all heads."""
    steps = [step.pattern for step in case.block().steps]
    return list(dict.fromkeys(part for pattern in steps for part in pattern.by_head()))


def pairs(keys, grid):
    """How often each query meets each key in a key set: (positions, positions). Padding must not be met."""
    query, key = keys.numbers(grid, "cpu")
    query, key = query[:, :, None] + 1, key[:, None, :] + 1  # padding is 0
    seen = torch.ones(query.shape[0], query.shape[1], key.shape[2], dtype=torch.bool)
    if keys.causal:
        assert keys.mask(grid, "cpu") is None and seen.shape[1] == seen.shape[2]
        seen = seen.tril()
    elif (mask := keys.mask(grid, "cpu")) is not None:
        seen = mask.expand_as(seen)
    met = torch.zeros(grid.size + 1, grid.size + 1, dtype=torch.long)
    met.index_put_((query.expand_as(seen)[seen], key.expand_as(seen)[seen]), torch.tensor(1), accumulate=True)
    assert not met[1:, 0].any(), "padding is looked at"
    return met[1:, 1:]


def assert_sets_are_the_rule(pattern, grid):
    sets = pattern.key_sets()
    assert torch.equal(sum(pairs(keys, grid) for keys in sets), pattern.mask(grid).long())
    for keys in sets:
        assert torch.equal(sum(pairs(part, grid) for part in keys.parts(grid)), pairs(keys, grid))
        assert_place_is_inverse(keys, grid)
        for part in keys.parts(grid):
            assert_place_is_inverse(part, grid)


def assert_place_is_inverse(keys, grid):
    number = torch.arange(1, grid.size + 1).reshape(1, grid.height, grid.width, 1)
    placed = keys.place(keys.queries(number), grid, -7)
    is_query = torch.isin(number, keys.queries(number).contiguous())
    assert torch.equal(placed, torch.where(is_query, number, -7))
    assert is_query.all() or not keys.every
    flat = keys.queries(number).flatten()
    assert len(flat[flat > 0].unique()) == (flat > 0).sum(), "a query is in two groups"


@settings(max_examples=20, deadline=None, derandomize=True)
@given(height=sizes, width=sizes, prefix=st.integers(0, 3))
def test_mask_is_the_rule(pattern_case, height, width, prefix):
    grid = Grid(height, width)
    positions = [(y, x) for y in range(height) for x in range(width)]
    step = max(7, grid.size // 7)  # of the keys that a query is asked about: integers are slow
    for pattern in patterns(pattern_case):
        mask = pattern.mask(grid, prefix)
        assert mask.shape == (prefix + grid.size, prefix + grid.size)
        assert mask[:, :prefix].all()
        assert not mask[:prefix, prefix:].any() if pattern.causal else mask[:prefix].all()
        for i, ((qy, qx), row) in enumerate(zip(positions, mask[prefix:, prefix:].tolist())):
            some = slice(i % step, None, step)
            assert row[some] == [bool(pattern.allowed(qy, qx, ky, kx, grid)) for ky, kx in positions[some]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(height=sizes, width=sizes)
def test_key_sets_are_disjoint_and_complete(pattern_case, height, width):
    """Numbers each position, sends the numbers through each key set, and counts the pairs that meet."""
    for pattern in patterns(pattern_case):
        assert_sets_are_the_rule(pattern, Grid(height, width))


@pytest.mark.parametrize("grid", [Grid(37, 5), Grid(67, 3), Grid(23, 29)])
def test_key_sets_of_tall_grids_too(pattern_case, grid):
    for pattern in patterns(pattern_case):
        assert_sets_are_the_rule(pattern, grid)


@pytest.mark.parametrize("options", [{}, {"past": True}, {"shift": True}, {"shift": True, "dilation": (2, 3)}])
def test_tiles_of_any_size_hold_a_window(options, monkeypatch):
    """Also those of a GPU, whose kernels want more queries at a time."""
    assert Neighbours((3, 1)).tile("cuda") == (8, 8) != Neighbours((3, 1)).tile("cpu")
    monkeypatch.setattr(Neighbours, "tile", lambda self, device: (8, 3))
    kept._tensors.clear()
    for grid in (Grid(13, 17), Grid(5, 29), Grid(1, 1)):
        assert_sets_are_the_rule(Window((3, 1), **options), grid)
    kept._tensors.clear()


@pytest.mark.parametrize("radius", [(0, 31), (31, 0), (0, 13)])
def test_a_window_on_a_line_is_cut_into_long_tiles(radius):
    """Keys that are looked at but not wanted are fewer than those wanted, and tables are right."""
    keys, grid = Neighbours(radius), Grid(1, 97) if radius[0] == 0 else Grid(97, 1)
    tile, window = max(keys.tile("cpu")), 2 * max(radius) + 1
    assert 8 < tile and tile + window - 1 <= 1.6 * window
    assert_sets_are_the_rule(Window(radius), grid)


def test_tables_are_kept_only_where_they_have_numbers():
    block, grid = create_block("window", 16, kernel_size=3, attn_drop=0.1).eval(), Grid(11, 19)
    x = torch.randn(2, grid.size, 16)
    kept._tensors.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        block(torch.empty(2, grid.size, 16), grid)
    for transform in (torch.func.functionalize, torch.func.vmap, lambda mix: torch.func.grad(lambda x: mix(x).sum())):
        transform(lambda x: block(x.reshape(-1, grid.size, 16), grid))(x)  # whose tensors wrap others
    assert not kept._tensors
    with torch.inference_mode():  # whose tensors no backward takes
        wanted = block(x, grid).clone()
    assert torch.equal(block(x, grid), wanted)
    block.train()(x, grid).sum().backward()
    assert block.qkv.weight.grad.isfinite().all()


def test_tables_of_a_captured_graph_are_its_own(monkeypatch):
    """Their memory belongs to the graph, and their numbers are there only once it is replayed."""
    keys, grid, made = Neighbours((1, 2)), Grid(5, 7), []
    monkeypatch.setattr(Neighbours, "tables", lambda self, grid, device: made.append(device) or (None, None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kept._tensors.clear()
    for _ in range(2):
        keys.mask(grid, "cuda:0")
        keys.mask(grid, "cpu")
    assert [device.type for device in made] == ["cuda", "cpu", "cuda"]
    kept._tensors.clear()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(height=sizes, width=sizes, layers=st.integers(1, 3), data=st.data())
def test_reach_is_where_paths_lead(pattern_case, height, width, layers, data):
    grid = Grid(height, width)
    start = data.draw(st.integers(0, grid.size - 1))
    for pattern in patterns(pattern_case):
        sees = [{i for i, s in enumerate(row) if s} for row in pattern.mask(grid).tolist()]
        reached = {start}
        for _ in range(layers):
            reached = reached.union(*(sees[i] for i in reached))
        assert set(pattern.reach(grid, layers)[start].nonzero().flatten().tolist()) == reached


def test_drawing_is_the_rule(pattern_case):
    grid = Grid(7, 11)
    for pattern in patterns(pattern_case):
        lines = pattern.draw(grid, 3, 8).split("\n")
        assert [len(line) for line in lines] == [11] * 7
        for y, line in enumerate(lines):
            for x, sign in enumerate(line):
                seen = bool(pattern.allowed(3, 8, y, x, grid))
                assert sign == ("o@" if (y, x) == (3, 8) else "-#")[seen]


def test_every_position_sees_itself_unless_it_is_told_not_to(pattern_case):
    told = pattern_case.options.get("include_self") is False
    seen = [
        pattern.mask(grid).diagonal()
        for pattern in patterns(pattern_case)
        for grid in (Grid(13, 17), Grid(1, 5), Grid(7, 1))
    ]
    assert all(own.all() or (told and not own.any()) for own in seen)
    assert all(own.all() for own in seen) != told


def test_a_causal_pattern_never_looks_ahead(causal_case):
    for pattern in patterns(causal_case) if hasattr(causal_case.block(), "pattern") else ():
        assert pattern.causal and not pattern.mask(Grid(7, 11)).triu(1).any()


# Compositions

simple = st.one_of(
    st.just(All()),
    st.just(Past()),
    st.builds(Row, past=st.booleans()),
    st.builds(Column, past=st.booleans()),
    st.builds(Window, st.tuples(st.integers(0, 2), st.integers(0, 2)), st.tuples(st.integers(1, 2), st.integers(1, 3))),
    st.builds(Window, st.tuples(st.integers(0, 2), st.integers(0, 2)), st.just((2, 1)), st.just(True)),
    st.builds(Global, st.integers(1, 4)),
)
composed = st.recursive(
    simple, lambda inner: st.tuples(inner, st.booleans(), inner).map(lambda t: t[0] & t[2] if t[1] else t[0] | t[2])
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pattern=composed, height=st.integers(1, 7), width=st.integers(1, 7))
def test_a_composition_is_that_of_the_rules_and_its_key_sets_follow(pattern, height, width):
    grid = Grid(height, width)
    assert_sets_are_the_rule(pattern, grid)
    if hasattr(pattern, "first"):
        first, second = pattern.first.mask(grid), pattern.second.mask(grid)
        both = type(pattern).__name__ == "Both"
        assert torch.equal(pattern.mask(grid), first & second if both else first | second)
    assert not pattern.causal or not pattern.mask(grid).triu(1).any()


def test_patterns_by_head_compose_head_by_head():
    grid, heads = Grid(5, 7), PerHead((Row(), Column()))
    cut = heads & Past()
    assert cut.causal and not heads.causal
    assert [part.mask(grid).tolist() for part in cut.by_head()] == [
        Row(past=True).mask(grid).tolist(),
        Column(past=True).mask(grid).tolist(),
    ]
    wider = heads | Window((1, 1))
    assert all((part.mask(grid) >= Window((1, 1)).mask(grid)).all() for part in wider.by_head())
    assert torch.equal(heads.mask(grid), Row().mask(grid) | Column().mask(grid))


@pytest.mark.parametrize(
    "heads, shares", [(2, [1, 1, 0]), (3, [1, 1, 1]), (5, [2, 2, 1]), (7, [3, 2, 2]), (8, [3, 3, 2])]
)
def test_heads_are_shared_out_in_order(heads, shares):
    pattern = PerHead((Row(), Column(), Past()))
    if heads >= 3:
        assert pattern.shares(heads) == shares
    masks = pattern.head_masks(heads, Grid(3, 5))
    wanted = [part.mask(Grid(3, 5)) for part, n in zip(pattern.by_head(), pattern.shares(heads)) for _ in range(n)]
    assert torch.equal(masks, torch.stack(wanted)) and len(masks) == heads


# Coverage: over enough layers, all of the past must be reached


def closure(masks):
    """Which pairs are connected by any number of cycles, in plain loops over sets."""
    one = [{i} for i in range(len(masks[0]))]
    for mask in masks:
        one = [set().union(*(one[j] for j in row)) for row in mask]
    while (two := [set().union(*(one[j] for j in row)) for row in one]) != one:
        one = two
    return one


@pytest.mark.parametrize(
    "name, options, missing",
    [
        ("strided", {}, 0),
        ("strided", {"split_heads": True}, 0),
        ("fixed", {"c": 2}, 0),
        ("fixed", {"c": 2, "split_heads": True}, 0),
        ("factored", {}, 0),
        ("dense", {}, 0),
        ("factored", {"part": "row"}, None),
        ("window", {"kernel_size": 3}, None),
    ],
)
def test_coverage_of_the_past(name, options, missing):
    grid = Grid(6, 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block = create_block(name, 32, num_heads=4, causal=True, **options)
    reached = closure([[{i for i, s in enumerate(row) if s} for row in block.pattern.mask(grid).tolist()]])
    unreached = sum(i + 1 - len(some) for i, some in enumerate(reached))
    assert blind_spot([block.pattern]) == unreached
    assert (unreached == 0) == (missing == 0)
    told = [str(one.message) for one in caught if one.category is BlindSpot]
    assert len(told) == (unreached > 0) and all(f"causal {name} alone leaves {unreached} of 903" in one for one in told)


def test_a_causal_row_and_column_miss_the_upper_right():
    assert blind_spot([Row(past=True), Column(past=True)]) == 315
    assert blind_spot([PerHead((Row(past=True), Column(past=True)))]) == 315
    assert blind_spot([Past()]) == blind_spot([Row(past=True), Past()]) == 0


def test_the_order_of_layers_matters():
    """Fixed: what a summary does not know, the row behind it can't ask."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlindSpot)
        local, summary = (
            create_block("fixed", 32, num_heads=1, c=2, causal=True, part=part).pattern for part in ("local", "summary")
        )
    past = torch.ones(42, 42, dtype=torch.bool).tril()
    assert torch.equal(cycle_reach([local, summary], Grid(6, 7)), past)
    assert not torch.equal(cycle_reach([summary, local], Grid(6, 7)), past)
