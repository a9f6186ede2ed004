"""The ResNets for 32×32 images."""

import copy

import pytest
import timm
import torch
from timm.models import load_checkpoint
from torch import nn

import backbones  # noqa: F401  registers the models
from backbones.cifar_resnet import CifarResNet, PadShortcut

DEPTHS = {"cifar_resnet20": (3, 269_722), "cifar_resnet32": (5, 464_154), "cifar_resnet56": (9, 853_018)}


@pytest.mark.parametrize("name", DEPTHS)
def test_layers_and_parameters_are_the_papers(name):
    """Table 6: 0.27 M, 0.46 M, 0.85 M; n blocks a stage, 6 n + 2 layers with weights."""
    blocks, parameters = DEPTHS[name]
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == 6 * blocks + 2 == int(name[-2:])
    assert [len(stage) for stage in (model.layer1, model.layer2, model.layer3)] == [blocks] * 3
    assert model.conv1.weight.shape == (16, 3, 3, 3) and model.conv1.stride == (1, 1)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 32, 32) and cfg["num_classes"] == 10
    assert (cfg["first_conv"], cfg["classifier"]) == ("conv1", "fc")


def test_names_are_those_of_timms_resnet():
    ours, timms = (set(timm.create_model(name).state_dict()) for name in ("cifar_resnet20", "resnet18"))
    shared = {name for name in timms if not name.startswith("layer4") and "downsample" not in name}
    assert shared <= ours
    assert {name.split(".", 2)[2] for name in ours - shared} == {
        name.split(".", 2)[2] for name in shared if "layer1.1" in name
    }


def test_shortcut_is_strided_identity_and_zeros():
    x = torch.randn(2, 3, 7, 11)
    y = PadShortcut(5, 2)(x)
    assert y.shape == (2, 8, 4, 6)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2]) and not y[:, 3:].any()
    assert list(PadShortcut(5, 2).parameters()) == []


def by_hand(model, x):
    """The network of the paper, from its weights."""

    def conv_norm(conv, norm, x):
        return norm(conv(x))

    x = conv_norm(model.conv1, model.bn1, x).relu()
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            y = conv_norm(block.conv2, block.bn2, conv_norm(block.conv1, block.bn1, x).relu())
            stride = 2 if y.shape[1] > x.shape[1] else 1
            shortcut = x[:, :, ::stride, ::stride]
            zeros = torch.zeros(len(x), y.shape[1] - x.shape[1], *y.shape[2:], dtype=x.dtype)
            x = (torch.cat([shortcut, zeros], dim=1) + y).relu()
    return model.fc(x.mean((2, 3)))


def test_forward_is_the_network_of_the_paper():
    model = timm.create_model("cifar_resnet20", zero_init_last=False).double().eval()
    x = torch.randn(2, 3, 22, 26, dtype=torch.float64)
    assert torch.allclose(model(x), by_hand(model, x), rtol=1e-10)


