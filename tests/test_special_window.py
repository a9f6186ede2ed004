import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(11, 13)


def test_it_is_a_softmax_over_unfolded_windows():
    block = create_block("window", 34, num_heads=2, kernel_size=(3, 5)).double()
    q, k, v = torch.randn(3, 2, 2, GRID.size, 17, dtype=torch.float64)

    def windows(t):  # (B · heads, d, 15, N)
        return F.unfold(t.mT.reshape(4, 17, *GRID), (3, 5), padding=(1, 2)).reshape(4, 17, 15, GRID.size)

    inside = F.unfold(torch.ones(1, 1, *GRID, dtype=torch.float64), (3, 5), padding=(1, 2))[0]
    scores = (windows(k) * q.reshape(4, GRID.size, 17).mT[:, :, None]).sum(1) * block.scale
    weights = scores.masked_fill(inside == 0, -torch.inf).softmax(dim=1)
    out = (windows(v) * weights[:, None]).sum(2).mT.reshape(2, 2, GRID.size, 17)
    torch.testing.assert_close(block.mix(q, k, v, GRID), out, rtol=1e-10, atol=1e-12)


def test_shifting_the_image_shifts_the_output():
    """Far from the border, and not by a multiple of any tile."""
    block = create_block("window", 16, num_heads=2, kernel_size=5).double()
    x = torch.randn(1, 29, 31, 16, dtype=torch.float64)

    def run(image):
        return block(image.flatten(1, 2), Grid(*image.shape[1:3])).reshape(image.shape)

    torch.testing.assert_close(run(x[:, 3:, 5:])[:, 2:, 2:], run(x)[:, 5:, 7:], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [2, (3, 4), 0, 2.0, (3, 3, 3)])
def test_a_window_has_a_middle(size):
    with pytest.raises(ValueError, match="kernel_size="):
        create_block("window", 16, kernel_size=size)
