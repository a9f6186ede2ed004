"""FlexAttention's rule and blocks of a pattern, by its plain form: there is no backward of it without a GPU."""

import warnings
from itertools import product

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from vision_attn import Grid, create_block, route
from vision_attn.blocks.adaptive_span import Others
from vision_attn.engines import flex
from vision_attn.pattern import Column, Row
from vision_attn.testing.case import BATCH, HEADS, PREFIXES

GRIDS = [Grid(13, 17), Grid(1, 23), Grid(29, 1), Grid(1, 1)]


def plain(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it makes the matrix of all pairs
        return flex_attention(*args, **options)


def steps(case):
    """With a plain pattern of key sets."""
    for step in case.block().steps:
        try:
            sets = [part.key_sets() for part in step.pattern.by_head()]
        except NotImplementedError:
            continue
        if sets and type(step.pattern).known is Row.known:
            yield step


def test_the_rule_is_that_of_the_pattern(pattern_case):
    for step, grid, prefix in product(steps(pattern_case), GRIDS, PREFIXES):
        tokens = prefix + grid.size
        rule = flex.rule_of(step.pattern, HEADS, grid, prefix, prefix)
        head, query, key = torch.arange(HEADS)[:, None, None], torch.arange(tokens)[:, None], torch.arange(tokens)
        seen = rule(0, head, query, key).expand(HEADS, -1, -1)
        assert torch.equal(seen, step.pattern.head_masks(HEADS, grid, prefix))


def test_blocks_are_those_of_the_mask(pattern_case, monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 16)
    for step, grid, prefix in product(steps(pattern_case), GRIDS, PREFIXES):
        tokens = prefix + grid.size
        *blocks, unseen = flex._blocks(step.pattern, HEADS, grid, tokens, tokens, torch.device("cpu"))
        some, which, whole, which_whole, by_key, which_by_key, whole_by_key, which_whole_by_key = (t[0] for t in blocks)
        mask = step.pattern.head_masks(HEADS, grid, prefix)
        pad = -tokens % 16
        cells = torch.nn.functional.pad(mask, (0, pad, 0, pad)).unflatten(2, (-1, 16)).unflatten(1, (-1, 16))
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


@pytest.mark.parametrize("name, options", [("window", {}), ("fixed", {"causal": True, "c": 3}), ("per_head", {})])
@pytest.mark.parametrize("prefix", [0, 5])
def test_it_gives_what_the_definition_says(name, options, prefix):
    grid = Grid(5, 7)
    step = create_block(name, 48, num_heads=3, **options).double()
    tensors = [torch.randn(BATCH, 3, prefix + grid.size, 16, dtype=torch.float64) for _ in range(3)]
    out = flex.attend(*tensors, grid, step.pattern, scale=step.scale, call=plain)
    torch.testing.assert_close(out, step.weights(*tensors[:2], grid) @ tensors[2], rtol=1e-9, atol=1e-10)


def test_what_sees_nothing_takes_nothing():
    pattern, grid = Row(past=True) & Column() & Others(), Grid(3, 5)
    q, k, v = torch.randn(3, BATCH, 2, grid.size, 16)
    out = flex.attend(q, k, v, grid, pattern, scale=0.3, call=plain)
    assert (out == 0).all()


@pytest.mark.slow
def test_compiled_on_a_cpu_it_gives_the_same():
    """Forward alone: the compiled form has no backward there. Blocks are skipped only here."""
    grid = Grid(19, 23)
    step = create_block("window", 48, num_heads=3, kernel_size=3)
    with torch.no_grad():
        q, k, v = torch.randn(3, BATCH, 3, 5 + grid.size, 16)
        out = flex.attend(q, k, v, grid, step.pattern, scale=step.scale)
        torch.testing.assert_close(out, step.weights(q, k, grid) @ v, rtol=1e-4, atol=1e-5)


def test_a_cpu_takes_key_sets_instead():
    block, grid = create_block("window", 48, num_heads=3), Grid(5, 7)
    with route("flex") as taken:
        block(torch.randn(2, grid.size, 48), grid)
    assert taken == {"union"}
