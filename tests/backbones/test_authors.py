"""Published modules, written from their definitions with the authors' names and random weights: the blocks take those
weights by `load_authors` and give the same answers."""

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import alive
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import backbones
from backbones.authors import PUBLISHED
from vision_attn import Grid, create_block, create_layer

GRID = Grid(7, 11)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def named(**modules) -> nn.Module:
    """A module with these children and tensors."""
    module = nn.Module()
    for name, child in modules.items():
        setattr(module, name, child)
    return module


def published(module: nn.Module) -> nn.Module:
    return alive(module).double().eval()


def image(channels: int) -> torch.Tensor:
    return torch.randn(2, channels, *GRID, dtype=torch.float64)


class Cbam(nn.Module):
    def __init__(self, channels):
        super().__init__()
        layers = nn.Flatten(), nn.Linear(channels, channels // 16), nn.ReLU(), nn.Linear(channels // 16, channels)
        self.ChannelGate = named(mlp=nn.Sequential(*layers))
        conv, bn = nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1, momentum=0.01)
        self.SpatialGate = named(spatial=named(conv=conv, bn=bn))

    def forward(self, x):
        mlp, spatial = self.ChannelGate.mlp, self.SpatialGate.spatial
        x = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.amax((2, 3))))[..., None, None]
        two = torch.stack([x.max(dim=1).values, x.mean(dim=1)], dim=1)
        return x * torch.sigmoid(spatial.bn(spatial.conv(two)))


