import math

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block
from vision_attn.engines import lattice

GRID = Grid(7, 11)


def smooth(heads, features, grid, size=1.0):
    """Features that change slowly over the map, as those of images do, so that pixels share vertices."""
    coarse = torch.randn(2, heads * features, 3, 2, dtype=torch.float64)
    maps = size * F.interpolate(coarse, tuple(grid), mode="bilinear", align_corners=True)
    return maps.flatten(2).unflatten(1, (heads, features)).transpose(2, 3).contiguous()


@pytest.mark.parametrize("features", [1, 2, 3, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_where_pixels_share_vertices_it_is_its_definition(features, normalize):
    block = create_block("permutohedral", 6, num_heads=3, features=features, normalize=normalize).double()
    f = smooth(3, features, GRID).requires_grad_()
    v = torch.randn(2, 3, GRID.size, 5, dtype=torch.float64, requires_grad=True)
    weights = block.weights(f, f[..., :0], GRID)
    assert (weights > 0).double().sum(dim=-1).mean() > 5
    out, expected = block.mix(f, f[..., :0], v, GRID), weights @ v
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-12)
    direction = torch.randn_like(out)
    slopes = (torch.autograd.grad(t, [f, v], direction) for t in (out, expected))
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("features", [1, 2, 4])
def test_graphs_have_the_numbers_of_the_table_of_vertices(features):
    f, v = smooth(3, features, GRID).flatten(0, 1), torch.randn(6, GRID.size, 5, dtype=torch.float64)
    expected = lattice.filtered(f, v)
    weights, keys, steps = lattice.simplex(f)
    out = lattice._of_any_size(v.flatten(0, 1), weights, keys, steps)
    torch.testing.assert_close(out.view_as(v), expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.func.vmap(lattice.filtered)(f[:, None], v[:, None])[:, 0], expected)


def test_it_is_near_to_a_gaussian_of_the_distance():
    """On pixels so dense that every vertex around is touched."""
    f = torch.stack(torch.meshgrid(*[torch.arange(41, dtype=torch.float64) / 5 - 4] * 2, indexing="ij"), -1)
    f = f.reshape(1, 1, -1, 2)
    block = create_block("permutohedral", 1, features=2)
    seen = block.mix(f, f[..., :0], torch.eye(41**2, dtype=torch.float64)[None, None], Grid(41, 41))[0, 0]
    middle = seen[20 * 41 + 20]
    bell = (-f[0, 0].square().sum(-1) / 2).exp()
    assert (middle - bell / bell.sum()).abs().sum() < 0.2  # of a sum of 1


def test_two_pixels_between_two_vertices_are_counted_by_hand():
    """Of one feature the vertices are the integers of 2 f / √3; both axes are that line, one up and one down."""
    places, v = torch.tensor([0.25, 0.6], dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None, None]
    f = (places * 3**0.5 / 2)[None, None, :, None]
    splat = torch.tensor([[0.75, 0.25], [0.4, 0.6]], dtype=torch.float64)
    blur = torch.tensor([[1, 0.5], [0.5, 1]], dtype=torch.float64)
    expected = splat @ blur @ blur @ splat.mT
    for normalize, sums in ((False, 1.5), (True, expected.sum(dim=1, keepdim=True))):
        block = create_block("permutohedral", 1, features=1, normalize=normalize)
        out = block.mix(f, f[..., :0], v, Grid(1, 2))[0, 0]
        torch.testing.assert_close(out, expected / sums, rtol=1e-12, atol=1e-13)


def test_no_image_changes_what_another_sees():
    """One table for a batch would blur through vertices that only another image touches: here they all but coincide."""
    f, v = smooth(1, 3, GRID), torch.randn(2, 1, GRID.size, 5, dtype=torch.float64)
    f[1] = f[0] + 0.01 * torch.randn_like(f[0])
    block = create_block("permutohedral", 1, features=3)
    out = block.mix(f, f[..., :0], v, GRID)
    for image in (0, 1):
        alone = block.mix(*(t[image : image + 1] for t in (f, f[..., :0], v)), GRID)
        torch.testing.assert_close(out[image : image + 1], alone, rtol=1e-12, atol=1e-13)


def test_features_are_of_the_input_and_of_the_place():
    block = create_block("permutohedral", 6, num_heads=2, features=3).double()
    x = torch.randn(1, 1 + 15, 6, dtype=torch.float64)
    f, _, _ = block.heads(x, Grid(3, 5))
    projected = block.qkv(x)[..., :6].view(16, 2, 3)
    for token, place in ((0, (0, 0)), (1, (-1, -2)), (1 + 7, (0, 0)), (1 + 13, (1, 1))):  # prefix, corner, middle, …
        for head in range(2):
            expected = projected[token, head] + block.places[head] @ torch.tensor(place, dtype=torch.float64)
            expected = torch.where(expected > 0, expected, 0.01 * expected)
            torch.testing.assert_close(f[0, head, token], expected, rtol=1e-12, atol=1e-13)


def test_many_features_mix_nothing():
    block = create_block("permutohedral", 2, num_heads=1, features=7).double()
    f, v = 9 * torch.randn(1, 1, 35, 7).double(), torch.randn(1, 1, 35, 2).double()
    torch.testing.assert_close(block.mix(f, f[..., :0], v, Grid(5, 7)), v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e7, math.inf])
def test_any_features_are_taken(size):
    """In float32 far from the middle neighbours can't be told apart: whatever is seen is finite."""
    block, f = create_block("permutohedral", 3, num_heads=1), (size * torch.randn(1, 1, 35, 4)).nan_to_num()
    v = torch.rand(1, 1, 35, 3)
    out = block.mix(f, f[..., :0], v, Grid(5, 7))
    assert out.isfinite().all() and out.min() >= -0.1 and out.max() <= 1.1