@pytest.mark.parametrize("height, width", [(32, 32), (17, 31), (1, 1), (1, 23), (5, 2)])
def test_any_size(height, width):
    model = timm.create_model("cifar_resnet20").eval()
    assert model(torch.randn(2, 3, height, width)).shape == (2, 10)
    assert model.forward_features(torch.randn(2, 3, height, width)).shape == (2, 64, -(-height // 4), -(-width // 4))


@pytest.mark.parametrize("zero_init_last", [True, False])
def test_no_channel_is_dead_at_the_start(zero_init_last):
    """Every norm feels its gradient: no new channel is exactly zero before a ReLU."""
    model = timm.create_model("cifar_resnet20", zero_init_last=zero_init_last)
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            assert (block.bn2.weight.grad != 0).all()
            zero = zero_init_last and block.downsample is None
            assert (block.bn2.weight == (0 if zero else 1)).all()


def test_after_two_steps_every_parameter_has_a_gradient():
    model = timm.create_model("cifar_resnet20")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_options_of_timm():
    model = timm.create_model(
        "cifar_resnet20",
        num_classes=7,
        in_chans=5,
        global_pool="avgmax",
        act_layer="silu",
        norm_layer="groupnorm1",
        drop_path_rate=0.2,
        drop_rate=0.3,
        block_args=dict(attn_layer="eca"),
    )
    assert model(torch.randn(2, 5, 19, 13)).shape == (2, 7)
    rates = [
        getattr(block.drop_path, "drop_prob", 0)
        for stage in (model.layer1, model.layer2, model.layer3)
        for block in stage
    ]
    assert rates == pytest.approx([0.2 * i / 8 for i in range(9)])
    assert isinstance(model.act1, nn.SiLU) and isinstance(model.bn1, nn.GroupNorm)
    assert type(model.layer3[2].se).__name__ == "EcaModule"
    model.reset_classifier(0)
    assert model(torch.randn(2, 5, 19, 13)).shape == (2, 64)
    assert timm.create_model("cifar_resnet20", num_classes=0, global_pool="")(torch.randn(2, 3, 19, 13)).shape == (
        2,
        64,
        5,
        4,
    )


def test_attention_class_in_the_slot():
    class Half(nn.Module):
        def __init__(self, channels, device=None, dtype=None):
            super().__init__()
            self.channels = channels

        def forward(self, x):
            return x / 2

    model = timm.create_model("cifar_resnet20", block_args=dict(attn_layer=Half))
    assert [stage[0].se.channels for stage in (model.layer1, model.layer2, model.layer3)] == [16, 32, 64]


def test_device_and_dtype():
    model = timm.create_model("cifar_resnet20", device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert (
        timm.create_model("cifar_resnet20", dtype=torch.float64)(torch.randn(1, 3, 9, 9).double()).dtype
        == torch.float64
    )


def test_features():
    model = timm.create_model("cifar_resnet32", features_only=True)
    maps = model(torch.randn(1, 3, 30, 37))
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 30, 37), (16, 30, 37), (32, 15, 19), (64, 8, 10)]
    assert model.feature_info.channels() == [16, 16, 32, 64] and model.feature_info.reduction() == [1, 1, 2, 4]
    assert (
        len(timm.create_model("cifar_resnet32", features_only=True, out_indices=(1, 3))(torch.randn(1, 3, 8, 8))) == 2
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_intermediates(checkpointing):
    model = timm.create_model("cifar_resnet20").eval()
    x = torch.randn(2, 3, 21, 14)
    features = model.forward_features(x)
    model.set_grad_checkpointing(checkpointing)
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, features) and torch.equal(maps[-1], features) and len(maps) == 4
    assert torch.equal(model.forward_features(x), features)
    two = model.forward_intermediates(x, indices=[0, -2], intermediates_only=True, stop_early=True)
    assert torch.equal(two[0], maps[0]) and torch.equal(two[1], maps[2])

    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([2]) == [2]
    assert torch.equal(pruned(x), maps[2]) and pruned.num_features == 32
    assert len(pruned.layer3) == 0 and isinstance(pruned.fc, nn.Identity)


def test_saved_weights_come_back(tmp_path):
    model = timm.create_model("cifar_resnet20", num_classes=5).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = timm.create_model("cifar_resnet20", num_classes=5).eval()
    load_checkpoint(again, str(tmp_path / "w.pt"))
    assert torch.equal(again(x), model(x))
    overlay = dict(file=str(tmp_path / "w.pt"), num_classes=5)
    grey = timm.create_model(
        "cifar_resnet20", pretrained=True, num_classes=5, in_chans=1, pretrained_cfg_overlay=overlay
    )
    assert torch.allclose(grey.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    assert torch.equal(grey.layer3[2].conv2.weight, model.layer3[2].conv2.weight)

    timm.models.save_for_hf(model, tmp_path / "hub", model_args=dict(num_classes=5), safe_serialization=True)
    local = timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True).eval()
    assert isinstance(local, CifarResNet) and torch.equal(local(x), model(x))


def test_scripts_and_deepcopies():
    model = timm.create_model("cifar_resnet20").eval()
    x = torch.randn(2, 3, 18, 25)
    assert torch.allclose(torch.jit.script(model)(x), model(x), atol=1e-6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"layers must be three positive ints, one per stage, got \(3, 3\)"):
        CifarResNet((3, 3))
    with pytest.raises(ValueError, match="layers must be three positive ints"):
        CifarResNet((3, 0, 3))
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        timm.create_model("cifar_resnet20", colour=1)
