import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(13, 17)


@pytest.mark.parametrize("causal", [False, True])
def test_dilation_of_one_is_a_window(causal):
    dilated = create_block("dilated", 16, kernel_size=(3, 5), dilation=1, causal=causal)
    window = create_block("window", 16, kernel_size=(3, 5), causal=causal)
    assert torch.equal(dilated.pattern.mask(GRID), window.pattern.mask(GRID))


def test_it_is_a_window_on_each_of_the_grids_it_does_not_mix():
    block = create_block("dilated", 34, num_heads=2, kernel_size=3, dilation=(2, 3)).double()
    window = create_block("window", 34, num_heads=2, kernel_size=3).double()
    q, k, v = torch.randn(3, 2, 2, GRID.size, 17, dtype=torch.float64)
    out = block.mix(q, k, v, GRID).unflatten(2, GRID)
    for y in range(2):
        for x in range(3):
            some = [t.unflatten(2, GRID)[:, :, y::2, x::3] for t in (q, k, v)]
            grid = Grid(*some[0].shape[2:4])
            wanted = window.mix(*(t.flatten(2, 3) for t in some), grid).unflatten(2, grid)
            torch.testing.assert_close(out[:, :, y::2, x::3], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dilation", [0, (2, 0), 1.5])
def test_a_dilation_is_at_least_one(dilation):
    with pytest.raises(ValueError, match="dilation="):
        create_block("dilated", 16, dilation=dilation)
