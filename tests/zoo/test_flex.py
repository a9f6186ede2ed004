"""FlexAttention's rule, blocks and calls of a pattern, by its plain form on a CPU.

Torch has a backward of it there, but refuses to enter it: `plain` and `graphs` lift that. A compiled one neither has a
backward nor tells a log-sum-exp there, so that compiled calls are compared one by one, and forward alone.
"""

import functools
import warnings
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import Largest
from torch._subclasses.fake_tensor import FakeTensorMode

from vision_attn import Grid, create_block, route
from vision_attn.blocks.adaptive_span import Others
from vision_attn.engines import flex
from vision_attn.engines.route import taken_routes
from vision_attn.pattern import All, Column, Past, PerHead, Row, Window
from vision_attn.testing.case import BATCH, HEADS, PREFIXES

GRIDS = [Grid(13, 17), Grid(1, 23), Grid(29, 1), Grid(1, 1)]
# Patterns that two calls are for, heads that look otherwise, and tokens that see nothing in one call or in both
TWO_CALLS = [
    ("criss_cross", {}),
    ("strided", {"causal": True}),
    ("fixed", {"c": 3}),
    ("factored", {"causal": True, "include_self": False}),
]
LEARNED = [
    ("adaptive_span", {"span": 4, "ramp": 1.5}),
    ("adaptive_span", {"span": 3, "include_self": False, "causal": True}),
    ("gaussian_prior", {"width": 1.5}),
    ("gaussian_prior", {"width": 1.5, "causal": True}),
]


@pytest.fixture
def plain(monkeypatch):
    """Runs FlexAttention as it is, gradients included."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)

    def run(function):
        def call(*args, **options):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it makes the matrix of all pairs
                return function(*args, **options)

        return call

    return run


@pytest.fixture
def graphs(monkeypatch):
    """Runs FlexAttention as a graph of forward and backward, of which no kernels are made."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    return functools.cache(functools.partial(torch.compile, dynamic=False, backend="aot_eager"))


def steps(case):
    """With a plain pattern of key sets."""
    for step in case.block().steps:
        try:
            sets = [part.key_sets() for part in step.pattern.by_head()]
        except NotImplementedError:
            continue
        if sets and type(step.pattern).known is Row.known:
            yield step


def ways_of(pattern):
    """The pattern in one call, and all its ways to be computed in two."""
    return [(pattern, None)] + [
        (PerHead(in_rows), PerHead(in_columns))
        for in_rows, in_columns in (zip(*way) for way in zip(*map(flex.ways, pattern.by_head())))
    ]


def columns_of(mask, grid):
    """A mask of positions whose tokens are in the order of columns."""
    order = torch.arange(grid.size).view(grid.height, grid.width).T.flatten()
    return mask[:, order][:, :, order]


def test_the_rule_is_that_of_the_pattern(pattern_case):
    for step, grid, prefix in product(steps(pattern_case), GRIDS, PREFIXES):
        tokens = prefix + grid.size
        rule = flex.rule_of(step.pattern, HEADS, grid, prefix, prefix)
        head, query, key = torch.arange(HEADS)[:, None, None], torch.arange(tokens)[:, None], torch.arange(tokens)
        seen = rule(0, head, query, key).expand(HEADS, -1, -1)
        assert torch.equal(seen, step.pattern.head_masks(HEADS, grid, prefix))


def test_two_calls_take_each_pair_once(pattern_case):
    grid, prefix = Grid(5, 7), 2
    for step in steps(pattern_case):
        for in_rows, in_columns in ways_of(step.pattern)[1:]:
            head, place = torch.arange(HEADS)[:, None, None], torch.arange(grid.size)
            rule = flex.rule_of(in_columns, HEADS, grid, 0, 0, by_column=True)
            seen = rule(0, head, place[:, None], place).expand(HEADS, -1, -1)
            other = in_columns.head_masks(HEADS, grid)
            assert torch.equal(seen, columns_of(other, grid))
            one = in_rows.head_masks(HEADS, grid, prefix).int()
            assert torch.equal(
                one + F.pad(other.int(), (prefix, 0, prefix, 0)), step.pattern.head_masks(HEADS, grid, prefix).int()
            )


