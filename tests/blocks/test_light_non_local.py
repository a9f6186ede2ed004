import pytest
import torch

from vision_attn import create_block, describe
from vision_attn.cost import flops

DIM, SIZE = 6, (5, 7)


def bare(**options):
    """The block without what is behind the sum: a kernel and a norm that change nothing."""
    block = create_block("light_non_local", DIM, **options).double().eval()
    with torch.no_grad():
        block.near.weight.zero_()[:, 0, 1, 1] = 1
        block.norm.running_var.fill_(1 - block.norm.eps)
    return block


def test_it_is_a_non_local_block_of_the_features_as_they_are():
    x = torch.randn(2, DIM, *SIZE, dtype=torch.float64)
    tokens = x.flatten(2).mT
    expected = tokens + (tokens @ tokens.mT / 35) @ tokens
    torch.testing.assert_close(bare(ratio=1.0, stride=1)(x).flatten(2).mT, expected, rtol=1e-11, atol=1e-13)
    some, at = tokens[..., :3], [7 * y + x for y in (0, 2, 4) for x in (0, 2, 4, 6)]
    expected = tokens + (some @ some[:, at].mT / 35) @ tokens[:, at]
    torch.testing.assert_close(bare(ratio=0.5, stride=2)(x).flatten(2).mT, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size, stride", [((2, 3), 1), ((11, 13), 1), ((11, 13), 3), ((1, 1), 2)])
def test_both_orders_give_the_same_and_the_cheaper_one_is_taken(size, stride, monkeypatch):
    block, x = bare(stride=stride, ratio=0.5), torch.randn(2, DIM, *size, dtype=torch.float64)
    pixels, looked_at = x[0, 0].numel(), x[0, 0, ::stride, ::stride].numel()
    linear = 3 * looked_at * DIM + 3 * pixels * DIM  # φᵀ g, then θ times it
    square = pixels * 3 * looked_at + pixels * looked_at * DIM  # θ φᵀ, then it times g
    assert block.linear_is_cheaper(pixels, looked_at) == (linear <= square)
    outs = []
    for choice in (True, False):
        monkeypatch.setattr(block, "linear_is_cheaper", lambda *_, choice=choice: choice)
        outs.append(block(x))
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size, stride", [((2, 3), 1), ((12, 14), 1), ((12, 14), 2)])
def test_either_order_costs_what_its_docstring_says(size, stride):
    n, d, s, ρ = size[0] * size[1], DIM, stride, 0.5
    linear, square = ρ * n * (1 + 1 / s**2) * d**2, (1 + ρ) * n**2 / s**2 * d
    assert describe("light_non_local").cost == "min(ρ N (1 + 1 / s²) d², (1 + ρ) N² / s² d) + 9 N d"
    block = create_block("light_non_local", d, ratio=ρ, stride=s, device="meta").eval()
    assert flops(block, torch.empty(1, d, *size, device="meta")) == 2 * (min(linear, square) + 9 * n * d)


def test_no_softmax_it_is_cubic_and_zero_at_zero():
    block, x = create_block("light_non_local", DIM).double(), torch.randn(2, DIM, *SIZE, dtype=torch.float64)
    torch.testing.assert_close(block.far(2 * x), 8 * block.far(x), rtol=1e-12, atol=0)
    assert torch.equal(block.far(0 * x), 0 * x) and torch.equal(block.eval()(0 * x), 0 * x)


def test_only_pixels_on_the_stride_are_looked_at():
    block, x = bare(stride=3), torch.randn(1, DIM, *SIZE, dtype=torch.float64)
    for y, column in [(3, 6), (0, 3), (2, 3), (4, 6)]:
        other = x.clone()
        other[:, :, y, column] += 1
        changed = (block(other) != block(x)).any(1).sum()
        assert changed == (35 if y % 3 == column % 3 == 0 else 1)


def test_its_map_shows_how_much_the_mean_pixel_compares_with_each_that_is_looked_at():
    block, x = bare(ratio=0.5, stride=2), torch.randn(2, DIM, *SIZE, dtype=torch.float64)
    for image, shown in zip(x[:, :3], block.attention_map(x)):
        mean = image.flatten(1).mean(dim=1)
        alike = [[abs((mean * image[:, y // 2 * 2, x // 2 * 2]).sum()) for x in range(7)] for y in range(5)]
        torch.testing.assert_close(shown, torch.tensor(alike).double() / max(map(max, alike)), rtol=1e-6, atol=0)
    assert torch.equal(block.attention_map(0 * x), torch.zeros(2, *SIZE).double())


def test_at_least_one_channel_is_compared_and_no_more_than_there_are():
    assert [create_block("light_non_local", DIM, ratio=ratio).compared for ratio in (0.01, 0.5, 1)] == [1, 3, 6]
    for options in ({"ratio": 1.01}, {"ratio": 0.0}, {"stride": 0}, {"stride": (1, 2)}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            create_block("light_non_local", DIM, **options)
