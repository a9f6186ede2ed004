import pytest
import torch
from timm.layers.cbam import CbamModule
from torch.utils._python_dispatch import TorchDispatchMode

from vision_attn import create_block, describe
from vision_attn.cost import flops

DIM = 37


def lived_in_block(**options):
    block = create_block("cbam", DIM, **options).double().eval()
    if block.spatial is not None:
        norm = block.spatial[1]
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.3, 1.5)
    return block


def test_it_is_timms_with_biases_and_the_two_maps_exchanged():
    """timm: mean before maximum, and no biases in the MLP by default. The authors: maximum first, biases."""
    ours = lived_in_block(rd_channels=5)
    theirs = CbamModule(DIM, rd_channels=5, spatial_kernel_size=7, mlp_bias=True).double().eval()
    state = {
        "channel.fc1.weight": ours.mlp[0].weight[:, :, None, None],
        "channel.fc1.bias": ours.mlp[0].bias,
        "channel.fc2.weight": ours.mlp[2].weight[:, :, None, None],
        "channel.fc2.bias": ours.mlp[2].bias,
        "spatial.conv.conv.weight": ours.spatial[0].weight.flip(1),
    }
    state |= {f"spatial.conv.bn.{name}": tensor for name, tensor in ours.spatial[1].state_dict().items()}
    theirs.load_state_dict(state)
    x = torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_the_maximum_over_channels_comes_before_the_mean():
    block = lived_in_block()
    x = torch.randn(1, DIM, 11, 13, dtype=torch.float64)
    scored = x * block.channel_gate(x)
    conv, norm = block.spatial
    conv.weight.data.zero_()
    for channel, pooled in ((0, scored.amax(dim=1)), (1, scored.mean(dim=1))):
        conv.weight.data.zero_()
        conv.weight.data[0, channel, 3, 3] = 1  # the middle tap
        score = norm.weight * (pooled - norm.running_mean) / (norm.running_var + norm.eps).sqrt() + norm.bias
        torch.testing.assert_close(block.attention_map(x), score.sigmoid(), rtol=1e-12, atol=1e-12)


def test_parts_are_as_in_the_authors_code():
    block = create_block("cbam", 512)
    conv, norm = block.spatial
    assert block.mlp[0].out_features == 512 // 16
    assert block.mlp[0].bias is not None and block.mlp[2].bias is not None
    assert conv.bias is None and conv.kernel_size == (7, 7)
    assert norm.momentum == 0.01 and norm.eps == 1e-5


def test_both_gates_only_weaken():
    block, x = lived_in_block(), torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    assert (block(x).abs() <= x.abs()).all()
    for gate in (block.channel_gate(x), block.spatial_gate(x)):
        assert (0 < gate).all() and (gate < 1).all() and gate.std() > 1e-3


def test_each_gate_can_shut_and_both_can_open():
    block, x = lived_in_block(), torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    channels, pixels = block.mlp[2].bias.data, block.spatial[1].bias.data
    for shut, other in ((channels, pixels), (pixels, channels)):
        shut.fill_(-500), other.fill_(500)
        assert (block(x).abs() < 1e-100).all()
    channels.fill_(500), pixels.fill_(500)
    torch.testing.assert_close(block(x), x, rtol=1e-12, atol=0)


def test_without_the_second_gate_the_order_of_pixels_does_not_matter():
    block, x = lived_in_block(spatial=False), torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    order = torch.randperm(11 * 13)

    def shuffled(x):
        return x.flatten(2)[:, :, order].reshape(x.shape)

    torch.testing.assert_close(block(shuffled(x)), shuffled(block(x)), rtol=1e-12, atol=1e-12)
    with_second = lived_in_block()
    assert not torch.allclose(with_second(shuffled(x)), shuffled(with_second(x)))


def test_without_the_second_gate_all_pixels_are_weighted_alike():
    block, x = lived_in_block(spatial=False), torch.randn(2, DIM, 11, 13, dtype=torch.float64)
    factor = block(x) / x
    torch.testing.assert_close(factor, factor[:, :, :1, :1].expand_as(x), rtol=1e-9, atol=0)
    assert (block.attention_map(x) == 1).all()


def test_it_costs_what_its_docstring_says():
    assert describe("cbam").cost == "2 N d + d² / 4 + 98 N"
    x = torch.empty(1, 512, 7, 11, device="meta")
    assert flops(create_block("cbam", 512, device="meta"), x) == 2 * (
        512**2 // 4 + 98 * 77
    )  # the poolings, 2 N d, are not counted


class Called(TorchDispatchMode):
    """Notes the names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("felt", [False, True])
def test_without_a_gradient_no_places_of_maxima_are_found(felt):
    """A search for places takes several times as long as the maxima alone."""
    block, x = create_block("cbam", DIM), torch.randn(2, DIM, 11, 13, requires_grad=True)
    with torch.set_grad_enabled(felt), Called() as called:
        block(x)
    assert called.names & {"max", "amax"} == {"max" if felt else "amax"}
