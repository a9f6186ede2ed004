import math

import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 8
DIM = HEADS * WIDTH


def new(**options):
    return create_block("random_features", DIM, num_heads=HEADS, **{"features": 19, **options}).double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


def gaussian(q, k, sigma):
    """exp(-‖σ (q̂ - k̂)‖² / 2) of all pairs."""
    q, k = (sigma[:, None] * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    return (-(q[..., :, None, :] - k[..., None, :, :]).square().sum(dim=-1) / 2).exp()


def test_many_features_give_the_gaussian_of_the_distance_and_so_a_softmax():
    block, (q, k, v) = new(features=20_000), random_qkv()
    with torch.no_grad():
        block.sigma.copy_(torch.rand(HEADS, WIDTH) + 0.5)
    expected = gaussian(q, k, block.sigma)
    torch.testing.assert_close(block.phi(q) @ block.phi(k).mT, expected, rtol=0, atol=0.05)
    expected = expected / expected.sum(dim=-1, keepdim=True) @ v
    torch.testing.assert_close(block.mix(q, k, v, GRID), expected, rtol=0, atol=0.05)
    with torch.no_grad():
        block.sigma.fill_(1.7)
    q_unit, k_unit = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    softmax = (1.7**2 * q_unit @ k_unit.mT).softmax(dim=-1)
    torch.testing.assert_close(block.weights(q, k, GRID), softmax, rtol=0, atol=0.01)


def test_the_error_falls_with_the_root_of_the_features():
    q, k, _ = random_qkv(100)
    exact = gaussian(q, k, torch.ones(HEADS, WIDTH))
    errors = []
    for features in (50, 200, 800):
        blocks = [new(features=features) for _ in range(5)]
        errors.append(sum((b.phi(q) @ b.phi(k).mT - exact).square().mean() for b in blocks).sqrt())
    assert 1.5 < errors[0] / errors[1] < 2.7 and 1.5 < errors[1] / errors[2] < 2.7


def test_a_draw_is_kept_and_can_be_made_anew():
    one, other = new(), new()
    assert not torch.equal(one.omega, other.omega) and not torch.equal(one.omega[0], one.omega[1])
    assert "omega" in one.state_dict() and "omega" not in dict(one.named_parameters())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.omega, other.omega)
    for block in (one, other):
        block.redraw(torch.Generator().manual_seed(3))
    assert torch.equal(one.omega, other.omega)
    one.redraw()
    assert not torch.equal(one.omega, other.omega)
    torch.testing.assert_close(new(features=5000).omega.std(), torch.tensor(1.0).double(), rtol=0.02, atol=0)
    assert (new(init=2.5).sigma == 2.5).all()


def test_a_sum_that_is_near_zero_or_less_is_taken_for_a_tenth():
    """One key, and a direction along which it is π/2 or more from the query: a cosine of 0 or less."""
    block = create_block("random_features", 2, num_heads=1, features=1, causal=True).double()
    q, k = (torch.tensor(x, dtype=torch.float64)[None, None] for x in ([[1.0, 0]], [[0, 1.0]]))
    v = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    for turn, expected in [(math.pi / 2, 0.0), (math.pi, -10.0), (1.5, 10 * math.cos(1.5)), (1.0, 1.0)]:
        block.omega.copy_(torch.tensor([[turn, 0]]))
        out = block.mix(q, k, v, Grid(1, 1))
        assert out.flatten().tolist() == pytest.approx([expected] * 2, rel=3e-3, abs=5e-2)
        assert block.weights(q, k, Grid(1, 1)).item() == pytest.approx(out[0, 0, 0, 0].item(), rel=1e-9)


def test_the_length_of_queries_and_keys_does_not_matter():
    block, (q, k, v) = new(), random_qkv()
    torch.testing.assert_close(block.mix(30 * q, 100 * k, v, GRID), block.mix(q, k, v, GRID), rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_autocast_leaves_sines_alone(dtype, causal):
    block, (q, k, v) = new(causal=causal).float(), random_qkv().float()
    with torch.autocast("cpu", dtype):
        out = block.mix(q, k, v, GRID)
    assert torch.equal(out, block.mix(q, k, v, GRID))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_future_changes_no_bit_of_the_past(dtype, prefix):
    block, grid = new(causal=True).to(dtype), Grid(13, 17)  # of several chunks
    inputs = [t.to(dtype) for t in random_qkv(prefix + grid.size)]
    out = block.mix(*inputs, grid)
    for place in (0, 16, 63, 64, 130):
        changed = [t.clone() for t in inputs]
        for t in changed:
            t[:, :, prefix + place + 1 :] = 10 * torch.randn_like(t[:, :, prefix + place + 1 :])
        other = block.mix(*changed, grid)
        assert torch.equal(other[:, :, : prefix + place + 1], out[:, :, : prefix + place + 1])
        assert not torch.equal(other, out)


def test_the_state_does_not_grow_with_the_image():
    block = new(causal=True).float()
    small, large = (block.new_cache(3, grid).nbytes for grid in (Grid(2, 3), Grid(97, 89)))
    assert small == large == 3 * HEADS * 2 * 19 * (WIDTH + 1) * 4
    with pytest.raises(ValueError, match="full=True"):
        block.new_cache(3, GRID, full=True)


@pytest.mark.parametrize("options", [{"attn_drop": 0.1}, {"scale": 1.0}, {"features": 0}, {"init": 0.0}])
def test_what_it_has_no_use_for_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        create_block("random_features", DIM, **options)
