import pytest
import torch

from vision_attn import Grid, create_block

GRID = Grid(7, 11)


@pytest.mark.parametrize("causal", [False, True])
def test_each_share_of_the_heads_has_its_pattern(causal):
    options = dict(kernel_size=(3, 5), stride=(2, 3), tokens=4, causal=causal)
    block = create_block("per_head", 35, num_heads=5, **options).double()
    q, k, v = torch.randn(3, 2, 5, GRID.size, 7, dtype=torch.float64)
    y, x = torch.arange(GRID.size) // 11, torch.arange(GRID.size) % 11
    down, right = y[:, None] - y, x[:, None] - x
    first = torch.arange(GRID.size) < 4
    local = (down.abs() <= 1) & (right.abs() <= 2)
    strided = (down % 2 == 0) & (right % 3 == 0)
    everywhere = first | first[:, None] | torch.eye(GRID.size, dtype=torch.bool)
    masks = torch.stack([local, local, strided, strided, everywhere])
    masks = masks.tril() if causal else masks
    scores = (q @ k.mT * block.scale).masked_fill(~masks, -torch.inf)
    torch.testing.assert_close(block.mix(q, k, v, GRID), scores.softmax(-1) @ v, rtol=1e-10, atol=1e-12)


def test_patterns_can_be_chosen():
    block = create_block("per_head", 32, num_heads=2, patterns=["strided", "local"], kernel_size=3, stride=2)
    strided, local = block.pattern.by_head()
    assert torch.equal(local.mask(GRID), create_block("window", 32, kernel_size=3).pattern.mask(GRID))
    assert not torch.equal(strided.mask(GRID), local.mask(GRID))


@pytest.mark.parametrize("patterns", [[], "local", ["locale"], [["local"]], None])
def test_unknown_patterns_are_named(patterns):
    with pytest.raises(ValueError, match="patterns=.*'local', 'strided', 'global'"):
        create_block("per_head", 32, num_heads=4, patterns=patterns)


def test_a_head_for_each_pattern():
    with pytest.raises(ValueError, match="num_heads=2: must be ≥ 3"):
        create_block("per_head", 32, num_heads=2)
