import math

import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(11, 13)  # 143 positions: three chunks, the last not full
DIM, HEADS, WIDTH = 34, 2, 17


def softmax_attention(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def phi(x, omega):
    """As the paper writes it, feature by feature."""
    x = x / x.shape[-1] ** 0.25
    return torch.stack([torch.exp((x * w).sum(-1) - (x * x).sum(-1) / 2) for w in omega], dim=-1) / len(omega) ** 0.5


def test_products_of_features_are_those_of_the_softmax_in_the_mean():
    """E φ(q) · φ(k) = exp(q · k d^-½): the mean of many draws is within the scatter of a mean."""
    block = create_block("performer", 7, num_heads=1, features=11).double()  # the second block of rows is cut
    q, k = 0.6 * torch.randn(2, 5, 7, dtype=torch.float64)
    draws, generator = [], torch.Generator().manual_seed(0)
    for _ in range(3000):
        block.redraw(generator)
        draws.append(phi(q, block.omega) @ phi(k, block.omega).T)
    draws, exact = torch.stack(draws), torch.exp(q @ k.T / 7**0.5)
    scatter = draws.std(dim=0) / len(draws) ** 0.5
    assert ((draws.mean(dim=0) - exact).abs() < 4 * scatter).all()
    assert (scatter < 0.1 * exact).all()  # so that it means something
    weights = block.weights(q[None, None], k[None, None], Grid(1, 5))[0, 0]
    torch.testing.assert_close(weights, draws[-1] / draws[-1].sum(dim=1, keepdim=True), rtol=1e-10, atol=0)


def test_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones():
    omega = create_block("performer", DIM, num_heads=HEADS, features=1000 * WIDTH + 5, dtype=torch.float64).omega
    lengths = omega.norm(dim=1)
    for block in (omega / lengths[:, None]).split(WIDTH):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64), rtol=0, atol=1e-12)
    assert abs(lengths.square().mean() / WIDTH - 1) < 0.02  # chi-square: its mean is d, its variance 2 d
    assert abs(lengths.square().var() / (2 * WIDTH) - 1) < 0.1
    assert (omega.mean(dim=0).abs() < 5 / len(omega) ** 0.5).all()  # no side is preferred, also within a block:
    assert (omega[::WIDTH].mean(dim=0).abs() < 5 / 1000**0.5).all()


def test_more_features_come_closer_to_the_softmax():
    q, k, v = torch.randn(3, 2, HEADS, GRID.size, WIDTH, dtype=torch.float64)
    q, k, errors = q / 2, k / 2, []
    for features in (20, 500, 12500):
        block = create_block("performer", DIM, num_heads=HEADS, features=features).double()
        errors.append((block.mix(q, k, v, GRID) - softmax_attention(q, k, v)).square().mean().sqrt())
    assert errors[0] > 2 * errors[1] > 8 * errors[2]


def test_omega_is_drawn_when_made_saved_with_the_weights_and_drawn_anew_on_request():
    one, other = (create_block("performer", DIM, num_heads=HEADS, causal=True) for _ in range(2))
    assert not torch.equal(one.omega, other.omega)
    assert "omega" in one.state_dict() and "omega" not in dict(one.named_parameters())
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.omega, other.omega)
    one.redraw(torch.Generator().manual_seed(3))
    assert not torch.equal(one.omega, other.omega)
    other.redraw(torch.Generator().manual_seed(3))
    assert torch.equal(one.omega, other.omega)


def test_features_are_d_log_d():
    assert len(create_block("performer", 128, num_heads=2).omega) == round(64 * math.log(64))
    assert len(create_block("performer", 3, num_heads=3).omega) == 16
    assert create_block("performer", 128, num_heads=2, features=5).omega.shape == (5, 64)


@pytest.mark.parametrize("size", [12, 1e4])
def test_a_huge_key_of_the_future_is_not_heard_of(size):
    """What the maximum of all keys would tell the past: here also where exp would underflow."""
    block = create_block("performer", DIM, num_heads=HEADS, causal=True)
    q, k, v = torch.randn(3, 2, HEADS, GRID.size, WIDTH)
    out = block.mix(q, k, v, GRID)
    k[:, :, 97] *= size
    other = block.mix(q, k, v, GRID)
    assert torch.equal(other[:, :, :97], out[:, :, :97]) and not torch.equal(other[:, :, 97:], out[:, :, 97:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width, scale", [(17, 2.0), (256, 1.0)])
def test_stabilisers_cancel_where_exp_alone_would_fail(causal, width, scale):
    """Float32 against the plain quotient in float64: of exponents down to -50, and of ω with ‖ω‖² / 2 > 88."""
    block = create_block("performer", width, num_heads=1, causal=causal)
    q, k, v = (scale * torch.randn(3, 1, 1, GRID.size, width)).unbind()
    exact = block.double().weights(q.double(), k.double(), GRID) @ v.double()
    torch.testing.assert_close(block.float().mix(q, k, v, GRID).double(), exact, rtol=1e-3, atol=1e-3)


def test_for_all_pixels_it_is_right_at_any_scale():
    """Where all features of all keys underflow, even in float64, and the plain quotient is 0 / 0."""
    block = create_block("performer", WIDTH, num_heads=1).double()
    q, k, v = 100 * torch.randn(3, 1, 1, GRID.size, WIDTH, dtype=torch.float64)
    of_q, of_k = (x @ block.omega.T / WIDTH**0.25 for x in (q, k))
    exponents = of_q[..., :, None, :] + (of_k - (k * k).sum(-1, keepdim=True) / (2 * WIDTH**0.5))[..., None, :, :]
    assert exponents.exp().sum(dim=(-2, -1)).min() == 0
    weights = exponents.flatten(-2).softmax(-1).unflatten(-1, exponents.shape[-2:]).sum(-1)
    torch.testing.assert_close(block.mix(q, k, v, GRID), weights @ v, rtol=1e-9, atol=1e-9)


def test_keys_whose_features_overflow_stay_finite():
    """A key along ω has the largest exponent there is, ‖ω‖² / 2, here beyond the exp of float32."""
    block = create_block("performer", 256, num_heads=1, causal=True)
    assert (block.omega.square().sum(dim=1) / 2).min() > 88
    k = (256**0.25 * block.omega[: GRID.size]).expand(1, 1, -1, -1).clone().requires_grad_()
    v = torch.randn_like(k)
    out = block.mix(torch.zeros_like(k), k, v, GRID)
    out.square().sum().backward()
    assert out.isfinite().all() and k.grad.isfinite().all()
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_autocast_leaves_exponents_alone(dtype, causal):
    block = create_block("performer", DIM, num_heads=HEADS, causal=causal)
    q, k, v = torch.randn(3, 2, HEADS, GRID.size, WIDTH)
    with torch.autocast("cpu", dtype):
        out = block.mix(3 * q, 3 * k, v, GRID)
    assert torch.equal(out, block.mix(3 * q, 3 * k, v, GRID))


def test_the_state_does_not_grow_with_the_image():
    block = create_block("performer", DIM, num_heads=HEADS, features=19, causal=True)
    small, large = (block.new_cache(3, grid).nbytes for grid in (Grid(2, 3), Grid(97, 89)))
    assert small == large == 3 * HEADS * 19 * (WIDTH + 1) * 4


@pytest.mark.parametrize("options", [{"attn_drop": 0.1}, {"features": 0}, {"features": 2.5}])
def test_what_it_has_no_use_for_is_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        create_block("performer", DIM, **options)
