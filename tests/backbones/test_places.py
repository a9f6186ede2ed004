"""Where `backbones.insert` puts no layer: in what runs its children itself, has several places or is fused away."""

import copy

import pytest
import timm
import torch
from conftest import GATES, alive
from host_models import BLOCKS, Host, layers
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import backbones

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
