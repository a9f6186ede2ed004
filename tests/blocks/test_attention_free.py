import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(6, 7)
HEADS, WIDTH = 3, 5
DIM = HEADS * WIDTH


def new(causal=False, **options):
    block = create_block("attention_free", DIM, num_heads=HEADS, causal=causal, **{"kernel_size": (3, 5), **options})
    with torch.no_grad():
        block.near.normal_()
    return block.double()


def inputs(tokens=GRID.size):
    return [torch.randn(2, HEADS, tokens, d, dtype=torch.float64) for d in (WIDTH, 1, WIDTH)]


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_each_pixel_is_a_mean_by_keys_and_distances(causal, prefix):
    """The paper's formula for a few pixels, term by term: exp(k + w) near, exp(k) beyond, w read at the offset."""
    block, (q, k, v) = new(causal), inputs(prefix + GRID.size)
    out = block.mix(q, k, v, GRID)
    for y, x in [(0, 0), (2, 3), (4, 6), (5, 6)]:
        above = below = 0
        for j in range(prefix + GRID.size):
            row, column = divmod(j - prefix, 7)
            if causal and j > prefix + y * 7 + x:
                continue
            w = torch.zeros(HEADS, 1)
            if j >= prefix and abs(row - y) <= 1 and abs(column - x) <= 2:
                w = block.near[:, row - y + 1, column - x + 2, None]
            share = torch.exp(k[:, :, j] + w)
            above, below = above + share * v[:, :, j], below + share
        torch.testing.assert_close(out[:, :, prefix + y * 7 + x], above / below, rtol=1e-11, atol=1e-12)


def test_the_gate_is_a_sigmoid_of_the_pixel_itself():
    block, x = new(), torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    q, k, v = block.heads(x, GRID)
    assert [t.shape[-1] for t in (q, k, v)] == [WIDTH, 1, WIDTH]
    with torch.no_grad():
        block.proj.weight.copy_(torch.eye(DIM))
        block.proj.bias.zero_()
        wanted = q.sigmoid() * (block.weights(q, k, GRID) @ v)
        torch.testing.assert_close(block(x, GRID), wanted.transpose(1, 2).flatten(2), rtol=1e-11, atol=1e-12)


def test_without_distances_all_pixels_get_the_same_mean():
    block, (q, k, v) = new(), inputs()
    with torch.no_grad():
        block.near.zero_()
    mean = (k.softmax(dim=2) * v).sum(dim=2, keepdim=True)
    torch.testing.assert_close(block.mix(q, k, v, GRID), mean.expand_as(v), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_one_key_beyond_all_others_takes_all_and_keys_are_held_where_they_can_be_summed(causal):
    block, (q, k, v) = new(causal), inputs()
    k[:, :, 0] = 1e9
    k[:, :, 1:] = -1e9
    for dtype in (torch.float64, torch.float32):
        out = block.to(dtype).mix(*(t.to(dtype) for t in (q, k, v)), GRID)
        torch.testing.assert_close(out, v[:, :, :1].to(dtype).expand_as(v), rtol=1e-5, atol=1e-5)
    k[:, :, 1] = 2e9  # as large as the first: both at the bound
    last = block.double().weights(q, k, GRID)[:, :, -1, :2]
    torch.testing.assert_close(last, torch.full_like(last, 0.5), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kernel_size", [1, (3, 5), (5, 1), (13, 17)])
def test_pixel_by_pixel_it_keeps_its_sums_and_the_rows_that_the_window_reaches(kernel_size):
    block, x = new(causal=True, kernel_size=kernel_size), torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    for full in (False, True):
        cache = block.new_cache(2, GRID, full=full)
        with torch.no_grad():
            out = torch.stack([block.step(x[:, i], i, cache) for i in range(GRID.size)], dim=1)
        torch.testing.assert_close(out, block(x, GRID), rtol=1e-11, atol=1e-12)
    height, width = block.window
    held = (height // 2 + 1) * (7 + width - 1) + 1
    assert block.new_cache(2, GRID).nbytes == 2 * HEADS * (WIDTH + 1) * held * 8


@pytest.mark.parametrize(
    "options, said",
    [
        ({"kernel_size": 4}, "kernel_size=4"),
        ({"scale": 1.0}, "scale=1.0"),
        ({"attn_drop": 0.1}, "attn_drop=0.1"),
        ({"qk_norm": True}, "qk_norm=True"),
    ],
)
def test_what_it_has_no_use_for_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        create_block("attention_free", DIM, **options)
