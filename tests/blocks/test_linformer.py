import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, cost, create_block, create_layer

GRID = Grid(5, 7)
HEADS, WIDTH = 3, 4
DIM = HEADS * WIDTH


def new(**options):
    return create_block("linformer", DIM, num_heads=HEADS, **{"rank": (2, 3), **options}).double()


def random_qkv(tokens):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("sharing", ["none", "headwise", "key_value"])
def test_at_its_own_length_e_and_f_are_kronecker_products_of_the_tables(sharing, prefix):
    block = new(length=tuple(GRID), sharing=sharing)
    q, k, v = random_qkv(prefix + GRID.size)
    out = block.mix(q, k, v, GRID)
    for head in range(HEADS):
        tables = block.rows[:, head if sharing == "none" else 0], block.columns[:, head if sharing == "none" else 0]
        both = [torch.kron(*pair) for pair in zip(*tables)]  # (k, N) each
        e, f = both[0], both[-1]
        keys, values = (
            torch.cat([t[:, head, :prefix], matrix @ t[:, head, prefix:]], dim=1) for matrix, t in ((e, k), (f, v))
        )
        expected = F.scaled_dot_product_attention(q[:, head], keys, values)
        torch.testing.assert_close(out[:, head], expected, rtol=1e-11, atol=1e-13)


def test_mean_is_average_pooling():
    grid, block = Grid(2 * 7, 3 * 5), new(projection="mean")
    q, k, v = random_qkv(grid.size)
    keys, values = (
        F.adaptive_avg_pool2d(t.mT.reshape(-1, WIDTH, *grid), (2, 3)).reshape(2, HEADS, WIDTH, 6).mT for t in (k, v)
    )
    expected = F.scaled_dot_product_attention(q, keys, values)
    torch.testing.assert_close(block.mix(q, k, v, grid), expected, rtol=1e-11, atol=1e-13)
    for axis in (0, 1):
        table = torch.stack(block.projections(axis, Grid(11, 13), "cpu", torch.float64))  # sizes with a rest
        torch.testing.assert_close(table.sum(dim=-1), torch.ones_like(table[..., 0]), rtol=1e-13, atol=0)
    assert set(new().state_dict()) - set(block.state_dict()) == {"rows", "columns"}


def test_sums_of_projections_stay_at_any_size():
    block = new(length=tuple(GRID))
    for grid in [GRID, Grid(1, 1), Grid(3, 2), Grid(13, 11), Grid(3 * 5, 2 * 7)]:
        for axis, table in enumerate((block.rows, block.columns)):
            projection = torch.stack(block.projections(axis, grid, "cpu", torch.float64))
            torch.testing.assert_close(projection.sum(dim=-1), table.sum(dim=-1), rtol=1e-12, atol=1e-13)


def test_an_entry_stands_for_its_part_of_the_axis_at_any_size():
    block = new(length=(6, 6))
    larger, smaller = (block.projections(0, Grid(height, 5), "cpu", torch.float64)[0][0] for height in (12, 3))
    entries = block.rows[0, 0]
    torch.testing.assert_close(larger, entries.repeat_interleave(2, dim=-1) / 2, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(smaller, entries[:, ::2] + entries[:, 1::2], rtol=1e-12, atol=1e-13)


def test_sharing_is_counted_in_parameters():
    of_one = 2 * 11 + 3 * 13
    bare = cost.parameters(new(projection="mean"))
    for sharing, projections in [("none", 2 * HEADS), ("headwise", 2), ("key_value", 1)]:
        assert cost.parameters(new(length=(11, 13), sharing=sharing)) == bare + projections * of_one


@pytest.mark.parametrize("projection", ["learned", "mean"])
def test_all_pixels_look_at_as_many_keys_whatever_the_size(projection):
    block, operations = new(projection=projection), []
    for width in (43, 86, 172):  # with 11 rows, so the projection of the columns grows likewise
        grid = Grid(11, width)
        operations.append(cost.flops(block.mix, *random_qkv(grid.size), grid))
    assert operations[2] / operations[1] < 2.2 and operations[1] / operations[0] < 2.2


def test_trained_at_one_size_it_runs_at_another():
    layer = create_layer("linformer", DIM, num_heads=HEADS, rank=3, length=(8, 5), init_gain=0.5)
    before = layer.block.rows.clone(), layer.block.columns.clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(2, DIM, 8, 5)).square().mean().backward()
        optimizer.step()
    assert not torch.equal(layer.block.rows, before[0]) and not torch.equal(layer.block.columns, before[1])
    for size in [(13, 7), (3, 11), (1, 1)]:
        assert layer(torch.randn(2, DIM, *size)).isfinite().all()
