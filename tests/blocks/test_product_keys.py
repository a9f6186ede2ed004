from functools import partial

import pytest
import timm
import torch

from vision_attn import create_block
from vision_attn.blocks.product_keys import Memory

DIM = 37


@pytest.mark.parametrize("keys, nearest", [(5, 1), (5, 4), (5, 7), (5, 25), (1, 1), (2, 3), (13, 11)])
def test_it_reads_the_nearest_of_all_slots(keys, nearest):
    """Each slot with its whole key, the two halves joined: all of them are compared, one after the other."""
    memory = Memory(DIM, keys=keys, nearest=nearest, num_heads=3, key_dim=14).double()
    x = torch.randn(2, 3, DIM, dtype=torch.float64)
    out = memory(x)
    for place in ((0, 0), (1, 2)):
        queries = memory.norm(memory.query(x[place]).reshape(3, 14))
        expected = 0
        for query, (first, second) in zip(queries, memory.keys):
            whole = torch.stack([torch.cat([first[i], second[j]]) for i in range(keys) for j in range(keys)])
            order = sorted(range(keys**2), key=lambda slot: -(whole[slot] @ query).item())[:nearest]
            shares = (whole[order] @ query).exp()
            expected = expected + shares / shares.sum() @ memory.values[order]
        torch.testing.assert_close(out[place], expected, rtol=1e-12, atol=1e-13)


def test_what_is_added_to_a_pixel_comes_of_it_alone():
    block, x = create_block("product_keys", DIM).double(), torch.randn(2, DIM, 5, 7, dtype=torch.float64)
    changed = x.clone()
    changed[0, :, 3, 2] += 1
    others = torch.ones(2, 5, 7, dtype=torch.bool)
    others[0, 3, 2] = False
    same = (block(x) == block(changed)).all(dim=1)
    assert torch.equal(same, others)
    torch.testing.assert_close(block(x[:, :, 3:4, 2:3]), block(x)[:, :, 3:4, 2:3], rtol=1e-12, atol=1e-13)


def test_it_takes_the_place_of_the_mlp_of_a_vit():
    """timm gives it what an MLP gets; with values of 0 nothing is added where the MLP was."""
    make = partial(
        timm.create_model, "vit_tiny_patch16_224", depth=2, img_size=(32, 48), num_classes=5, proj_drop_rate=0.1
    )
    model = make(mlp_layer=partial(Memory, keys=7, nearest=5))
    assert [type(block.mlp) for block in model.blocks] == [Memory, Memory]
    x = torch.randn(2, 3, 32, 48)
    model(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.blocks[0].mlp.parameters())
    plain = make().eval()
    for block in plain.blocks:
        torch.nn.init.zeros_(block.mlp.fc2.weight), torch.nn.init.zeros_(block.mlp.fc2.bias)
    model.load_state_dict({k: v for k, v in plain.state_dict().items() if ".mlp." not in k}, strict=False)
    for block in model.eval().blocks:
        torch.nn.init.zeros_(block.mlp.values)
    torch.testing.assert_close(model(x), plain(x))


def test_its_output_is_dropped_out():
    memory, x = Memory(DIM, drop=0.4).double(), torch.randn(31, DIM, dtype=torch.float64)
    out, kept = memory(x), memory.eval()(x)
    assert 0.55 < (out != 0).double().mean() < 0.65
    torch.testing.assert_close(out[out != 0], kept[out != 0] / 0.6)


def test_usage_tells_which_slots_are_read():
    memory, x = Memory(DIM, keys=5, nearest=3, num_heads=2), torch.randn(11, 13, DIM)
    x.requires_grad_()
    shares = memory.usage(x)
    torch.testing.assert_close(shares.sum(), torch.tensor(1.0))
    memory(x).sum().backward()
    read = memory.values.grad.abs().sum(dim=1) > 0
    assert torch.equal(read, shares > 0)
    torch.testing.assert_close(memory.values.grad[:, 0] / (2 * 11 * 13), shares)  # each of two heads reads 1 in all


def test_at_the_start_nearly_all_slots_are_in_use():
    assert (Memory(64).usage(torch.randn(2048, 64)) > 0).float().mean() > 0.95


def test_its_map_tells_where_one_slot_is_read():
    block, x = create_block("product_keys", DIM, nearest=5).double(), torch.randn(2, DIM, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        block.memory.keys.mul_(1e6)
    torch.testing.assert_close(block.attention_map(x), torch.ones(2, 5, 7, dtype=torch.float64))
    with torch.no_grad():
        block.memory.keys.mul_(0)
    torch.testing.assert_close(block.attention_map(x), torch.full((2, 5, 7), 0.2, dtype=torch.float64))


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(keys=3, nearest=10), r"nearest=10: must be at most keys² = 9"),
        (dict(key_dim=7), "key_dim=7: must be even"),
        (dict(num_heads=0), "num_heads=0: must be an integer ≥ 1"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(options, said):
    for make in (partial(create_block, "product_keys"), Memory):
        with pytest.raises(ValueError, match=said):
            make(DIM, **options)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match=r"x of shape \(2, 5, 36\): must be \(…, 37\)"):
        Memory(DIM)(torch.randn(2, 5, 36))
    with pytest.raises(ValueError, match="in_features=0: must be an integer ≥ 1"):
        Memory(0)
