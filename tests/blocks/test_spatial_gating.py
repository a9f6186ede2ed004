import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 11
DIM = HEADS * WIDTH


def new(length=tuple(GRID), **options):
    return create_block("spatial_gating", DIM, num_heads=HEADS, length=length, **options).double()


def pixels(grid=GRID, prefix=0):
    return torch.randn(2, prefix + grid.size, DIM, dtype=torch.float64)


def test_at_its_own_size_it_is_the_papers_unit_with_a_product_of_two_matrices():
    """The published layers in torch's own: a linear layer over places, for each head's channels."""
    block, x = new(), pixels()
    torch.nn.init.normal_(block.bias), torch.nn.init.normal_(block.rows)
    u, v = F.gelu(block.qkv(x)).chunk(2, dim=-1)
    v = F.layer_norm(v, (DIM,), block.norm.weight, block.norm.bias).unflatten(-1, (HEADS, WIDTH))
    gates = []
    for head in range(HEADS):
        matrix = torch.kron(block.rows[head], block.columns[head])
        gates.append(F.linear(v[:, :, head].mT, matrix, block.bias[head].flatten()).mT)
    torch.testing.assert_close(block(x, GRID), block.proj(u * torch.cat(gates, -1)), rtol=1e-10, atol=1e-11)


def test_a_new_gate_is_open_and_learns():
    block, x = new(length=16), pixels(Grid(19, 23))
    u = F.gelu(block.qkv(x)).chunk(2, dim=-1)[0]
    out, grid = block(x, Grid(19, 23)), Grid(19, 23)
    assert (out - block.proj(u)).norm() < 0.05 * block.proj(u).norm()
    out.square().mean().backward()
    assert block.rows.grad.abs().max() > 0 and block.columns.grad.abs().max() > 0
    assert block(x, grid).shape == x.shape


def test_without_a_gate_it_is_linear():
    block, (x, y) = new(gated=False), (pixels(), pixels())
    zero = block(torch.zeros_like(x), GRID)
    torch.testing.assert_close(block(x + y, GRID) + zero, block(x, GRID) + block(y, GRID), rtol=1e-9, atol=1e-10)
    assert {name.partition(".")[0] for name in block.state_dict()} == {"qkv", "proj", "rows", "columns"}
    gated = new()
    assert not torch.allclose(gated(x + y, GRID) + gated(torch.zeros_like(x), GRID), gated(x, GRID) + gated(y, GRID))


@pytest.mark.parametrize("times", [2, 3])
def test_on_a_larger_image_of_the_same_a_constant_input_gives_the_same_sums(times):
    """Inputs are spread, so sums over the image stay; outputs at the centres of the old pixels, for odd factors."""
    block, grid = new(), Grid(5 * times, 7 * times)
    q = torch.zeros(1, HEADS, GRID.size, 0, dtype=torch.float64)
    here = block.weights(q, q, GRID).sum(-1).reshape(HEADS, *GRID)
    q = torch.zeros(1, HEADS, grid.size, 0, dtype=torch.float64)
    there = block.weights(q, q, grid).sum(-1).reshape(HEADS, *grid)
    stretched = F.interpolate(here[None], size=tuple(grid), mode="bilinear")[0]
    torch.testing.assert_close(there, stretched, rtol=1e-10, atol=1e-11)
    if times == 3:
        torch.testing.assert_close(there[:, 1::3, 1::3], here, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("gated", [True, False])
def test_prefix_tokens_take_the_mean_and_are_not_heard(gated):
    block, x = new(gated=gated), pixels(prefix=3)
    torch.testing.assert_close(block(x, GRID)[:, 3:], block(x[:, 3:], GRID), rtol=1e-11, atol=1e-12)
    u, _, v = block.heads(x, GRID)
    mean = v.mean(2, keepdim=True).expand(-1, -1, 3, -1)
    wanted = u[:, :, :3] * (mean + 1) if gated else mean
    wanted = block.proj(wanted.transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x, GRID)[:, :3], wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"length": 0}, {"length": (3,)}, {"gated": "no"}, {"scale": 1.0}])
def test_a_bad_option_is_named(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError) as refusal:
        create_block("spatial_gating", DIM, **options)
    assert f"{name}={value!r}" in str(refusal.value)
