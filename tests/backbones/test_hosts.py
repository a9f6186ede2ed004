"""What `backbones.insert` meets in other people's models: it finds the right axes and the right places, or refuses."""

import host_sweep
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import GATES, MIXERS, alive
from host_models import BLOCKS, Gives, Host, layers, nhwc
from host_sweep import Host as Swept
from host_sweep import try_host
from torch import nn

import backbones
from backbones.hosts import input_size_of

# Which axis are the channels


def small_swin():
    return torchvision.models.SwinTransformer([4, 4], 24, [1, 2], [2, 4], [5, 5], num_classes=7)


@pytest.mark.parametrize("block", BLOCKS)
def test_swin_of_torchvision_attends_over_its_map(block):
    model = small_swin().eval()
    images = [torch.randn(2, 3, 52, 68), torch.randn(2, 3, 92, 44)]
    wanted, met, given = [model(x) for x in images], [], []
    model.features[1].register_forward_hook(lambda m, args, out: given.append(out))
    backbones.insert(model, block, ["features.1", "features.3"])
    assert [layer.block.dim for layer in layers(model).values()] == [24, 48]
    layer = layers(model)[f"features.1.0.attn_{block}"]
    layer.register_forward_hook(lambda m, args, out: met.append((args[0], out)))
    assert all(torch.equal(model(x), out) for x, out in zip(images, wanted))
    nn.init.constant_(layer.gain, 0.5)
    met.clear(), given.clear()
    for x, shape in zip(images, [(13, 17), (23, 11)]):
        model(x)
        came, went = met.pop()
        assert came.shape == (2, 24, *shape) and torch.equal(nhwc(went), given.pop())
        assert torch.equal(layer(came), went) and not torch.equal(came, went)


@pytest.mark.parametrize(
    "name, args, size, dims",
    [
        ("volo_d1_224", dict(img_size=64), (64, 64), {192, 384}),
        (
            "samvit_base_patch16",
            dict(depth=1, embed_dim=48, num_heads=3, global_attn_indexes=(), img_size=64),
            (64, 64),
            {48},
        ),
        (
            "swin_tiny_patch4_window7_224",
            dict(depths=(1, 1, 1, 1), embed_dim=24, img_size=(56, 84)),
            (56, 84),
            {24, 48, 96, 192},
        ),
        ("test_mambaout", {}, (64, 96), {16, 32, 48, 64}),
    ],
)
def test_stages_whose_channels_come_last(name, args, size, dims):
    model = alive(timm.create_model(name, num_classes=7, **args)).eval()
    height, width = size
    x = torch.randn(2, 3, height, width)
    wanted, shapes = model(x), []
    backbones.insert(model, GATES[0], input_size=(3, *size))
    assert torch.equal(model(x), wanted)
    for layer in layers(model).values():
        layer.register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    model(x)
    assert {shape[1] for shape in shapes} <= dims
    assert all(abs(shape[2] / height - shape[3] / width) <= 1 / min(height, width) for shape in shapes)


@pytest.mark.parametrize("function, axis", [(lambda x: x.clone(), 1), (nhwc, 3)])
def test_channels_are_found_where_all_axes_are_alike(function, axis):
    model = Host(function, channels=8)
    backbones.insert(model, GATES[0], "place", input_size=(3, 32, 32))
    met = []
    layers(model)[f"place.attn_{GATES[0]}"].register_forward_hook(lambda m, args, out: met.append(args[0].shape))
    model(torch.randn(2, 3, 28, 52))
    assert met == [(2, 8, 7, 13)]


def test_channels_are_found_where_the_host_resizes_its_images():
    """Detectors make the shorter side of every image equally long."""

    def resized(x):
        scale = 8 / min(x.shape[-2:])
        return nhwc(F.interpolate(x, scale_factor=scale))

    model = backbones.insert(Host(resized), GATES[0], "place", input_size=(3, 52, 44))
    assert layers(model)[f"place.attn_{GATES[0]}"].block.dim == 12


def test_as_many_tokens_as_channels_are_refused_where_nothing_tells_them_apart():
    """A square of numbers may be (B, N, C) or (B, C, N); a listed block of a ViT is the first."""
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=(32, 48), class_token=False, global_pool="avg")
    model.blocks[0].attn.extra = Gives(lambda x: x @ x.transpose(1, 2))
    model.blocks[0].attn.register_forward_hook(lambda m, args, out: (m.extra(out), out)[1])
    with pytest.raises(ValueError, match=r"gives \(1, 6, 6\) .* no axis is certain"):
        backbones.insert(model, GATES[0], "blocks.0.attn.extra")
    square = timm.create_model("test_vit", img_size=(128, 128), class_token=False, global_pool="avg")
    backbones.insert(square, GATES[0], "blocks.0")
    assert layers(square)


