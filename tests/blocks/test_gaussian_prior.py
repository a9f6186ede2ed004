import math

import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block, describe
from vision_attn.cost import flops

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


def learned(**options):
    """A block whose heads differ in width and centre."""
    block = create_block("gaussian_prior", DIM, num_heads=HEADS, **options).double()
    with torch.no_grad():
        for p in (block.log_sigma_r, block.log_sigma_c, block.a_r, block.a_c):
            p += torch.randn(HEADS, dtype=torch.float64)
    return block


def test_each_pixel_expects_a_bell():
    """One query at a time, with the bell as a torch.distributions.Normal of each axis: up to a constant, its log."""
    block = learned()
    q, k, v = (torch.randn(2, HEADS, GRID.size, d, dtype=torch.float64) for d in (13, 13, 17))
    out = block.mix(q, k, v, GRID)
    rows, columns = (t.flatten().double() for t in torch.meshgrid(*map(torch.arange, GRID), indexing="ij"))
    for head in range(HEADS):
        of_rows = torch.distributions.Normal(block.a_r[head], block.log_sigma_r[head].exp())
        of_columns = torch.distributions.Normal(block.a_c[head], block.log_sigma_c[head].exp())
        for i in range(GRID.size):
            prior = of_rows.log_prob(rows - rows[i]) + of_columns.log_prob(columns - columns[i])
            scores = (q[:, head, i, None] * k[:, head]).sum(-1) * 13**-0.5 + prior
            expected = (scores.softmax(-1)[..., None] * v[:, head]).sum(1)
            torch.testing.assert_close(out[:, head, i], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_a_huge_width_is_dense_attention(causal):
    wide = create_block("gaussian_prior", DIM, num_heads=HEADS, width=1e9, causal=causal).double()
    dense = create_block("dense", DIM, num_heads=HEADS, causal=causal).double()
    dense.load_state_dict({name: t for name, t in wide.state_dict().items() if name in dense.state_dict()})
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(wide(x, GRID), dense(x, GRID), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tiny_width_looks_at_the_pixel_itself_or_where_the_centre_is(dtype):
    block = create_block("gaussian_prior", DIM, num_heads=HEADS, width=0.03).to(dtype)
    q, k, v = torch.randn(3, 2, HEADS, GRID.size, 13, dtype=dtype)
    assert torch.equal(block.mix(q, k, v, GRID), v)
    torch.nn.init.constant_(block.a_r, 2), torch.nn.init.constant_(block.a_c, -3)
    v, out = v.unflatten(2, GRID), block.mix(q, k, v, GRID).unflatten(2, GRID)
    assert torch.equal(out[:, :, :-2, 3:], v[:, :, 2:, :-3])


def test_prefix_tokens_are_as_near_as_the_pixel_itself():
    """Without a prior: their weight in a query's softmax is exp of the score, next to exp(score + B) of positions."""
    block = learned()
    q, k = torch.randn(2, 2, HEADS, 5 + GRID.size, 13, dtype=torch.float64)
    values = torch.eye(5 + GRID.size, dtype=torch.float64).expand(2, HEADS, -1, -1)
    weights, plain = block.mix(q, k, values, GRID), F.scaled_dot_product_attention(q, k, values)
    torch.testing.assert_close(weights[:, :, :5], plain[:, :, :5], rtol=1e-9, atol=1e-12)
    prior = (weights[:, :, 5:] / plain[:, :, 5:]).log()
    prior = prior - prior[..., :1]  # of a prefix token, to which B adds nothing
    torch.testing.assert_close(prior[..., :5], torch.zeros_like(prior[..., :5]), rtol=0, atol=1e-9)
    down = torch.arange(GRID.size) // GRID.width - torch.arange(GRID.size)[:, None] // GRID.width
    right = torch.arange(GRID.size) % GRID.width - torch.arange(GRID.size)[:, None] % GRID.width
    for h in range(HEADS):
        of_row = ((down - block.a_r[h]) / block.log_sigma_r[h].exp()).square()
        of_column = ((right - block.a_c[h]) / block.log_sigma_c[h].exp()).square()
        near = of_row + of_column < 60  # the others' weight is rounding
        expected = -(of_row + of_column)[near].expand(2, -1) / 2
        torch.testing.assert_close(prior[:, h, :, 5:][:, near], expected, rtol=1e-6, atol=1e-6)


def test_far_pixels_on_a_large_map_are_exact_enough_in_float32():
    """Squares of 100 pixels by widths of 1 cancel: the prior of neighbours in a corner is right to 1e-2."""
    grid = Grid(199, 3)
    block = create_block("gaussian_prior", HEADS, num_heads=HEADS, width=1.0)
    of_q, of_k = block.channels(grid, torch.float32)
    prior = of_q[0] @ of_k[0].T
    row, column = torch.arange(grid.size) // 3, torch.arange(grid.size) % 3
    expected = -((row - row[:, None]).square() + (column - column[:, None]).square()) / 2
    near = expected > -10
    assert (prior - expected)[near].abs().max() < 1e-2


def test_it_costs_what_its_docstring_says():
    assert describe("gaussian_prior").cost == "2 N² d"
    block = create_block("gaussian_prior", 24, num_heads=HEADS, device="meta").eval()
    n, x = GRID.size, torch.empty(1, GRID.size, 24, device="meta")
    assert flops(block, x, GRID) == 2 * (2 * n**2 * (24 + 4 * HEADS) + 4 * n * 24**2)  # and the projections


def test_widths_start_as_asked_and_stay_positive():
    block = create_block("gaussian_prior", DIM, num_heads=HEADS, width=2.5)
    for log_sigma in (block.log_sigma_r, block.log_sigma_c):
        assert log_sigma.shape == (HEADS,) and math.isclose(log_sigma.exp().mean().item(), 2.5, rel_tol=1e-6)
