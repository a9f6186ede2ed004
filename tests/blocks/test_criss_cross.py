import pytest
import torch

from vision_attn import Grid, create_block, create_layer

GRID = Grid(7, 11)
DIM, HEADS = 39, 3


def test_it_is_a_masked_softmax_over_row_and_column_with_itself_once():
    q, k = torch.randn(2, 2, HEADS, GRID.size, 13, dtype=torch.float64)
    v = torch.randn(2, HEADS, GRID.size, 17, dtype=torch.float64)
    seen = torch.zeros(GRID.size, GRID.size, dtype=torch.bool)
    for y in range(GRID.height):
        for x in range(GRID.width):
            cross = {(y, other) for other in range(GRID.width)} | {(other, x) for other in range(GRID.height)}
            assert len(cross) == GRID.height + GRID.width - 1
            for key_y, key_x in cross:
                seen[y * GRID.width + x, key_y * GRID.width + key_x] = True
    scores = (q @ k.mT * 13**-0.5).masked_fill(~seen, -torch.inf)
    out = create_block("criss_cross", DIM, num_heads=HEADS).mix(q, k, v, GRID)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-11, atol=1e-13)


def test_two_layers_hear_everything_and_one_does_not():
    pattern = create_block("criss_cross", DIM).pattern
    assert pattern.reach(GRID, 2).all()
    assert pattern.reach(GRID, 1).sum() == GRID.size * (GRID.height + GRID.width - 1)


@pytest.mark.parametrize("recurrence, reached", [(1, 7 + 11 - 1), (2, 7 * 11)])
def test_recurrence_on_maps_carries_that_far(recurrence, reached):
    layer = create_layer("criss_cross", DIM, recurrence=recurrence, init_gain=0.5).double()
    x = torch.randn(1, DIM, *GRID, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x)[0, :, 3, 8].sum(), x)
    assert (slope != 0).any(dim=1).sum() == reached


def test_it_is_recurrent_on_maps_by_default_and_once_on_tokens():
    assert create_layer("criss_cross", DIM).block.recurrence == 2
    block = create_block("criss_cross", DIM)
    x = torch.randn(2, GRID.size, DIM)
    q, k, v = block.heads(x, GRID)
    once = block.proj(block.mix(q, k, v, GRID).transpose(1, 2).flatten(2))
    torch.testing.assert_close(block(x, GRID), once)


def test_the_order_of_rows_and_of_columns_does_not_matter():
    block = create_block("criss_cross", DIM, num_heads=HEADS).double()
    x = torch.randn(2, GRID.size, DIM, dtype=torch.float64)
    rows, columns = torch.randperm(GRID.height), torch.randperm(GRID.width)

    def shuffled(tokens):
        return tokens.unflatten(1, GRID)[:, rows][:, :, columns].flatten(1, 2)

    torch.testing.assert_close(block(shuffled(x), GRID), shuffled(block(x, GRID)), rtol=1e-9, atol=1e-12)


def test_the_figure_in_the_refusal_of_causal_is_true():
    grid = Grid(6, 7)
    past = torch.ones(grid.size, grid.size, dtype=torch.bool).tril()
    reached = one = create_block("criss_cross", DIM).pattern.mask(grid) & past
    for _ in range(6):
        reached = (reached.float() @ one.float()) > 0
    assert past.sum() == 903 and (past & ~reached).sum() == 315
    assert "315 of 903 past pairs on 6×7" in create_block("criss_cross", DIM).not_causal


def test_the_papers_choices_can_be_made():
    block = create_block("criss_cross", 64, num_heads=1, key_dim=8, scale=1.0, qkv_bias=True)
    assert block.qkv.out_features == 8 + 8 + 64 and block.scale == 1.0


def test_without_an_output_projection_it_is_as_with_one_that_changes_nothing():
    plain = create_block("criss_cross", DIM, num_heads=HEADS, out_proj=False).double()
    assert set(plain.state_dict()) == {"qkv.weight", "qkv.bias"}
    block = create_block("criss_cross", DIM, num_heads=HEADS).double()
    torch.nn.init.eye_(block.proj.weight), torch.nn.init.zeros_(block.proj.bias)
    block.qkv.load_state_dict(plain.qkv.state_dict())
    x = torch.randn(2, 5 + GRID.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(plain(x, GRID), block(x, GRID), rtol=1e-12, atol=1e-12)
