import pytest
import torch

from vision_attn import Grid, create_block

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
