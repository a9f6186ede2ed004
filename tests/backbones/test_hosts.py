"""What `backbones.insert` meets in other people's models: it finds the right axes and the right places, or refuses."""

import copy

import host_sweep
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import GATES, MIXERS, alive
from host_sweep import Host as Swept
from host_sweep import try_host
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import backbones
from backbones.hosts import input_size_of
from vision_attn.layout import Residual

BLOCKS = [GATES[0], MIXERS[0]]


def layers(model) -> dict[str, Residual]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Residual)}


class Gives(nn.Module):
    """What ``function`` makes of a map."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Host(nn.Module):
    """A convolution, a place behind it, and an answer; ``size`` is the only one it takes, None: any."""

    def __init__(self, function=lambda x: x, channels=12, size=None, stride=4):
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(3, channels, stride, stride)
        self.place = Gives(function)

    def forward(self, x):
        if self.size and tuple(x.shape[-2:]) != self.size:
            raise RuntimeError(f"takes {self.size} only")
        out = self.place(self.conv(x))
        return (out if isinstance(out, torch.Tensor) else out[0]).flatten(1).mean(1)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


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


# Modules that run their children themselves


class SkipSequential(nn.Sequential):
    def forward(self, x):
        for part in self:
            x = x + part(x)
        return x


class Walks(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)

    def forward(self, x):
        return self._forward_impl(x)

    def _forward_impl(self, x):
        for part in self.children():
            x = torch.relu(part(x))
        return x


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("part", [SkipSequential(nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)), Walks()])
def test_only_plain_chains_are_entered(part, block):
    model, x = Host(), torch.randn(2, 3, 28, 44)
    model.place = nn.Sequential(nn.Sequential(copy.deepcopy(part)), nn.Sequential(nn.Identity(), nn.Identity()))
    wanted = model(x)
    with pytest.raises(ValueError, match=r"at='place.0.0': runs all its children, so it can't hold a layer"):
        backbones.insert(model, block, "place.0")
    assert not layers(model) and torch.equal(model(x), wanted)
    backbones.insert(model, block, "place")
    assert list(layers(model)) == [f"place.1.1.attn_{block}"] and torch.equal(model(x), wanted)


@pytest.mark.parametrize(
    "name, place",
    [("rdnet_tiny", "dense_stages.0.0"), ("hrnet_w18_small", "stage2.0"), ("pit_xs_224", "transformers.0")],
)
def test_stages_of_timm_that_are_no_plain_chains_are_refused(name, place):
    model = timm.create_model(name, device="meta")
    with pytest.raises(ValueError, match=rf"at='{place}.*': (runs all its children|gives neither)"):
        backbones.insert(model, GATES[0], place)
    assert not layers(model)


# Modules in several places, and parts that are fused away


class Conv(nn.Module):
    """As in YOLO networks: one activation for all, and a norm that is merged before the network is used."""

    default_act = nn.SiLU()

    def __init__(self, c1, c2, k=3, s=1):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = self.default_act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class Bottleneck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c), Conv(c, c)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class Concat(nn.Module):
    def forward(self, xs):
        return torch.cat(xs, 1)


class Yolo(nn.Module):
    """Rows that take what the rows ``f`` gave."""

    def __init__(self):
        super().__init__()
        rows = [
            Conv(3, 8, 3, 2),
            Conv(8, 12, 3, 2),
            Bottleneck(12),
            nn.Upsample(scale_factor=2),
            Concat(),
            Conv(20, 16),
        ]
        for i, (row, f) in enumerate(zip(rows, (-1, -1, -1, -1, (-1, 0), -1))):
            row.i, row.f = i, f
        self.model = nn.Sequential(*rows)

    def forward(self, x):
        given = []
        for row in self.model:
            x = row(x if row.f == -1 else [x if f == -1 else given[f] for f in row.f])
            given.append(x)
        return given[2], x

    def fuse(self):
        for part in self.model.modules():
            if isinstance(part, Conv) and hasattr(part, "bn"):
                part.conv = fuse_conv_bn_eval(part.conv, part.bn)
                del part.bn
                part.forward = part.forward_fuse
        return self


YOLO = (3, 52, 76)


@pytest.fixture
def yolo():
    return alive(Yolo()).double().eval()


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("at, place, better", [
    ("model.0.act", "model.0.act", "model.0"),
    ("model.*.act", "model.0.act", "model.0"),
    ("model.2.cv1.act", "model.2.cv1.act", "model.2.cv1"),
])  # fmt: skip
def test_an_activation_that_all_convolutions_share_is_refused(yolo, at, place, better):
    x = torch.randn(2, *YOLO).double()
    wanted = yolo(x)
    with pytest.raises(ValueError, match=f"at='{place}': is also model.*; try '{better}'$"):
        backbones.insert(yolo, GATES[0], at, input_size=YOLO)
    assert not layers(yolo) and not list(Conv.default_act.children()) and not Conv.default_act._forward_hooks
    assert same(yolo(x), wanted)


def test_what_a_class_shares_is_refused_though_the_network_has_it_once():
    class Once(Host):
        def __init__(self):
            super().__init__()
            self.place = Conv(12, 12)

    with pytest.raises(ValueError, match="at='place.act': all objects of class Conv share place.act.*; try 'place'$"):
        backbones.insert(Once(), GATES[0], "place.act", input_size=YOLO)

    class Default(Host):
        def __init__(self, act=nn.SiLU()):
            super().__init__()
            self.act = act

        def forward(self, x):
            return super().forward(self.act(x))

    with pytest.raises(ValueError, match="at='act': all objects of class Default share act"):
        backbones.insert(Default(), GATES[0], "act", input_size=YOLO)


def test_what_is_called_several_times_is_refused():
    class Twice(Host):
        def forward(self, x):
            return self.place(self.place(self.conv(x))).mean((1, 2, 3))

    with pytest.raises(ValueError, match="at='place': is called 2 times for one image"):
        backbones.insert(Twice(), GATES[0], "place", input_size=YOLO)
    lent = Host()
    lent.same = lent.place
    for at, other in (("place", "same"), ("same", "place")):
        with pytest.raises(ValueError, match=f"at='{at}': is also {other}"):
            backbones.insert(lent, GATES[0], at, input_size=YOLO)


@pytest.mark.parametrize("part", ["conv", "bn"])
@pytest.mark.parametrize("holder", ["model.1", "model.2.cv2", "model.5"])
def test_what_a_network_fuses_away_is_refused(yolo, holder, part):
    with pytest.raises(ValueError, match=f"at='{holder}.{part}': goes, or gives something else.*; try '{holder}'$"):
        backbones.insert(yolo, GATES[0], f"{holder}.{part}", input_size=YOLO)


@pytest.mark.parametrize("part", ["conv", "bn"])
def test_they_are_refused_too_where_the_network_is_not_at_hand(part):
    model = nn.Sequential(Conv(3, 8), Conv(8, 12))
    with pytest.raises(ValueError, match=f"at='1.{part}': goes, or gives something else.*; try '1'$"):
        backbones.insert(model, GATES[0], f"1.{part}", input_size=YOLO)


@pytest.mark.parametrize("block", BLOCKS)
def test_rows_of_a_network_keep_their_layers_when_it_is_fused(yolo, block):
    x = torch.randn(2, *YOLO).double()
    wanted = yolo(x)
    backbones.insert(yolo, block, ["model.0", "model.2", "model.2.cv1", "model.[345]"], input_size=YOLO)
    assert len(layers(yolo)) == 6 and same(yolo(x), wanted)
    for layer in layers(yolo).values():
        nn.init.constant_(layer.gain, 0.5)
    wanted, names = yolo(x), list(layers(yolo))
    assert list(layers(yolo.fuse())) == names
    for a, b in zip(yolo(x), wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


class FusesACopy(Yolo):
    """What ``fuse`` gives is another network."""

    def fuse(self):
        return Yolo.fuse(copy.deepcopy(self))


class FusesAnew(Yolo):
    """``fuse`` leaves the network as it is, and gives one whose third row is new."""

    def fuse(self):
        fused = copy.deepcopy(self)
        row = Bottleneck(12).double().eval()
        row.i, row.f = 2, -1
        row.load_state_dict(self.model[2].state_dict(), strict=False)
        fused.model[2] = row
        return fused


@pytest.mark.parametrize("part", ["conv", "bn"])
def test_what_a_fused_copy_lacks_is_refused(part):
    model = alive(FusesACopy()).double().eval()
    with pytest.raises(ValueError, match=f"at='model.1.{part}': goes, or gives something else.*; try 'model.1'$"):
        backbones.insert(model, GATES[0], f"model.1.{part}", input_size=YOLO)
    backbones.insert(model, GATES[0], ["model.1", "model.2"], init_gain=0.5, input_size=YOLO)
    x = torch.randn(2, *YOLO).double()
    for a, b in zip(model.fuse()(x), model(x)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_what_a_fused_network_makes_anew_is_refused():
    model = alive(FusesAnew()).double().eval()
    with pytest.raises(ValueError, match="at='model.2': goes, or gives something else"):
        backbones.insert(model, GATES[0], "model.2", input_size=YOLO)
    assert layers(backbones.insert(model, GATES[0], "model.1", input_size=YOLO))


def test_what_gives_no_numbers_is_not_compared_with_its_fused_self():
    class Positive(Yolo):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(Conv(3, 8))

        def forward(self, x):
            return self.model(x) > 0

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Positive()

        def forward(self, x):
            return self.inner(x)

        def fuse(self):
            self.inner.fuse()

    model = alive(Holds()).double().eval()
    backbones.insert(model, GATES[0], "inner.model.0", init_gain=0.5, input_size=YOLO)
    x = torch.randn(2, *YOLO).double()
    wanted = model(x)
    model.fuse()
    assert list(layers(model)) == [f"inner.model.0.attn_{GATES[0]}"]
    assert (model(x) == wanted).double().mean() > 0.999


@pytest.mark.parametrize("name, inner, holder", [
    ("mobileone_s0", "stages.0.1.conv_kxk.0.bn", "stages.0.1"),
    ("repvit_m0_9", "stages.0.blocks.0.token_mixer", "stages.0.blocks.0"),
])  # fmt: skip
def test_parts_that_timm_reparameterizes_are_refused(name, inner, holder):
    model, size = alive(timm.create_model(name, num_classes=7)).eval(), (64, 96)
    with pytest.raises(ValueError, match=f"at='{inner}': goes, or gives something else.*; try '{holder}'$"):
        backbones.insert(model, GATES[0], inner, input_size=(3, *size))
    backbones.insert(model, GATES[0], holder, init_gain=0.5, input_size=(3, *size))
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        wanted, out = model(x), reparameterize_model(model)(x)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


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
        with pytest.raises(
            ValueError, match="^model=NaFlexVit: gives tokens, but has no patch_embed that tells their grid$"
        ):
            call(model, MIXERS[0])


def test_a_host_of_maps_and_tokens_takes_layers_behind_its_maps():
    model = timm.create_model("efficientformer_l1", device="meta")
    with pytest.raises(ValueError, match="at='stages.3': gives tokens, .*; try stages.0, stages.1, stages.2$"):
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