NO_MAPS = {
    "scores of attention": lambda x: x.flatten(2).transpose(1, 2)[:, None] @ x.flatten(2)[:, None],
    "heads of tokens": lambda x: x.flatten(2).transpose(1, 2).unflatten(2, (3, 4)).transpose(1, 2),
    "heads in the middle": lambda x: x.flatten(2).transpose(1, 2).unflatten(2, (3, 4)),
    "windows in the batch": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(0, 2),
    "width before height": lambda x: x.transpose(2, 3),
    "a map without batch": lambda x: x[0],
    "tokens before batch": lambda x: x.flatten(2).permute(2, 0, 1),
    "one number a channel": lambda x: x.mean((2, 3), keepdim=True),
    "rows": lambda x: x.mean(3, keepdim=True),
    "a pair": lambda x: (x, x),
    "a list": lambda x: [x],
    "five axes": lambda x: x.unflatten(1, (3, 4)),
}


@pytest.mark.parametrize("kind", NO_MAPS)
@pytest.mark.parametrize("size", [(44, 52), (48, 48)])
def test_what_is_no_map_is_refused(kind, size):
    model = Host(NO_MAPS[kind])
    with pytest.raises(ValueError, match=r"at='place': gives "):
        backbones.insert(model, GATES[0], "place", input_size=(3, *size))
    assert not layers(model)


@pytest.mark.parametrize("function", [lambda x: x.clone(), nhwc])
def test_what_takes_one_size_is_believed_where_it_lists_its_stages(function):
    model = Host(function, size=(44, 52))
    with pytest.raises(ValueError, match="at='place': gives .* no axis is certain .* try a whole stage"):
        backbones.insert(model, GATES[0], "place", input_size=(3, 44, 52))
    model.feature_info = [dict(module="place", num_chs=12)]
    backbones.insert(model, GATES[0], input_size=(3, 44, 52))
    assert layers(model)[f"place.attn_{GATES[0]}"].block.dim == 12
    assert model(torch.randn(2, 3, 44, 52)).shape == (2,)


def test_the_list_is_not_believed_against_what_is_seen():
    model = Host(nhwc, channels=12)
    model.feature_info = [dict(module="place", num_chs=11)]
    backbones.insert(model, GATES[0], input_size=(3, 44, 52))
    assert layers(model)[f"place.attn_{GATES[0]}"].block.dim == 12


def test_parts_of_a_stage_lie_as_the_stage_does_or_are_refused():
    args = dict(img_size=(56, 84), depths=(1, 1, 1, 1), embed_dim=24)
    model = timm.create_model("swin_tiny_patch4_window7_224", **args)
    backbones.insert(model, GATES[0], "layers.1.blocks.0")
    assert layers(model)[f"layers.1.blocks.0.attn_{GATES[0]}"].block.dim == 48
    with pytest.raises(ValueError, match=r"at='layers.0.blocks.0.attn': gives neither .*; try 'layers.0.blocks.0'"):
        backbones.insert(model, GATES[0], "layers.0.blocks.0.attn")  # windows in the batch
    nest = timm.create_model("nest_tiny", img_size=64)
    with pytest.raises(ValueError, match=r"gives \(1, 16, 16, 96\) .* try levels.0, levels.1, levels.2"):
        backbones.insert(nest, GATES[0], "levels.0.transformer_encoder.0")  # 16 blocks of 4×4 tokens


# Channels of the image


def test_channels_of_the_image_are_those_the_model_tells():
    folded = dict(layers=(1, 1, 1, 1), in_chans=2, num_classes=7)
    assert input_size_of(timm.create_model("tresnet_m", device="meta", **folded))[0] == 2
    assert input_size_of(timm.create_model("csatv2", device="meta"))[0] == 3
    assert input_size_of(timm.create_model("naflexvit_base_patch16_gap", device="meta")) == (3, 384, 384)
    assert input_size_of(timm.create_model("resnet18", device="meta", in_chans=5, features_only=True))[0] == 5
    assert input_size_of(timm.create_model("tresnet_m", features_only=True, out_indices=(1,)))[0] == 3


@pytest.mark.parametrize("block", BLOCKS)
def test_images_that_are_folded_before_the_first_convolution(block):
    model = alive(timm.create_model("tresnet_m", layers=(1, 1, 1, 1), num_classes=7)).eval()
    x = torch.randn(2, 3, 64, 96)
    wanted = model(x)
    backbones.insert(model, block)
    assert len(layers(model)) == 4 and torch.equal(model(x), wanted)
    report = backbones.replace(model, block, "body.layer1.*.se")
    assert report.new and model(x).isfinite().all()