def check_blocks(pattern, grid, prefix, mask, by_column=False):
    """That the blocks that are met, in part and whole, are those of the mask, in blocks of 16."""
    tokens = prefix + grid.size
    *blocks, unseen = flex._blocks(pattern, HEADS, grid, tokens, tokens, by_column, flex.CPU)
    some, which, whole, which_whole, by_key, which_by_key, whole_by_key, which_whole_by_key = (t[0] for t in blocks)
    pad = -tokens % 16
    cells = F.pad(mask, (0, pad, 0, pad)).unflatten(2, (-1, 16)).unflatten(1, (-1, 16))
    count = cells.sum(dim=(2, 4))
    assert mask.any(-1).all() if unseen is None else torch.equal(unseen[0], ~mask.any(-1))
    for number, places, wanted in (
        (some, which, (count > 0) & (count < 256)),
        (whole, which_whole, count == 256),
        (by_key, which_by_key, ((count > 0) & (count < 256)).mT),
        (whole_by_key, which_whole_by_key, (count == 256).mT),
    ):
        got = torch.zeros_like(wanted)
        for head, row in ((head, row) for head in range(HEADS) for row in range(wanted.shape[1])):
            got[head, row, places[head, row, : number[head, row]].long()] = True
        assert torch.equal(got, wanted)


@pytest.fixture
def blocks_of_16(monkeypatch):
    """Small blocks, of which nothing is kept."""
    monkeypatch.setattr(flex, "BLOCK", 16)
    monkeypatch.setattr(flex, "kept", lambda make, *args, device: make(*args, device))


def test_blocks_are_those_of_the_mask(pattern_case, blocks_of_16):
    for step, grid, prefix in product(steps(pattern_case), GRIDS, PREFIXES):
        check_blocks(step.pattern, grid, prefix, step.pattern.head_masks(HEADS, grid, prefix))


def test_blocks_of_two_calls_are_those_of_their_masks(pattern_case, blocks_of_16):
    grid, prefix = Grid(11, 7), 3
    for step in steps(pattern_case):
        for in_rows, in_columns in ways_of(step.pattern)[1:]:
            check_blocks(in_rows, grid, prefix, in_rows.head_masks(HEADS, grid, prefix))
            check_blocks(in_columns, grid, 0, columns_of(in_columns.head_masks(HEADS, grid), grid), by_column=True)


