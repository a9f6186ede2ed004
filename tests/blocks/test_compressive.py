import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vision_attn import Grid, create_block

HEADS, WIDTH = 3, 5
DIM = HEADS * WIDTH
GRIDS = [Grid(7, 5), Grid(9, 4), Grid(1, 6), Grid(6, 1), Grid(11, 3)]


def new(**options):
    block = create_block("compressive", DIM, num_heads=HEADS, **{"memory": 1, "stride": 2, "waves": 2} | options)
    with torch.no_grad():
        for parameter in (block.u, block.w, block.cells.of_keys, block.cells.of_values):
            parameter.normal_()
    return block.double()


def lossless(**options):
    """Cells of one pixel each, which are that pixel."""
    block = new(stride=1, **options)
    with torch.no_grad():
        block.cells.of_keys.copy_(torch.eye(WIDTH).repeat(HEADS, 1)[..., None, None])
        block.cells.of_values.fill_(1)
    return block


def seen_by(block, grid, y, x, k, v):
    """Places, keys and values of all that a pixel sees, one by one."""
    memory, c, found = block.exact.memory, block.exact.band, []
    of_keys = block.cells.of_keys.unflatten(0, (HEADS, WIDTH))
    for first in range(0, grid.height, c):
        rows = range(first, min(first + c, grid.height))
        if first + c - 1 < y - memory or (first > y + memory and not block.causal):
            for left in range(0, grid.width, c):
                key, value = 0, 0
                for row in rows:
                    for column in range(left, min(left + c, grid.width)):
                        at, kernel = row * grid.width + column, (..., row - first, column - left)
                        key = key + torch.einsum("noi,bni->bno", of_keys[kernel], k[:, :, at])
                        value = value + block.cells.of_values[kernel][:, None] * v[:, :, at]
                found.append((first + (c - 1) / 2, left + (c - 1) / 2, key, value))
        else:
            pixels = [(row, column) for row in rows for column in range(grid.width)]
            for row, column in pixels if not block.causal else filter((y, x).__ge__, pixels):
                at = row * grid.width + column
                found.append((row, column, k[:, :, at], v[:, :, at]))
    return found


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("causal", [False, True])
def test_exact_keys_and_cells_share_one_softmax(causal, grid):
    block = new(causal=causal)
    q, k, v = torch.randn(3, 2, HEADS, grid.size, WIDTH, dtype=torch.float64)
    out = block.mix(q, k, v, grid)
    for i in range(grid.size):
        scores, values = [], []
        for row, column, key, value in seen_by(block, grid, *divmod(i, grid.width), k, v):
            apart = torch.tensor([i // grid.width - row, i % grid.width - column], dtype=torch.float64)
            angle = (apart[:, None] * torch.tensor([1.0, 0.01], dtype=torch.float64)).flatten()
            of_place = block.W_R @ torch.cat([angle.sin(), angle.cos()])
            scores.append(((q[:, :, i] + block.u) * key + (q[:, :, i] + block.w) * of_place).sum(-1) * WIDTH**-0.5)
            values.append(value)
        weights = torch.stack(scores, dim=-1).softmax(-1)
        expected = torch.einsum("bns,bnsd->bnd", weights, torch.stack(values, dim=2))
        torch.testing.assert_close(out[:, :, i], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
def test_cells_that_lose_nothing_are_dense_attention(causal):
    block = lossless(causal=causal)
    dense = create_block("transformer_xl", DIM, num_heads=HEADS, memory=None, waves=2, causal=causal).double()
    kept = {name: t for name, t in block.state_dict().items() if not name.startswith("cells")}
    dense.load_state_dict(kept)
    x = torch.randn(2, 4 + 77, DIM, dtype=torch.float64)
    torch.testing.assert_close(block(x, Grid(7, 11)), dense(x, Grid(7, 11)), rtol=1e-9, atol=1e-11)


def test_cells_start_near_means():
    block = create_block("compressive", DIM, num_heads=HEADS, stride=3)
    k, v = torch.randn(2, 2, HEADS, 9, WIDTH)
    keys, values = block.cells(k, v, Grid(3, 3))
    torch.testing.assert_close(keys[:, :, 0], k.mean(2))
    assert (values[:, :, 0] - v.mean(2)).norm() < 0.3 * v.mean(2).norm()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("grid", [Grid(9, 4), Grid(7, 5), Grid(2, 3)])
def test_sampling_keeps_recent_rows_and_cells(grid, full):
    block, x = new(causal=True), torch.randn(2, grid.size, DIM, dtype=torch.float64)
    cache = block.new_cache(2, grid, full=full)
    with torch.no_grad():
        out = torch.stack([block.step(x[:, i], i, cache) for i in range(grid.size)], dim=1)
        torch.testing.assert_close(out, block(x, grid), rtol=1e-10, atol=1e-12)
    pixels, cells = min(3, grid.height) * grid.width, -(-grid.height // 2) * -(-grid.width // 2)
    assert (
        full or cache.nbytes == 2 * (pixels + cells) * HEADS * (2 * 16) * 8
    )  # 5 channels, 8 of waves and 3 of nothing


@pytest.mark.parametrize("causal", [False, True])
def test_the_auxiliary_loss_compares_what_is_compressed_with_its_cells(causal):
    grid, block = Grid(9, 4), new(causal=causal)
    x = torch.randn(2, 3 + grid.size, DIM, dtype=torch.float64, requires_grad=True)
    q, k, v = (t[:, :, 3:] for t in block.heads(x, grid))
    waves = block.waves_of(grid, 0, "cpu")
    pixels = block.known(k, v, *waves)
    q = block.asking(q, *waves, like=pixels[0])
    ((_, *cells),) = block.summaries(k, v, grid)
    cells = [t.unflatten(0, (2, HEADS)).flatten(2, 3) for t in cells]
    errors = []
    for i in range(grid.size):
        y = i // 4
        old = [r for r in range(9) if r // 2 * 2 + 1 < y - 1 or (r // 2 * 2 > y + 1 and not causal)]
        if old:
            at = [r * 4 + c for r in old for c in range(4)]
            of = [band * 2 + side for band in sorted({r // 2 for r in old}) for side in range(2)]
            one, other = (
                F.scaled_dot_product_attention(q[:, :, [i]], *(t[:, :, some] for t in known), scale=block.scale)
                for known, some in ((pixels, at), (cells, of))
            )
            errors.append((one - other)[..., :WIDTH].square())
    loss = block.reconstruction(x, grid)
    torch.testing.assert_close(loss, torch.cat(errors).mean(), rtol=1e-9, atol=0)
    slopes = torch.autograd.grad(loss, [x, *block.parameters()], allow_unused=True)
    felt = {name for (name, _), slope in zip([("x", x), *block.named_parameters()], slopes) if slope is not None}
    assert felt == {"cells.of_keys", "cells.of_values"}


def test_the_auxiliary_loss_is_nothing_where_nothing_is_lost():
    x = torch.randn(2, 35, DIM, dtype=torch.float64)
    assert lossless(causal=True).reconstruction(x, Grid(7, 5)) < 1e-24
    loss = new(memory=7).reconstruction(x, Grid(7, 5))
    loss.backward()
    assert loss == 0


def test_a_stopped_gradient_reaches_the_kernel_and_no_other_row():
    block, grid = new(stop_gradient=True, causal=True), Grid(9, 4)
    x = torch.randn(1, grid.size, DIM, dtype=torch.float64, requires_grad=True)
    free = new(causal=True)
    free.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x, grid), free(x, grid), rtol=1e-10, atol=1e-12)
    slopes, full = (torch.autograd.grad(b(x, grid)[:, 28:32].sum(), [x, *b.parameters()]) for b in (block, free))
    rows = slopes[0].unflatten(1, grid).abs().amax(dim=(0, 2, 3))
    assert rows[7] > 0 and not rows[:7].any() and not rows[8:].any()
    for one, other in zip(slopes[1:], full[1:]):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_no_memory_at_all_is_all_in_cells():
    """But for the own band, which is not complete."""
    block = new(memory=0, causal=True)
    assert block.exact.mask(Grid(5, 2)).sum(1).tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


@pytest.mark.parametrize(
    "options, said", [({"memory": -1}, "memory=-1"), ({"stride": 0}, "stride=0: must be an integer")]
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(ValueError, match=said):
        new(**options)


def test_hosts_may_initialise_projections_without_harm():
    block = new()
    before = {name: t.clone() for name, t in block.state_dict().items()}
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
    assert all(torch.equal(t, before[name]) for name, t in block.state_dict().items() if "weight" not in name)
