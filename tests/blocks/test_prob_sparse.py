import math

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    return create_block("prob_sparse", DIM, num_heads=HEADS, **{"cells": (2, 3), **options}).double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 2])
def test_the_pixels_of_the_largest_measure_are_answered_and_the_others_get_the_mean(prefix):
    block, (q, k, v) = new(factor=2), random_qkv(prefix + GRID.size)
    out, dense = block.mix(q, k, v, GRID), F.scaled_dot_product_attention(q, k, v)
    sample = [prefix + y * 7 + x for y in (1, 3) for x in (1, 3, 5)]
    for image in range(2):
        for head in range(HEADS):
            scores = [[(query @ k[image, head, s]).item() for s in sample] for query in q[image, head, prefix:]]
            measure = [max(some) - sum(some) / 6 for some in scores]
            answered = sorted(range(GRID.size), key=lambda pixel: -measure[pixel])[: 2 * math.ceil(math.log(35))]
            for token, got in enumerate(out[image, head]):
                full = token < prefix or token - prefix in answered
                expected = dense[image, head, token] if full else v[image, head].mean(dim=0)
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_answered_pixels_grow_with_the_logarithm():
    block = new(factor=3)
    for height, width in [(1, 1), (1, 3), (4, 5), (3, 7), (6, 9), (13, 17), (64, 64), (97, 89), (1000, 1031)]:
        size = height * width
        assert block.answered(Grid(height, width)) == min(size, max(1, 3 * math.ceil(math.log(size))))


def test_with_as_many_answers_as_pixels_it_is_dense_attention():
    block, (q, k, v) = new(factor=9), random_qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-11, atol=1e-13)


def test_a_choice_repeats_and_depends_on_nothing_but_its_own_image_and_head():
    block, (q, k, _) = new(factor=1), random_qkv(3 + GRID.size)
    chosen = block.choose(q, k, GRID)
    assert chosen.shape == (2, HEADS, 4) and torch.equal(chosen, block.choose(q, k, GRID))
    q[1], k[1] = torch.randn(2, *q[1].shape, dtype=torch.float64)
    q[:, 0], k[:, 0] = torch.randn(2, *q[:, 0].shape, dtype=torch.float64)
    other = block.choose(q, k, GRID)
    assert torch.equal(other[0, 1:], chosen[0, 1:])
    assert not torch.equal(other[1], chosen[1]) and not torch.equal(other[0, 0], chosen[0, 0])


def test_pixels_that_are_all_alike_are_answered_once_each():
    block, (q, k, _) = new(factor=1), random_qkv()
    chosen = block.choose(q[:, :, :1].expand_as(q), k, GRID)
    assert all(len(some.unique()) == 4 for some in chosen.flatten(0, 1))
    assert torch.equal(chosen, block.choose(q[:, :, :1].expand_as(q), k, GRID))


def test_the_choice_is_the_same_in_half_precision_of_the_same_numbers():
    block, (q, k, _) = new(), random_qkv()
    for dtype in (torch.bfloat16, torch.float16):
        exact = block.choose(q.to(dtype).double(), k.to(dtype).double(), GRID)
        assert torch.equal(block.choose(q.to(dtype), k.to(dtype), GRID), exact)
        with torch.autocast("cpu", dtype):
            assert torch.equal(block.choose(q.to(dtype), k.to(dtype), GRID), exact)
