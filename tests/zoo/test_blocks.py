"""What every block of the registry must hold to: the properties of `vision_attn.testing`, and what is the zoo's own."""

import pytest
import torch
from conftest import OFTEN, Largest, block_of, cases, short_name

from vision_attn import Grid, create_block, create_layer, describe
from vision_attn.testing import PROPERTIES
from vision_attn.testing.case import HEADS, VALUE
from vision_attn.zoo import block_class

# The properties


def all_that_applies():
    """Every property with every case; those that take long with a few blocks and their first options alone."""
    for each in PROPERTIES:
        left = set(OFTEN)
        for case in cases():
            if each.applies(case):
                long = each.slow and block_of(case) not in left
                left.discard(block_of(case))
                marks = [pytest.mark.slow] if long else []
                yield pytest.param(each, case, id=f"{each.name}-{short_name(case)}", marks=marks)


@pytest.mark.parametrize("each, case", list(all_that_applies()))
def test_property(each, case, record_property):
    before = case.trials
    each.check(case)
    record_property(each.name, case.trials - before)


# What the zoo promises beyond them


def test_no_matrix_of_all_pairs_is_made_forward_or_backward(mixer_case):
    grid = Grid(41, 43)
    block = mixer_case.block_class(HEADS * VALUE, HEADS, **mixer_case.options)  # keys as wide as values, as it is used
    x = torch.randn(1, 5 + grid.size, block.dim, requires_grad=True)
    with Largest() as largest:
        block(x, grid).sum().backward()
    assert largest.size < HEADS * grid.size**2 / 2


@pytest.mark.parametrize("dim", [1, 31, 37, 67])
def test_any_width_has_defaults(block_name, dim):
    if dim == 1 and block_name in ("factored", "per_head"):  # three patterns can't share one channel
        with pytest.raises(ValueError, match="num_heads=1: must be ≥ 3"):
            create_layer(block_name, dim)
        return
    layer = create_layer(block_name, dim)
    assert layer(torch.randn(2, dim, 5, 3)).shape == (2, dim, 5, 3)


def test_what_cannot_be_causal_says_why(block_name):
    if describe(block_name).causal:
        return
    reason = block_class(block_name).not_causal
    for make in (create_block, create_layer):
        with pytest.raises(ValueError) as refusal:
            make(block_name, 37, causal=True)
        assert f"causal=True: {block_name}" in str(refusal.value) and reason in str(refusal.value)
        make(block_name, 37, causal=False)
