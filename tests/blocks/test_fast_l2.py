import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(11, 13)  # 143 positions: three chunks, the last not full
DIM, HEADS, WIDTH = 34, 2, 17


def inputs():
    return torch.randn(3, 2, HEADS, GRID.size, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_it_is_the_sum_of_values_by_the_cosine(mean, causal):
    block = create_block("fast_l2", DIM, num_heads=HEADS, mean=mean, causal=causal)
    q, k, v = inputs()
    out = block.mix(q, k, v, GRID)
    for i in range(0, GRID.size, 7):
        seen = range(i + 1 if causal else GRID.size)
        cosines = [torch.cosine_similarity(q[:, :, i], k[:, :, j], dim=-1) for j in seen]
        wanted = sum(cosine[..., None] * v[:, :, j] for cosine, j in zip(cosines, seen))
        torch.testing.assert_close(out[:, :, i], wanted / len(seen) if mean else wanted, rtol=1e-10, atol=1e-12)


def test_the_mean_does_not_grow_with_the_image():
    """The same pixels twice give the same, where the plain sum gives twice as much."""
    q, k, v = inputs()
    twice = [torch.cat([t, t], dim=2) for t in (q, k, v)]
    for mean, factor in ((True, 1), (False, 2)):
        block = create_block("fast_l2", DIM, num_heads=HEADS, mean=mean)
        out, other = block.mix(q, k, v, GRID), block.mix(*twice, Grid(22, 13))
        torch.testing.assert_close(other[:, :, : GRID.size], factor * out, rtol=1e-10, atol=1e-12)


def test_only_directions_matter_and_weights_are_signed():
    block = create_block("fast_l2", DIM, num_heads=HEADS)
    q, k, v = inputs()
    lengths = 10 * torch.rand(2, 2, HEADS, GRID.size, 1, dtype=torch.float64) + 0.1
    scaled = block.mix(lengths[0] * q, lengths[1] * k, v, GRID)
    torch.testing.assert_close(scaled, block.mix(q, k, v, GRID), rtol=1e-10, atol=1e-12)
    weights = block.weights(q, k, GRID)
    assert weights.min() < 0 < weights.max() and weights.abs().max() <= 1 / GRID.size
    assert not block.averages


def test_a_pixel_without_direction_takes_and_gives_nothing():
    block = create_block("fast_l2", DIM, num_heads=HEADS)
    q, k, v = inputs()
    q[:, :, 5] = k[:, :, 7] = 0
    weights = block.weights(q, k, GRID)
    assert (weights[:, :, 5] == 0).all() and (weights[:, :, :, 7] == 0).all()
    assert (block.mix(q, k, v, GRID)[:, :, 5] == 0).all()


def test_prefix_tokens_are_counted():
    """In causal order each token divides by what it has seen, and prefix tokens by their number."""
    block = create_block("fast_l2", DIM, num_heads=HEADS, causal=True)
    same = torch.ones(2, HEADS, 5 + GRID.size, WIDTH, dtype=torch.float64)  # all cosines are 1
    torch.testing.assert_close(block.mix(same, same, same, GRID), same, rtol=1e-12, atol=0)
    assert torch.equal(block.weights(same, same, GRID)[0, 0, :7].count_nonzero(-1), torch.tensor([5] * 5 + [6, 7]))


def test_a_plain_sum_beyond_half_precision_is_taken_in_a_wider_one():
    """The sum over all pixels passes 65504 on the way; what is returned does not."""
    block = create_block("fast_l2", 1, num_heads=1)
    one = torch.ones(1, 1, GRID.size, 1, dtype=torch.float16)
    assert torch.equal(block.mix(one, one, 1000 * one, GRID), 1000 * one)


@pytest.mark.parametrize("mean", [False, True])
def test_pixel_by_pixel_it_divides_by_the_pixels_so_far_or_not(mean):
    block = create_block("fast_l2", DIM, num_heads=HEADS, mean=mean, causal=True).double()
    x, grid = torch.randn(3, 35, DIM, dtype=torch.float64), Grid(5, 7)
    cache = block.new_cache(3, grid)
    steps = torch.stack([block.step(x[:, place], place, cache) for place in range(35)], dim=1)
    torch.testing.assert_close(steps, block(x, grid), rtol=1e-10, atol=1e-12)


def test_the_state_does_not_grow_with_the_image():
    block = create_block("fast_l2", DIM, num_heads=HEADS, causal=True)
    small, large = (block.new_cache(3, grid).nbytes for grid in (Grid(2, 3), Grid(97, 89)))
    assert small == large == 3 * HEADS * WIDTH * WIDTH * 4


@pytest.mark.parametrize("options, said", [({"attn_drop": 0.1}, "attn_drop=0.1"), ({"scale": 1.0}, "scale=1.0")])
def test_what_it_has_no_use_for_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        create_block("fast_l2", DIM, **options)