@pytest.mark.parametrize("pattern", [All(), Past()], ids=repr)
def test_of_many_pairs_no_matrix_is_made(pattern):
    grid = Grid(43, 47)
    with Largest() as largest:
        met, _ = flex.counted(pattern, grid, grid.size, grid.size, False, flex.CPU)
    assert met.sum() == (grid.size**2 if pattern == All() else grid.size * (grid.size + 1) // 2)
    assert largest.size < grid.size**2 / 16


def met(mask):
    """How many blocks, of all heads, have a pair."""
    pad = -mask.shape[1] % flex.BLOCK
    cells = F.pad(mask, (0, pad, 0, pad)).unflatten(2, (-1, flex.BLOCK)).unflatten(1, (-1, flex.BLOCK))
    return int(cells.amax(dim=(2, 4)).sum())


@pytest.mark.parametrize("name, options", TWO_CALLS)
def test_fewer_blocks_are_met_in_two_calls(name, options, monkeypatch):
    grid, prefix = Grid(61, 29), 5
    step = create_block(name, 48, num_heads=3, **options)
    monkeypatch.setattr(flex, "SECOND", 1)
    tokens = prefix + grid.size
    in_rows, in_columns = flex.calls_of.__wrapped__(step.pattern, 3, grid, tokens, tokens)
    by_row, whole = (pattern.head_masks(3, grid, prefix) for pattern in (in_rows, step.pattern))
    other = in_columns.head_masks(3, grid)
    assert torch.equal(by_row ^ F.pad(other, (prefix, 0, prefix, 0)), whole)
    second = 3 * -(-tokens // flex.BLOCK)
    saved = met(whole) - met(by_row) - met(columns_of(other, grid))
    assert saved > second
    monkeypatch.setattr(flex, "SECOND", -(-saved // second))  # as much as they save
    assert flex.calls_of.__wrapped__(step.pattern, 3, grid, tokens, tokens) == (step.pattern, None)


@pytest.mark.parametrize("pattern", [Window((3, 3)), Row(), All(), Past()], ids=repr)
def test_one_call_is_enough(pattern):
    assert flex.calls_of(pattern, 3, Grid(41, 53), 2173, 2173) == (pattern, None)


def compared(step, grid, prefix, function, learned=()):
    """A function of queries, keys and values and the definition, in float64: outputs, and gradients of all."""
    torch.manual_seed(3)
    heads, width = step.num_heads, step.dim // step.num_heads
    tensors = torch.randn(3, BATCH, heads, prefix + grid.size, width, dtype=torch.float64).requires_grad_().unbind()
    out, wanted = function(*tensors), step.weights(*tensors[:2], grid) @ tensors[2]
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    slope = torch.randn_like(out)
    slopes, wanted = (torch.autograd.grad(some, [*tensors, *learned], slope) for some in (out, wanted))
    assert all(slope.isfinite().all() for slope in slopes)
    torch.testing.assert_close(slopes, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name, options", [("window", {}), ("fixed", {"causal": True, "c": 3}), ("per_head", {})])
@pytest.mark.parametrize("prefix", [0, 5])
def test_it_gives_what_the_definition_says(name, options, prefix, plain):
    grid = Grid(5, 7)
    step = create_block(name, 48, num_heads=3, **options).double()
    call = functools.partial(flex.attend, grid=grid, pattern=step.pattern, scale=step.scale, run=plain)
    compared(step, grid, prefix, call)


@pytest.mark.parametrize("name, options", TWO_CALLS)
@pytest.mark.parametrize("prefix", [0, 5])
def test_two_calls_give_what_the_definition_says(name, options, prefix, plain, monkeypatch):
    grid = Grid(5, 7)
    step = create_block(name, 48, num_heads=3, **options).double()
    call = functools.partial(flex.attend, grid=grid, pattern=step.pattern, scale=step.scale, run=plain)
    for way in ways_of(step.pattern)[2:]:
        monkeypatch.setattr(flex, "calls_of", lambda *_, way=way: way)
        compared(step, grid, prefix, call)


@pytest.mark.parametrize("name, options", LEARNED)
@pytest.mark.parametrize("prefix", [0, 5])
def test_biases_and_their_gradients_are_those_of_the_definition(name, options, prefix, plain, monkeypatch):
    grid = Grid(7, 5)
    step = create_block(name, 48, num_heads=3, **options).double()
    learned = [p for part, p in step.named_parameters() if not part.startswith(("qkv", "proj"))]
    for p in learned:
        torch.nn.init.normal_(p, 0.4, 0.3)
    monkeypatch.setattr(flex, "takes", lambda *_: True)
    monkeypatch.setattr(flex, "compiled", plain)
    with taken_routes() as taken:
        compared(step, grid, prefix, functools.partial(step.mix, grid=grid), learned)
    assert taken == {"flex"}


def test_a_bias_is_the_same_in_two_calls(plain, monkeypatch):
    grid, prefix = Grid(5, 7), 2
    step = create_block("gaussian_prior", 48, num_heads=3).double()
    monkeypatch.setattr(flex, "calls_of", lambda *_: ways_of(All())[2])

    def call(q, k, v):
        return flex.attend(q, k, v, grid, All(), scale=step.scale, table=step.bell(grid), run=plain)

    compared(step, grid, prefix, call, [step.a_r, step.log_sigma_c])


def test_more_keys_than_queries_may_be_prefix_tokens(plain, monkeypatch):
    grid, pattern = Grid(5, 7), create_block("criss_cross", 48).pattern
    q, k, v = (torch.randn(BATCH, 2, n + grid.size, 16, dtype=torch.float64) for n in (1, 3, 3))
    call = functools.partial(flex.attend, q, k, v, grid, pattern, scale=0.3, run=plain)
    seen = F.pad(pattern.mask(grid, 1), (2, 0), value=True)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3)
    for way in ways_of(pattern)[::2]:
        monkeypatch.setattr(flex, "calls_of", lambda *_, way=way: way)
        torch.testing.assert_close(call(), wanted, rtol=1e-9, atol=1e-10)


def test_what_sees_nothing_takes_and_gives_nothing(plain, monkeypatch):
    pattern, grid = Row(past=True) & Column() & Others(), Grid(3, 5)
    tensors = torch.randn(3, BATCH, 2, grid.size, 16).requires_grad_().unbind()
    for way in ways_of(pattern)[:2]:
        monkeypatch.setattr(flex, "calls_of", lambda *_, way=way: way)
        out = flex.attend(*tensors, grid, pattern, scale=0.3, run=plain)
        assert (out == 0).all()
        assert all((slope == 0).all() for slope in torch.autograd.grad(out.sum(), tensors))


def test_no_convention_of_a_kernel_matters_where_nothing_is_seen(monkeypatch):
    pattern, grid = Row(past=True) & Column() & Others(), Grid(3, 5)
    q, k, v = torch.randn(3, BATCH, 2, grid.size, 16)

    def run(function):
        return function if function is flex.merged else lambda q, k, v, **options: (v + 7, (q[..., 0],))

    for way in ways_of(pattern)[:2]:
        monkeypatch.setattr(flex, "calls_of", lambda *_, way=way: way)
        assert (flex.attend(q, k, v, grid, pattern, scale=0.3, run=run) == 0).all()


def test_new_biases_and_steps_compile_nothing(graphs, monkeypatch):
    grid, step = Grid(5, 7), create_block("adaptive_span", 48, num_heads=3).double()
    monkeypatch.setattr(flex, "takes", lambda *_: True)
    monkeypatch.setattr(flex, "compiled", graphs)
    compared(step, grid, 2, functools.partial(step.mix, grid=grid), [step.reach])
    with torch.no_grad():
        step.reach.sub_(0.3)
    with torch.compiler.set_stance("fail_on_recompile"):
        compared(step, grid, 2, functools.partial(step.mix, grid=grid), [step.reach])


def test_graphs_of_two_calls_are_made_once(graphs, monkeypatch):
    grid, step = Grid(5, 7), create_block("strided", 48, num_heads=3, causal=True).double()
    monkeypatch.setattr(flex, "calls_of", lambda *_: ways_of(step.pattern)[3])
    call = functools.partial(flex.attend, grid=grid, pattern=step.pattern, scale=step.scale, run=graphs)
    compared(step, grid, 2, call)
    with torch.compiler.set_stance("fail_on_recompile"):
        compared(step, grid, 2, call)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [("window", {"kernel_size": 3}), *LEARNED[1:3]])
def test_compiled_on_a_cpu_it_gives_the_same(name, options, monkeypatch):
    """Forward alone: the compiled form has no backward there. Blocks are skipped only here."""
    grid = Grid(19, 23)
    step = create_block(name, 48, num_heads=3, **options)
    monkeypatch.setattr(flex, "takes", lambda *_: True)
    with torch.no_grad():
        q, k, v = torch.randn(3, BATCH, 3, 5 + grid.size, 16)
        torch.testing.assert_close(step.mix(q, k, v, grid), step.weights(q, k, grid) @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", TWO_CALLS[1:2])
def test_compiled_on_a_cpu_two_calls_take_their_parts(name, options, monkeypatch):
    """Each by itself: the compiled form does not tell a log-sum-exp there."""
    grid, heads = Grid(29, 31), 3
    monkeypatch.setattr(flex, "SECOND", 0)
    pattern = create_block(name, 48, num_heads=heads, **options).pattern
    in_rows, in_columns = flex.calls_of.__wrapped__(pattern, heads, grid, grid.size, grid.size)
    q, k, v = torch.randn(3, 1, heads, grid.size, 16)
    masks = in_rows.head_masks(heads, grid), columns_of(in_columns.head_masks(heads, grid), grid)
    for part, mask, by_column in zip((in_rows, in_columns), masks, (False, True)):
        options = dict(scale=0.3, table=None, run=flex.compiled, by_column=by_column)
        with torch.no_grad():
            out, _ = flex._call(q, k, v, grid, part, **options)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(out, wanted.masked_fill(~mask.any(-1)[..., None], 0), rtol=1e-4, atol=1e-5)


def test_it_is_taken_where_it_is_asked_for_and_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # asks a driver
    with FakeTensorMode():
        wide, narrow = (torch.empty(2, 3, 35, d, device="cuda") for d in (16, 15))

    class Summed(Row):
        def known(self, x, grid):
            return x[:, :, :1]

    assert not flex.takes(wide, wide, Row(), 0.0)
    with route("flex"):
        assert flex.takes(wide, wide, Row(), 0.0)
        for case in (
            (narrow, wide, Row(), 0),
            (wide, narrow, Row(), 0),
            (wide, wide, Summed(), 0),
            (wide, wide, Row(), 0.1),
        ):
            assert not flex.takes(*case)


@pytest.mark.parametrize("name", ["window", "criss_cross", "adaptive_span", "gaussian_prior"])
def test_a_cpu_takes_key_sets_instead(name):
    block, grid = create_block(name, 48, num_heads=3), Grid(5, 7)
    with route("flex") as taken:
        block(torch.randn(2, grid.size, 48), grid)
    assert "flex" not in taken
