import pytest
import timm.layers
import torch

from vision_attn import create_block, describe
from vision_attn.cost import flops

DIM = 37


def test_it_is_timms_where_the_authors_are_followed():
    """timm multiplies by default and squeezes to 1/8; with the authors' choices the two are the same."""
    for fusion in ("add", "multiply", "both"):
        ours = create_block("global_context", DIM, fusion=fusion, rd_channels=5).double()
        theirs = timm.layers.GlobalContext(
            DIM, rd_channels=5, fuse_add=fusion != "multiply", fuse_scale=fusion != "add"
        ).double()
        state = {"conv_attn.weight": ours.key.weight, "conv_attn.bias": ours.key.bias}
        for name, transform in (("mlp_add", ours.add), ("mlp_scale", ours.multiply)):
            if transform is None:
                continue
            first, norm, _, last = transform
            torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
            getattr(theirs, name).norm.eps = norm.eps  # timm: 1e-6, the authors: 1e-5
            state |= {f"{name}.fc1.weight": first.weight[:, :, None, None], f"{name}.fc1.bias": first.bias}
            state |= {f"{name}.norm.weight": norm.weight, f"{name}.norm.bias": norm.bias}
            state |= {f"{name}.fc2.weight": last.weight[:, :, None, None], f"{name}.fc2.bias": last.bias}
        theirs.load_state_dict(state)
        x = torch.randn(2, DIM, 11, 13, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pooling", ["attention", "average"])
def test_of_a_constant_image_the_context_is_the_constant(pooling):
    """A softmax that is defined and never applied, as in a known copy, gives the number of pixels."""
    block = create_block("global_context", DIM, pooling=pooling).double()
    seen = []
    block.add.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(torch.ones(2, DIM, 11, 13, dtype=torch.float64))
    torch.testing.assert_close(seen[0], torch.ones(2, DIM, dtype=torch.float64), rtol=1e-12, atol=0)


def test_its_gate_stays_between_shut_and_open_and_can_be_both():
    block = create_block("global_context", DIM, fusion="multiply").double()
    x = torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    factor = block(x) / x
    assert (0 < factor).all() and (factor < 1).all()
    last = block.multiply[-1]
    for bias, factor in ((500, 1), (-500, 0)):
        torch.nn.init.constant_(last.bias, bias)
        torch.testing.assert_close(block(x), factor * x, rtol=1e-12, atol=1e-12)


def test_every_pixel_gets_the_same_summary():
    block, x = create_block("global_context", DIM).double(), torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    added = block(x) - x
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(x), rtol=0, atol=1e-12)


def test_the_order_of_pixels_does_not_matter():
    block = create_block("global_context", DIM, fusion="both").double()
    x = torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    order = torch.randperm(11 * 13)

    def shuffled(x):
        return x.flatten(2)[:, :, order].reshape(x.shape)

    torch.testing.assert_close(block(shuffled(x)), shuffled(block(x)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_and_their_gradients_are_right_and_lie_as_the_pixels_do(layout):
    block = create_block("global_context", 5, fusion="both").double()
    x = torch.randn(2, 5, 3, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(block, x) and torch.autograd.gradgradcheck(block, x)
    assert torch.autograd.grad(block(x), x, torch.randn_like(x))[0].is_contiguous(memory_format=layout)


def test_its_map_sums_to_one():
    block, x = create_block("global_context", DIM).double(), torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    seen = block.attention_map(x)
    torch.testing.assert_close(seen.sum(dim=(1, 2)), torch.ones(2, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_bottleneck_is_a_sixteenth():
    block = create_block("global_context", 512, fusion="both")
    assert block.add[0].out_features == block.multiply[0].out_features == 32
    assert block.add[1].normalized_shape == (32,) and block.key.out_channels == 1


def test_it_costs_what_its_docstring_says():
    assert describe("global_context").cost == "2 N d + d² / 8"
    x = torch.empty(1, 512, 7, 11, device="meta")
    assert flops(create_block("global_context", 512, device="meta"), x) == 2 * (2 * 77 * 512 + 512**2 // 8)
