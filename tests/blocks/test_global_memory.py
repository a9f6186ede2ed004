import pytest
import torch
import torch.nn.functional as F

from vision_attn import Grid, create_block

GRID = Grid(5, 7)
HEADS, WIDTH = 2, 5
DIM = HEADS * WIDTH


def new(**options):
    return create_block("global_memory", DIM, num_heads=HEADS, **{"memory": 3, "chunk": (2, 3), **options}).double()


def random_qkv(tokens=GRID.size):
    return torch.randn(3, 2, HEADS, tokens, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("prefix", [0, 2])
def test_memory_reads_everything_and_is_looked_at_beside_the_chunk(prefix):
    block, (q, k, v) = new(), random_qkv(prefix + GRID.size)
    out = block.mix(q, k, v, GRID)
    read_keys, read_values = [], []
    for query, key in zip(*(t.unbind(dim=1) for t in block.memory)):
        read = F.scaled_dot_product_attention(query[:, None].expand(2, -1, -1, -1), k, torch.cat([k, v], dim=-1))
        read_keys.append(key[:, None] + read[..., :WIDTH])
        read_values.append(read[..., WIDTH:])
    for y, x in [(0, 0), (3, 4), (4, 6)]:
        chunk = [p * 7 + r for p in range(5) for r in range(7) if p // 2 == y // 2 and r // 3 == x // 3]
        seen, here = [*range(prefix), *(prefix + i for i in chunk)], [prefix + y * 7 + x]
        keys = torch.cat([*read_keys, k[:, :, seen]], dim=2)
        values = torch.cat([*read_values, v[:, :, seen]], dim=2)
        expected = F.scaled_dot_product_attention(q[:, :, here], keys, values)
        torch.testing.assert_close(out[:, :, here], expected, rtol=1e-11, atol=1e-13)


def test_without_its_memory_a_pixel_knows_its_chunk_alone_and_with_one_only_all_are_told_the_same():
    block, (q, k, v) = new(memory=1), random_qkv()
    q[..., 0] = 1
    with torch.no_grad():
        block.memory[1, ..., 0] = -1e6
    chunks = F.scaled_dot_product_attention(q, k, v, attn_mask=block.chunk.mask(GRID))
    torch.testing.assert_close(block.mix(q, k, v, GRID), chunks, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        block.memory[1, ..., 0] = 1e6
    out = block.mix(q, k, v, GRID)
    told = F.scaled_dot_product_attention(block.memory[0].expand(2, -1, -1, -1), k, v)
    torch.testing.assert_close(out, told.expand_as(out), rtol=1e-9, atol=1e-11)


def test_every_pixel_hears_every_other():
    block, x = new(memory=1, chunk=1), torch.randn(1, GRID.size, DIM, dtype=torch.float64)
    assert (block.attention(x, GRID) > 0).all()
    x.requires_grad_()
    (slope,) = torch.autograd.grad(block(x, GRID)[0, 2 * 7 + 5].sum(), x)
    assert (slope != 0).any(-1).all()


def test_where_a_chunk_is_does_not_matter_nor_where_in_it_a_pixel():
    block, grid = new(), Grid(2 * 5, 3 * 7)
    places = torch.arange(grid.size).reshape(5, 2, 7, 3).transpose(1, 2).reshape(35, 6)  # (chunks, pixels)
    shuffled = torch.stack([chunk[torch.randperm(6)] for chunk in places[torch.randperm(35)]])
    order = torch.empty(grid.size, dtype=torch.int64)
    order[places.flatten()] = shuffled.flatten()
    x = torch.randn(2, grid.size, DIM, dtype=torch.float64)
    torch.testing.assert_close(block(x[:, order], grid), block(x, grid)[:, order], rtol=1e-10, atol=1e-12)
    across = torch.randperm(grid.size)
    assert not torch.allclose(block(x[:, across], grid), block(x, grid)[:, across])
