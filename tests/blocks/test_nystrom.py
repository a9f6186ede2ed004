import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, cost, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    return create_block("nystrom", DIM, num_heads=HEADS, **{"cells": (2, 3), **options}).double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 2])
def test_with_a_landmark_for_every_pixel_it_is_dense_attention(prefix):
    """Then all three matrices are the softmax matrix, and A A⁻¹ A = A; 1 / A takes more iterations than 6."""
    block, (q, k, v) = new(cells=tuple(GRID), iterations=40), random_qkv(prefix + GRID.size)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=1e-6, atol=1e-7)


def test_iterations_approach_the_pseudoinverse():
    """Also of a matrix without an inverse, as where two landmarks are equal."""
    m = torch.randn(2, HEADS, 6, 6, dtype=torch.float64).softmax(dim=-1)
    m[:, :, 4] = m[:, :, 1]
    pseudo = torch.linalg.pinv(m)
    wrong = [(new(iterations=n).inverse(m) - pseudo).norm() / pseudo.norm() for n in (2, 4, 8, 15)]
    assert wrong == sorted(wrong, reverse=True) and wrong[-1] < 1e-6 < 0.1 < wrong[0]


@pytest.mark.parametrize("prefix", [0, 2])
def test_landmarks_are_prefix_tokens_and_means_of_cells(prefix):
    grid, (q, _, _) = Grid(2 * 5, 3 * 7), random_qkv(prefix + 2 * 5 * 3 * 7)
    found = new().landmarks(q, grid)
    image = q[:, :, prefix:].mT.reshape(-1, WIDTH, *grid)
    cells = F.adaptive_avg_pool2d(image, (2, 3)).reshape(2, HEADS, WIDTH, 6).mT
    torch.testing.assert_close(found, torch.cat([q[:, :, :prefix], cells], dim=2), rtol=1e-12, atol=1e-14)


def test_a_pixel_in_two_cells_is_shared_between_them():
    _, k, _ = random_qkv(3)
    found = new(cells=(1, 2)).landmarks(k, Grid(1, 3))
    left, middle, right = k.unbind(dim=2)
    expected = torch.stack([(2 * left + middle) / 3, (middle + 2 * right) / 3], dim=2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_rows_sum_to_one_as_far_as_the_inverse_is_right():
    x = torch.randn(2, 13 * 17, DIM, dtype=torch.float64)
    off = [(new(iterations=n).attention(x, (13, 17)).sum(dim=-1) - 1).abs().max() for n in (2, 20)]
    assert off[1] < 1e-6 < off[0]


def test_an_image_starts_from_the_norms_of_its_own_matrix():
    """The authors' code divides by the largest of the batch."""
    block, (q, k, v) = new(iterations=1), random_qkv()
    alone = block.mix(q[:1], k[:1], v[:1], GRID)
    k[1] = 1e3 * k[1, :, :1]  # all queries look at one landmark: a column sum as large as can be
    torch.testing.assert_close(block.mix(q, k, v, GRID)[:1], alone, rtol=1e-12, atol=1e-13)


def test_cost_grows_with_the_pixels():
    block, operations = new(), []
    for width in (43, 86, 172):
        grid = Grid(11, width)
        operations.append(cost.flops(block.mix, *random_qkv(grid.size), grid))
    assert operations[2] / operations[1] < 2.1 and operations[1] / operations[0] < 2.1