class WithCbam(BasicBlock):
    def __init__(self, inplanes, planes, *args, **options):
        super().__init__(inplanes, planes, *args, **options)
        self.cbam = Cbam(planes)

    def forward(self, x):
        out = self.cbam(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ContextBlock(nn.Module):
    def __init__(self, channels, fusions=("add",), pooling="att"):
        super().__init__()
        hidden, self.fusions = channels // 16, fusions
        self.conv_mask = nn.Conv2d(channels, 1, 1) if pooling == "att" else None
        for fusion in fusions:
            norm = nn.LayerNorm([hidden, 1, 1])
            layers = nn.Conv2d(channels, hidden, 1), norm, nn.ReLU(), nn.Conv2d(hidden, channels, 1)
            setattr(self, f"channel_{fusion}_conv", nn.Sequential(*layers))

    def forward(self, x):
        context = x.mean((2, 3), keepdim=True)
        if self.conv_mask is not None:
            share = self.conv_mask(x).flatten(2).softmax(dim=-1).view(len(x), 1, *x.shape[2:])
            context = (x * share).sum((2, 3), keepdim=True)
        out = x
        if "mul" in self.fusions:
            out = out * torch.sigmoid(self.channel_mul_conv(context))
        return out + self.channel_add_conv(context) if "add" in self.fusions else out


class WithContext(Bottleneck):
    def __init__(self, inplanes, planes, *args, **options):
        super().__init__(inplanes, planes, *args, **options)
        self.context_block = ContextBlock(4 * planes) if planes > 64 else nn.Identity()

    def forward(self, x):
        out = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        out = self.context_block(self.bn3(self.conv3(out)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class CrissCross(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query_conv, self.key_conv = nn.Conv2d(channels, channels // 8, 1), nn.Conv2d(channels, channels // 8, 1)
        self.value_conv, self.gamma = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        y, z = torch.arange(x[0, 0].numel()) // x.shape[3], torch.arange(x[0, 0].numel()) % x.shape[3]
        on_cross = (y[:, None] == y) | (z[:, None] == z)
        energy = torch.einsum("bci,bcj->bij", q, k).masked_fill(~on_cross, -torch.inf)
        return self.gamma * torch.einsum("bij,bcj->bci", energy.softmax(-1), v).view(x.shape) + x


class Emau(nn.Module):
    def __init__(self, channels, bases):
        super().__init__()
        self.register_buffer("mu", F.normalize(torch.randn(1, channels, bases), dim=1))
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, image):
        x = self.conv1(image).flatten(2)
        mu = self.mu.expand(len(x), -1, -1)
        for _ in range(3):
            z = torch.einsum("bcn,bck->bnk", x, mu).softmax(dim=2)
            mu = torch.einsum("bcn,bnk->bck", x, z / (1e-6 + z.sum(dim=1, keepdim=True)))
            mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
        redrawn = torch.einsum("bck,bnk->bcn", mu, z).view(image.shape)
        return F.relu(self.conv2(F.relu(redrawn)) + image)


class EfficientAttention(nn.Module):
    def __init__(self, channels, key, heads, value):
        super().__init__()
        self.heads, self.reprojection = heads, nn.Conv2d(value, channels, 1)
        for name, width in (("keys", key), ("queries", key), ("values", value)):
            setattr(self, name, nn.Conv2d(channels, width, 1))

    def forward(self, x):
        outs = []
        for parts in zip(*(f(x).flatten(2).chunk(self.heads, 1) for f in (self.queries, self.keys, self.values))):
            q, k, v = parts
            outs.append((v @ k.softmax(dim=2).transpose(1, 2)) @ q.softmax(dim=1))
        return self.reprojection(torch.cat(outs, dim=1).view(len(x), -1, *x.shape[2:])) + x


class LongformerAttention(nn.Module):
    """Of a line of text, the first ``globals`` tokens of which are global; before the sum with the input."""

    def __init__(self, dim, heads, window):
        super().__init__()
        self.heads, self.window = heads, window
        linears = {f"{name}{of}": nn.Linear(dim, dim) for of in ("", "_global") for name in ("query", "key", "value")}
        self.self, self.output = named(**linears), named(dense=nn.Linear(dim, dim), LayerNorm=nn.LayerNorm(dim))

    def forward(self, x, count):
        place = torch.arange(x.shape[1])
        near = (place[:, None] - place).abs() <= self.window
        out = self.attend(x, "", near | (place < count))
        of_global = self.attend(x, "_global", torch.ones_like(near))
        return self.output.dense(torch.where(place[:, None] < count, of_global, out))

    def attend(self, x, which, seen):
        names = (f"{name}{which}" for name in ("query", "key", "value"))
        q, k, v = (getattr(self.self, name)(x).unflatten(-1, (self.heads, -1)) for name in names)
        scores = torch.einsum("bihd,bjhd->bhij", q / q.shape[-1] ** 0.5, k).masked_fill(~seen, -torch.inf)
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)


class TalkingHeads(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.proj_l, self.proj_w = nn.Linear(heads, heads), nn.Linear(heads, heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("bihd,bjhd->bijh", q / q.shape[-1] ** 0.5, k)
        weights = self.proj_w(self.proj_l(scores).softmax(dim=2))
        return self.proj(torch.einsum("bijh,bjhd->bihd", weights, v).flatten(2))


# Modules alone


def test_cbam():
    theirs, ours = published(Cbam(67)), create_block("cbam", 67).double().eval()
    report = backbones.load_authors(ours, theirs.state_dict(), "cbam")
    x = image(67)
    same(ours(x), theirs(x))
    assert len(report.copied) == len(ours.state_dict()) and not report.new and not report.unused


@pytest.mark.parametrize("recurrence, out_proj", [(1, True), (2, True), (2, False)])
def test_ccnet(recurrence, out_proj):
    theirs = published(CrissCross(40))
    options = dict(num_heads=1, key_dim=5, scale=1.0, recurrence=recurrence, out_proj=out_proj)
    ours = create_layer("criss_cross", 40, **options).double().eval()
    report = backbones.load_authors(ours, theirs.state_dict(), "ccnet")
    x = image(40)
    expected = theirs(theirs(x)) if recurrence == 2 else theirs(x)
    same(ours(x), expected)
    assert theirs.gamma != 0 and report.copied == ("gain", "block.qkv.weight", "block.qkv.bias")
    assert report.new == (("block.proj.weight", "block.proj.bias") if out_proj else ()) and not report.unused


@pytest.mark.parametrize(
    "fusions, ours",
    [(("add",), {}), (("mul",), {"fusion": "multiply"}), (("add", "mul"), {"fusion": "both"})],
)
@pytest.mark.parametrize("pooling, name", [("att", "attention"), ("avg", "average")])
def test_gcnet(fusions, ours, pooling, name):
    theirs = published(ContextBlock(80, fusions, pooling))
    layer = create_layer("global_context", 80, pooling=name, **ours).double().eval()
    report = backbones.load_authors(layer, theirs.state_dict(), "gcnet")
    x = image(80)
    same(layer(x), theirs(x))
    assert report.new == ("gain",) and not report.unused


def test_emanet():
    theirs, ours = published(Emau(37, 5)), create_block("expectation_maximization", 37, bases=5).double().eval()
    report = backbones.load_authors(ours, theirs.state_dict(), "emanet")
    x = image(37)
    same(ours(x).relu(), theirs(x))
    assert not report.new and not report.unused


@pytest.mark.parametrize("key, heads, value", [(21, 3, 39), (33, 3, 33), (26, 1, 17)])
def test_efficient_attention(key, heads, value):
    theirs = published(EfficientAttention(33, key, heads, value))
    ours = create_layer("efficient", 33, num_heads=heads, key_dim=key, value_dim=value).double().eval()
    report = backbones.load_authors(ours, theirs.state_dict(), "efficient_attention")
    x = image(33)
    same(ours(x), theirs(x))
    assert report.new == ("gain",) and not report.unused


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("as_prefix", [False, True])
def test_longformer(count, as_prefix):
    """The global tokens of a text are the prefix of a row of pixels, or its first pixels."""
    theirs = published(LongformerAttention(39, 3, window=2))
    options = dict(num_heads=3, kernel_size=(1, 5), dilation=(1,), tokens=0 if as_prefix else count)
    ours = create_block("longformer", 39, **options).double().eval()
    report = backbones.load_authors(ours, theirs.state_dict(), "longformer")
    x = torch.randn(2, 23, 39, dtype=torch.float64)
    same(ours(x, Grid(1, 23 - count * as_prefix)), theirs(x, count))
    assert report.unused == ("output.LayerNorm.weight", "output.LayerNorm.bias") and not report.new


def test_cait():
    theirs = published(TalkingHeads(39, 3))
    ours = create_block("talking_heads", 39, num_heads=3, mixing_bias=True).double().eval()
    report = backbones.load_authors(ours, theirs.state_dict(), "cait")
    x = torch.randn(2, GRID.size, 39, dtype=torch.float64)
    same(ours(x, GRID), theirs(x))
    assert report.unused == ("proj_l.bias",) and not report.new


def test_timms_cait_gives_its_talking_heads_away():
    cait = alive(timm.create_model("cait_xxs24_224", depth=1, depth_token_only=1, img_size=112)).double().eval()
    ours = create_block("talking_heads", 192, num_heads=4, mixing_bias=True).double().eval()
    backbones.load_authors(ours, cait.state_dict(), "cait", prefix="blocks.0.attn.")
    x = torch.randn(1, 49, 192, dtype=torch.float64)
    same(ours(x, Grid(7, 7)), cait.blocks[0].attn(x))


def test_every_source_is_tested():
    assert all(f"test_{source}" in globals() for source in PUBLISHED)


# Whole networks


def test_the_whole_cbam_resnet():
    theirs = published(ResNet(WithCbam, [2, 2, 2, 2], num_classes=5))
    state = {f"module.{key}": value for key, value in reversed(theirs.state_dict().items())}  # in any order
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}  # as old as the published one
    ours = timm.create_model("resnet18_cbam", num_classes=5).double().eval()
    report = backbones.load_authors(ours, {"epoch": 89, "state_dict": state}, "cbam")
    x = torch.randn(2, 3, 53, 71, dtype=torch.float64)
    same(ours(x), theirs(x))
    assert not report.unused and {key.rpartition(".")[2] for key in report.new} == {"gain", "num_batches_tracked"}


def test_the_backbone_of_a_gcnet_detector():
    depths = [1, 2, 1, 1]
    theirs = published(ResNet(WithContext, depths))
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    state["neck.lateral_convs.0.conv.weight"] = torch.randn(3)
    ours = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, depths, num_classes=0)
    backbones.attn_resnet.add_attention(ours, "global_context", ["layer2.*", "layer3.*", "layer4.*"]).double().eval()
    report = backbones.load_authors(ours, {"state_dict": state}, "gcnet", prefix="backbone.")
    x = torch.randn(1, 3, 37, 53, dtype=torch.float64)
    trunk = nn.Sequential(*list(theirs.children())[:-2])
    same(ours.forward_features(x), trunk(x))
    assert report.unused == ("neck.lateral_convs.0.conv.weight",) and all(key.endswith("gain") for key in report.new)


def test_an_inserted_layer_takes_the_module_of_its_stage():
    theirs = [published(CrissCross(channels)) for channels in (64, 128)]
    ours = backbones.insert(
        timm.create_model("resnet18", num_classes=0),
        "criss_cross",
        ["layer1.1", "layer2.1"],
        num_heads=1,
        key_dim=16,
        scale=1.0,
    )
    plain = timm.create_model("resnet18", num_classes=0).state_dict()
    state = plain | {f"layer2.1.cca.{key}": value for key, value in theirs[1].state_dict().items()}
    with pytest.raises(ValueError, match="1 modules of ccnet, layer2.1.cca., .* 2 blocks, layer1.1.attn_criss_cross"):
        backbones.load_authors(ours, state, "ccnet")
    del ours.layer1[1].attn_criss_cross
    ours.layer1[1]._forward_hooks.clear()
    backbones.load_authors(ours, state, "ccnet")
    x = image(128)
    same(ours.double().eval().layer2[1].attn_criss_cross(x), theirs[1](theirs[1](x)))
    same(ours.layer1.float().state_dict(), {k.removeprefix("layer1."): v for k, v in plain.items() if "layer1" in k})


def test_a_prefix_chooses_one_of_several():
    layers = [published(LongformerAttention(39, 3, window=2)) for _ in range(2)]
    names = [f"encoder.layer.{i}.attention." for i in range(2)]
    state = {name + key: v for name, layer in zip(names, layers) for key, v in layer.state_dict().items()}
    ours = create_block("longformer", 39, num_heads=3, kernel_size=(1, 5), dilation=(1,), tokens=1).double()
    with pytest.raises(ValueError, match=r"2 modules of longformer, encoder.layer.0.attention., .*prefix chooses"):
        backbones.load_authors(ours, state, "longformer")
    report = backbones.load_authors(ours, state, "longformer", prefix=names[1])
    x = torch.randn(2, 23, 39, dtype=torch.float64)
    same(ours(x, Grid(1, 23)), layers[1](x, 1))
    assert set(report.unused) == {key for key in state if names[0] in key or "LayerNorm" in key}


def test_other_parts_of_a_file_do_not_matter_to_a_layer_alone():
    state = {f"emau.{key}": value for key, value in Emau(37, 5).state_dict().items()} | {"fc2.weight": torch.zeros(3)}
    ours = create_block("expectation_maximization", 37, bases=5)
    assert backbones.load_authors(ours, state, "emanet").unused == ("fc2.weight",)


# What does not fit is said by key, and nothing is loaded


def criss_cross(**options):
    return create_layer("criss_cross", 40, **{"num_heads": 1, "key_dim": 5, "scale": 1.0, **options})


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    "model, change, said",
    [
        (lambda: criss_cross(), lambda s: without(s, "gamma"), r"no value for gain \(there gamma\)"),
        (lambda: criss_cross(), lambda s: s | {"scale": s["gamma"]}, "no place for scale"),
        (lambda: criss_cross().block, lambda s: s, "no place for gamma"),
        (lambda: criss_cross(key_dim=4), lambda s: s, r"another shape for block.qkv.weight of \(48, 40\)"),
        (lambda: criss_cross(qk_norm=True), lambda s: s, r"no value for block.q_norm.weight \(there nothing\)"),
        (lambda: criss_cross(scale=None), lambda s: s, r"scale=0.4\d+: must be 1.0"),
        (lambda: criss_cross(num_heads=5, key_dim=5), lambda s: s, "num_heads=5: must be 1"),
        (lambda: create_layer("dense", 40), lambda s: s, "model=OnMap: has no criss_cross"),
        (lambda: criss_cross(), lambda s: without(s, "query_conv.weight"), "has 0 modules of ccnet"),
        (
            lambda: nn.Sequential(criss_cross(), criss_cross()),
            lambda s: s,
            "1 modules .* its 2 blocks, 0.block, 1.block",
        ),
    ],
)
def test_what_does_not_fit_is_named(model, change, said):
    ours = model()
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        backbones.load_authors(ours, change(CrissCross(40).state_dict()), "ccnet")
    torch.testing.assert_close(dict(ours.state_dict()), before, rtol=0, atol=0)


def test_a_network_takes_all_of_the_file_or_nothing():
    state = ResNet(WithCbam, [2, 2, 2, 2], num_classes=5).state_dict()
    ours = timm.create_model("resnet18_cbam", num_classes=7)
    with pytest.raises(ValueError, match=r"another shape for fc.weight of \(7, 512\) \(there fc.weight\), fc.bias"):
        backbones.load_authors(ours, state, "cbam")
    ours.reset_classifier(0)
    with pytest.raises(ValueError, match="no place for fc.weight, fc.bias$"):
        backbones.load_authors(ours, state, "cbam")
    with pytest.raises(ValueError, match=r"no value for conv1.weight \(there conv1.weight\)$"):
        backbones.load_authors(ours, without(state, "fc.weight", "fc.bias", "conv1.weight"), "cbam")
    backbones.load_authors(ours, without(state, "fc.weight", "fc.bias"), "cbam")


def test_an_unknown_source_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="source='danet': must be one of 'cbam', 'ccnet'"):
        backbones.load_authors(criss_cross(), {}, "danet")


@pytest.mark.parametrize("given", [None, "weights.pth"])
def test_what_is_no_mapping_is_refused(given):
    with pytest.raises(ValueError, match=f"state_dict={given!r}: must be a mapping"):
        backbones.load_authors(criss_cross(), given, "ccnet")
