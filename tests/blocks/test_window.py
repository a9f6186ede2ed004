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


def first_key(query: int, length: int, kernel_size: int, dilation: int) -> int:
    """Where NATTEN's window of an axis begins, as its own code has it, and all of it where the axis is shorter."""
    around = kernel_size // 2
    if kernel_size * dilation > length:  # which NATTEN refuses
        left = [place for place in range(query % dilation, length, dilation)]
        if len(left) <= kernel_size:
            return left[0]
    start = query - around * dilation
    if start < 0:
        return query % dilation
    if query + around * dilation >= length:
        whole = length // dilation * dilation
        rest = length - whole
        if query % dilation < rest:
            return length - rest + query % dilation - 2 * around * dilation
        return whole + query % dilation - kernel_size * dilation
    return start


@pytest.mark.parametrize("grid", [Grid(11, 13), Grid(7, 17), Grid(3, 5), Grid(1, 23)])
@pytest.mark.parametrize(
    "kernel_size, dilation", [((3, 5), (1, 1)), ((7, 3), (1, 1)), ((3, 5), (2, 3)), ((5, 7), (3, 2))]
)
def test_a_window_that_shifts_is_where_natten_has_it(kernel_size, dilation, grid):
    name, options = ("window", {}) if dilation == (1, 1) else ("dilated", {"dilation": dilation})
    block = create_block(name, 16, num_heads=2, kernel_size=kernel_size, border="shift", **options).double()
    q, k, v = torch.randn(3, 1, 2, *grid, 8, dtype=torch.float64)
    wanted = torch.empty_like(q)
    for y in range(grid.height):
        for x in range(grid.width):
            slices = []
            for place, length, size, step in zip((y, x), grid, kernel_size, dilation):
                start = first_key(place, length, size, step)
                slices.append(slice(start, start + size * step, step))
            keys, values = (t[:, :, slices[0], slices[1]].flatten(2, 3) for t in (k, v))
            weights = (block.scale * q[:, :, y, x, None] @ keys.mT).softmax(-1)
            wanted[:, :, y, x] = (weights @ values)[:, :, 0]
    out = block.mix(*(t.flatten(2, 3) for t in (q, k, v)), grid).unflatten(2, grid)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name, least", [("window", (5, 7)), ("dilated", (10, 14))])
def test_a_window_that_shifts_has_as_many_pixels_everywhere(name, least):
    pattern = create_block(name, 16, kernel_size=(5, 7), border="shift").pattern
    assert (pattern.mask(Grid(13, 17)).sum(1) == 35).all() and (pattern.mask(Grid(*least)).sum(1) == 35).all()
    smaller = pattern.mask(Grid(least[0] // 2, 17)).sum(1)
    assert (smaller < 35).all() and (smaller > 0).all()


@pytest.mark.parametrize("name", ["window", "dilated"])
def test_a_causal_window_does_not_shift(name):
    with pytest.raises(ValueError, match="border='shift': must be 'cut' with causal=True"):
        create_block(name, 16, border="shift", causal=True)
