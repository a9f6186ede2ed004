import pytest
import torch

from vision_attn import Grid, create_block
from vision_attn.blocks.linear import features, features_of_queries

GRID = Grid(11, 13)  # 143 positions: three chunks, the last not full


def phi(x):
    return torch.nn.functional.elu(x) + 1


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_quotient_of_sums_of_the_paper(causal):
    block = create_block("linear", 34, num_heads=2, causal=causal)
    q, k, v = torch.randn(3, 2, 2, GRID.size, 17, dtype=torch.float64)
    out = block.mix(q, k, v, GRID)
    for i in range(0, GRID.size, 7):
        to = i + 1 if causal else GRID.size
        state = sum(phi(k[:, :, j])[..., :, None] * v[:, :, j][..., None, :] for j in range(to))
        norm = sum(phi(k[:, :, j]) for j in range(to))
        wanted = (phi(q[:, :, i])[..., None, :] @ state)[..., 0, :] / (phi(q[:, :, i]) * norm).sum(-1, keepdim=True)
        torch.testing.assert_close(out[:, :, i], wanted, rtol=1e-10, atol=1e-12)


def test_the_order_of_positions_does_not_matter_unless_causal():
    q, k, v = torch.randn(3, 2, 2, GRID.size, 17, dtype=torch.float64)
    order = torch.randperm(GRID.size)
    for causal in (False, True):
        block = create_block("linear", 34, num_heads=2, causal=causal)
        same = torch.allclose(
            block.mix(q[:, :, order], k[:, :, order], v[:, :, order], GRID), block.mix(q, k, v, GRID)[:, :, order]
        )
        assert same != causal


def test_the_state_does_not_grow_with_the_image():
    block = create_block("linear", 34, num_heads=2, causal=True)
    small, large = (block.new_cache(3, grid).nbytes for grid in (Grid(2, 3), Grid(97, 89)))
    assert small == large == 3 * 2 * 17 * 18 * 4


@pytest.mark.parametrize("options, said", [({"attn_drop": 0.1}, "attn_drop=0.1"), ({"scale": 1.0}, "scale=1.0")])
def test_what_it_has_no_use_for_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        create_block("linear", 34, **options)


@pytest.mark.parametrize("causal", [False, True])
def test_sums_stay_wide_under_autocast_of_half_precision(causal):
    block, grid = create_block("linear", 34, num_heads=2, causal=causal), Grid(61, 67)
    q, k, v = torch.full((3, 1, 2, grid.size, 17), 40.0)  # sums beyond 65504
    with torch.autocast("cpu", torch.float16):
        out = block.mix(q, k, v, grid)
    torch.testing.assert_close(out.float(), v)


SPECIAL = torch.tensor([-1e4, -1.3, 0.0, 0.7, 1e4], dtype=torch.float64)


def test_slopes_are_those_that_torch_finds_where_functions_are_transformed():
    """There torch differentiates an expression; elsewhere slopes are read off the values."""
    x = SPECIAL.clone().requires_grad_()
    out = features(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    (curve,) = torch.autograd.grad(slope.sum(), x)
    found = torch.func.grad(lambda x: features(x).sum())
    for one, other in ((out, torch.func.vmap(features)(SPECIAL)), (slope, found(SPECIAL))):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-300)
    torch.testing.assert_close(curve, torch.func.grad(lambda x: found(x).sum())(SPECIAL), rtol=0, atol=1e-300)


def test_slopes_are_those_of_finite_differences_in_all_ways():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(features, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(features, x)


@pytest.mark.parametrize("function", [features, features_of_queries])
def test_of_queries_and_keys_their_features_alone_are_kept(function):
    x, kept = torch.randn(3, 5, 7, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = function(x)
    assert len(kept) == 1 and torch.equal(kept[0], out)


def test_what_has_vanished_has_no_slope_whatever_the_divisor():
    """Keys that all vanish have a sum so small that the gradient of their features is infinite."""
    block, grid = create_block("linear", 34, num_heads=2), Grid(3, 5)
    q, k, v = (torch.full((1, 2, grid.size, 17), number, requires_grad=True) for number in (1.0, -1e4, 1e4))
    (slope,) = torch.autograd.grad(block.mix(q, k, v, grid).sum(), k)
    torch.testing.assert_close(slope, torch.zeros_like(k), rtol=0, atol=0)
