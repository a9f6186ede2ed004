import pytest
import torch

from vision_attn import Grid, create_block, create_layer

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


def reached(block):
    """Which pixels the output at (3, 8) depends on."""
    x = torch.randn(1, GRID.size, DIM, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(block.double()(x, GRID)[0, 3 * GRID.width + 8].sum(), x)
    return (slope != 0).any(-1).reshape(GRID)


def test_in_sequence_every_pixel_is_reached_and_in_sum_its_row_and_column():
    assert reached(create_block("axial", DIM)).all()
    cross = torch.zeros(GRID, dtype=torch.bool)
    cross[3], cross[:, 8] = True, True
    assert torch.equal(reached(create_block("axial", DIM, mode="sum")), cross)


def test_sequence_is_columns_then_rows_and_sum_is_both_of_the_input():
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    block = create_block("axial", DIM).double()
    columns, rows = block.steps
    assert columns.pattern.draw(Grid(3, 5), 1, 3) == "---#-\n---@-\n---#-"
    assert rows.pattern.draw(Grid(3, 5), 1, 3) == "-----\n###@#\n-----"
    torch.testing.assert_close(block(x, GRID), rows(columns(x, GRID), GRID), rtol=1e-12, atol=0)
    total = create_block("axial", DIM, mode="sum").double()
    total.load_state_dict(block.state_dict())
    torch.testing.assert_close(total(x, GRID), columns(x, GRID) + rows(x, GRID), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("axis, length", [(0, GRID.height), (1, GRID.width)])
def test_relative_positions_at_their_own_size_are_looked_up(axis, length):
    """One pixel at a time, with the table as it is: scores of Axial-DeepLab, q·k + q·r^q + k·r^k."""
    step = create_block("axial", DIM, num_heads=HEADS, length=tuple(GRID)).double().steps[axis]
    q, k, v = (torch.randn(2, HEADS, GRID.size, d, dtype=torch.float64) for d in (13, 13, 17))
    out = step.mix(q, k, v, GRID)
    for y in range(GRID.height):
        for x in range(GRID.width):
            here = y * GRID.width + x
            line = [p * GRID.width + x if axis == 0 else y * GRID.width + p for p in range(length)]
            offsets = [p - (y, x)[axis] + length - 1 for p in range(length)]
            for_q, for_k = step.relative[0, offsets], step.relative[1, offsets]
            query, keys = q[:, :, here, None], k[:, :, line]
            scores = (query * keys + query * for_q + keys * for_k).sum(-1) * 13**-0.5
            expected = (scores.softmax(-1)[..., None] * v[:, :, line]).sum(2)
            torch.testing.assert_close(out[:, :, here], expected, rtol=1e-11, atol=1e-13)


def test_relative_positions_resize():
    step = create_block("axial", DIM, num_heads=HEADS, length=5).double().steps[0]
    table = step.relative
    torch.testing.assert_close(step.resized(5), table, rtol=1e-12, atol=1e-14)
    twice = step.resized(9)  # 5 pixels to 9: every second offset is an old one, the others are halfway
    torch.testing.assert_close(twice[:, ::2], table, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(twice[:, 1::2], (table[:, 1:] + table[:, :-1]) / 2, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(step.resized(3), table[:, ::2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(step.resized(1), table[:, 4:5], rtol=1e-12, atol=1e-14)  # only itself to look at


def test_trained_at_one_size_it_runs_at_another():
    layer = create_layer("axial", DIM, length=5, init_gain=0.5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer.block.steps[0].relative.clone()
    layer(torch.randn(2, DIM, 5, 5)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(layer.block.steps[0].relative, before)
    for size in [(5, 7), (11, 3), (1, 1)]:
        assert layer(torch.randn(2, DIM, *size)).isfinite().all()


def test_positions_tell_order_and_without_them_there_is_none():
    x = torch.randn(1, GRID.size, DIM, dtype=torch.float64)
    rows, columns = torch.randperm(GRID.height), torch.randperm(GRID.width)

    def shuffled(tokens):
        return tokens.unflatten(1, GRID)[:, rows][:, :, columns].flatten(1, 2)

    blind = create_block("axial", DIM).double()
    torch.testing.assert_close(blind(shuffled(x), GRID), shuffled(blind(x, GRID)), rtol=1e-9, atol=1e-12)
    seeing = create_block("axial", DIM, length=(7, 11)).double()
    assert not torch.allclose(seeing(shuffled(x), GRID), shuffled(seeing(x, GRID)))


@pytest.mark.parametrize("mode", ["sequential", "sum"])
def test_its_attention_is_that_of_both_axes(mode):
    block = create_block("axial", DIM, num_heads=1, mode=mode, length=5).double()
    for step in block.steps:  # values and output as they are, so that only the attention acts
        for linear in (step.qkv, step.proj):
            linear.weight.data[-DIM:] = torch.eye(DIM)
            linear.bias.data[-DIM:] = 0
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    total = 2 if mode == "sum" else 1
    torch.testing.assert_close(block(x, GRID), total * block.attention(x, GRID)[:, 0] @ x, rtol=1e-10, atol=1e-12)


def test_axes_have_projections_of_their_own_and_positions_of_their_own_length():
    columns, rows = create_block("axial", DIM, num_heads=HEADS, length=(7, 11)).steps
    assert columns.relative.shape == (2, 2 * 7 - 1, 13) and rows.relative.shape == (2, 2 * 11 - 1, 13)
    assert not torch.equal(columns.qkv.weight, rows.qkv.weight)
    assert not torch.equal(columns.proj.weight, rows.proj.weight)


def test_without_output_projections_it_is_as_with_such_that_change_nothing():
    plain = create_block("axial", DIM, num_heads=HEADS, out_proj=False).double()
    assert set(plain.state_dict()) == {f"chain.{step}.qkv.{name}" for step in (0, 1) for name in ("weight", "bias")}
    block = create_block("axial", DIM, num_heads=HEADS).double()
    for step, other in zip(block.steps, plain.steps):
        torch.nn.init.eye_(step.proj.weight), torch.nn.init.zeros_(step.proj.bias)
        step.qkv.load_state_dict(other.qkv.state_dict())
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(plain(x, GRID), block(x, GRID), rtol=1e-12, atol=1e-12)
