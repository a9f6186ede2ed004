import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, cost, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    return create_block("inducing_points", DIM, num_heads=HEADS, **{"points": 5, **options}).double()


def split(t):
    return t.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


@pytest.mark.parametrize("prefix", [0, 2])
def test_it_is_the_attention_of_two_mabs_with_the_residuals_of_the_first(prefix):
    """As the paper writes them: what is learned of I is one matrix, which is query and value."""
    block, x = new(), torch.randn(2, prefix + GRID.size, DIM, dtype=torch.float64)
    with torch.no_grad():
        block.points.copy_(block.queries.transpose(0, 1).flatten(1))
    q, k, v = map(split, block.qkv(x).chunk(3, dim=-1))
    start = block.points.expand(2, -1, -1)
    o = start + F.scaled_dot_product_attention(split(start), k, v).transpose(1, 2).flatten(2)
    h = o + F.relu(o @ block.thought.weight.T + block.thought.bias)
    keys, values = map(split, (h @ block.told.weight.T + block.told.bias).chunk(2, dim=-1))
    expected = block.proj(F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x, GRID), expected, rtol=1e-11, atol=1e-13)


def test_the_order_of_positions_does_not_matter():
    block, x, order = new(), torch.randn(2, GRID.size, DIM, dtype=torch.float64), torch.randperm(GRID.size)
    torch.testing.assert_close(block(x[:, order], GRID), block(x, GRID)[:, order], rtol=1e-10, atol=1e-12)


def test_with_one_point_all_are_told_the_same_which_no_average_of_the_image_is():
    block, x = new(points=1), torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    out = block(x, GRID)
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=1e-11, atol=1e-13)
    alike = x[:, :1].expand_as(x)
    _, _, v = block.qkv(alike).chunk(3, dim=-1)
    assert not torch.allclose(block(alike, GRID), block.proj(v))


def test_every_pixel_hears_every_other():
    block, x = new(points=2), torch.randn(1, GRID.size, DIM, dtype=torch.float64)
    seen = block.attention(x, GRID)
    assert seen.shape == (1, 1, GRID.size, GRID.size) and (seen > 0).all()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(block(x, GRID)[0, 2 * 7 + 5].sum(), x)
    assert (slope != 0).any(-1).all()


def test_cost_grows_with_the_pixels():
    block, operations = new(), []
    for width in (43, 86, 172):
        x = torch.randn(2, 11 * width, DIM, dtype=torch.float64)
        operations.append(cost.flops(block, x, (11, width)))
    assert operations[1] / operations[0] < 2.01 and operations[2] / operations[1] < 2.01