def test_cosine_transforms_before_the_first_convolution():
    model = timm.create_model(
        "csatv2", num_classes=7, depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), transformer_depths=(0, 0, 1, 1)
    )
    model, x = alive(model).eval(), torch.randn(2, 3, 64, 96)
    wanted = model(x)
    backbones.insert(model, GATES[0], input_size=(3, 64, 96))
    assert len(layers(model)) == 4 and torch.equal(model(x), wanted)


def test_tokens_whose_grid_the_model_does_not_tell_are_refused_in_a_line():
    model = timm.create_model("naflexvit_base_patch16_gap", device="meta")
    for call in (backbones.insert, backbones.replace):
        with pytest.raises(ValueError, match="^at='blocks.0.*': gives tokens, and no part of NaFlexVit .* give grid"):
            call(model, MIXERS[0])


def test_a_host_of_maps_and_tokens_takes_layers_behind_its_maps():
    model = timm.create_model("efficientformer_l1", device="meta")
    with pytest.raises(ValueError, match="at='stages.3': gives tokens, .*; or try stages.0, stages.1, stages.2$"):
        backbones.insert(model, GATES[0])
    assert len(layers(backbones.insert(model, GATES[0], "stages.[0-2]"))) == 3


class Folded(nn.Module):
    """Says nothing of its images."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(48, 8, 1)
        self.se = timm.layers.SEModule(8, rd_channels=4)

    def forward(self, x):
        return self.se(self.conv(F.pixel_unshuffle(x, 4))).mean((2, 3))


def test_a_model_that_tells_nothing_asks_for_the_size():
    for call, args in ((backbones.insert, "conv"), (backbones.replace, "se")):
        with pytest.raises(
            ValueError, match=r"^input_size=\(48, 224, 224\): Folded does not take .*; give those of one that it takes$"
        ):
            call(Folded(), GATES[0], args)
        call(Folded(), GATES[0], args, input_size=(3, 52, 44))
    model = Folded()
    model.in_chans = 3
    backbones.insert(model, GATES[0], "conv")
    model.in_chans, model.pretrained_cfg = None, dict(input_size=(4, 52, 44))
    with pytest.raises(ValueError, match="^input_size=None: Folded does not tell what images it takes; give"):
        backbones.insert(model, GATES[0], "se")
    model.pretrained_cfg = dict(input_size=(3, 52, 44))
    backbones.insert(model, GATES[0], "se")


@pytest.mark.parametrize("size", [(3, 50, 44), (1, 52, 44)])
def test_a_size_that_the_model_does_not_take_is_called_so(size):
    with pytest.raises(ValueError, match=rf"^input_size=\({size[0]}, {size[1]}, 44\): Folded does not take an image"):
        backbones.insert(Folded(), GATES[0], "conv", input_size=size)


def test_replace_refuses_attention_with_two_names():
    model = Folded()
    model.again = model.se
    with pytest.raises(ValueError, match="at='se': is also again, which would keep the old one"):
        backbones.replace(model, GATES[0], input_size=(3, 52, 44))


# All of timm and torchvision: a handful here, the rest by hand


HOSTS = [("timm", f"test_{name}") for name in ("resnet", "vit", "mambaout", "maxvit", "byobnet")]
HOSTS += [
    ("timm", "hrnet_w18_small"),
    ("classification", "mobilenet_v3_small"),
    ("detection", "ssdlite320_mobilenet_v3_large"),
]
HOSTS += [("segmentation", "lraspp_mobilenet_v3_large")]


@pytest.mark.parametrize(
    "family, name", HOSTS[:5] + [pytest.param(*host, marks=pytest.mark.slow) for host in HOSTS[5:]]
)
def test_every_place_is_right_or_refused(family, name):
    rows = try_host(Swept("timm" if family == "timm" else "torchvision", family, name))
    assert rows and {row["outcome"] for row in rows} <= {"right", "refused"}, rows


def test_the_sweep_finds_what_lies_wrong():
    """A layer that takes (B, H, W, C) for (B, C, H, W)."""
    model, size = Host(nhwc, channels=8), (3, 96, 160)
    backbones.insert(model, GATES[0], "place", input_size=size)
    (layer,) = layers(model).values()
    seen = []
    layer.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(host_sweep.images(size))
    assert host_sweep.judge(layer, seen) == ""
    for turned in (nhwc(seen[0]), seen[0].transpose(2, 3), seen[0].flip(2)):
        assert "feel the changes" in host_sweep.judge(layer, (turned,)), turned.shape
    assert host_sweep.judge(layer, seen, seen) == "is called 2 times"
