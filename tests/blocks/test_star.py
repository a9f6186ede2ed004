import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import Grid, create_block
from vision_attn.testing.case import lived_in

GRID = Grid(5, 7)
DIM, HEADS = 12, 3


def new(**options):
    return lived_in(create_block("star", DIM, **{"num_heads": HEADS, "cycles": 1, **options}))


def torchs(mixer):
    """torch's attention with the projections of a mixer, and the LeakyReLU behind it."""
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True, dtype=torch.float64)
    state = {f"in_proj_{name}": value for name, value in mixer.qkv.state_dict().items()}
    attention.load_state_dict(state | {f"out_proj.{name}": value for name, value in mixer.proj.state_dict().items()})
    return lambda query, context: F.leaky_relu(attention(query, context, context, need_weights=False)[0])


@pytest.mark.parametrize("cycles", [1, 2])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_relay_and_ring_are_torchs_attention_in_turn(prefix, cycles):
    block = new(cycles=cycles, kernel_size=(3, 5))
    x = torch.randn(2, prefix + GRID.size, DIM, dtype=torch.float64)
    start = pixels = x[:, prefix:]
    relay = x[:, :prefix] if prefix else start.mean(dim=1, keepdim=True)
    for cycle in block.cycles:
        of_relay, of_ring, normed = torchs(cycle.relay), torchs(cycle.ring), cycle.norm(pixels)
        relay, new_pixels = of_relay(relay, torch.cat([relay, pixels], dim=1)), []
        for y in range(5):
            for column in range(7):
                ring = [p * 7 + r for p in range(5) for r in range(7) if abs(p - y) <= 1 and abs(r - column) <= 2]
                here = [y * 7 + column]
                new_pixels.append(of_ring(normed[:, here], torch.cat([normed[:, ring], start[:, here], relay], dim=1)))
        pixels = torch.cat(new_pixels, dim=1)
    expected = torch.cat([relay, pixels], dim=1) if prefix else pixels
    torch.testing.assert_close(block(x, GRID), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [3, (7, 13)])
def test_beyond_the_border_there_are_no_keys(kernel_size):
    """Values that are 1 everywhere come out as 1: a key of zeros would have a share."""
    block = new(kernel_size=kernel_size)
    with torch.no_grad():
        for mixer in (block.cycles[0].ring, block.cycles[0].relay):
            mixer.qkv.weight[-DIM:], mixer.qkv.bias[-DIM:] = 0, 1
            mixer.proj.weight.copy_(torch.eye(DIM)), mixer.proj.bias.zero_()
    out = block(torch.randn(2, GRID.size, DIM, dtype=torch.float64), GRID)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-12, atol=0)


def test_without_a_relay_of_the_host_it_starts_as_the_mean():
    block, x = new(cycles=2), torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    with_mean = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
    torch.testing.assert_close(block(with_mean, GRID)[:, 1:], block(x, GRID), rtol=1e-11, atol=1e-13)
    other = torch.cat([x.mean(dim=1, keepdim=True) + 1, x], dim=1)
    assert not torch.allclose(block(other, GRID)[:, 1:], block(x, GRID))


@pytest.mark.parametrize("prefix", [0, 1])
def test_through_the_relay_any_two_pixels_hear_each_other(prefix):
    block, x = new(kernel_size=1), torch.randn(1, prefix + GRID.size, DIM, dtype=torch.float64)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(block(x, GRID)[0, -3].sum(), x)
    assert (slope != 0).any(-1).all()


@pytest.mark.parametrize("prefix", [0, 2])
def test_its_attention_sums_to_one_and_reaches_other_pixels_by_a_relay_that_is_no_token(prefix):
    block, x = new(cycles=2), torch.randn(2, prefix + GRID.size, DIM, dtype=torch.float64)
    attention = block.attention(x, GRID)[:, 0]
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones_like(attention[..., 0]))
    assert (attention > 0).all() == (prefix == 0)


def test_with_relays_of_the_host_its_attention_is_what_goes_through_ring_and_relay():
    block, x = new(num_heads=1, kernel_size=(3, 5)), torch.randn(2, 2 + GRID.size, DIM, dtype=torch.float64)
    (cycle,) = block.cycles
    with torch.no_grad():  # values as they are, and all positive, so that the LeakyReLU does nothing
        for mixer in (cycle.ring, cycle.relay):
            mixer.qkv.weight[-DIM:], mixer.proj.weight[:] = torch.eye(DIM), torch.eye(DIM)
            mixer.qkv.bias[-DIM:], mixer.proj.bias[:] = 0, 0
        cycle.norm.eps, cycle.norm.weight[:], cycle.norm.bias[:] = 0, 1, 9
    x = F.layer_norm(x, [DIM], eps=0) + 9
    of_relay, of_pixels = block.attention(x, GRID)[:, 0].split([2, GRID.size], dim=1)
    relay = of_relay @ x
    pixels = of_pixels @ torch.cat([relay, x[:, 2:]], dim=1)
    torch.testing.assert_close(block(x, GRID), torch.cat([relay, pixels], dim=1), rtol=1e-9, atol=1e-11)


def test_rounds_have_projections_of_their_own():
    one, three = ({name for name, _ in new(cycles=cycles).named_parameters()} for cycles in (1, 3))
    assert len(three) == 3 * len(one) and len(new(cycles=3).cycles) == 3
    with pytest.raises(ValueError, match="cycles=0"):
        new(cycles=0)
