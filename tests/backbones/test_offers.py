"""`backbones.insert` without ``at``: it goes behind the stages of a timm model in the host, or says where it could."""

import copy
import re

import pytest
import timm
import torch
import torchvision
from conftest import GATES, MIXERS, alive
from host_models import Host, JoinedViT, layers
from test_places import Yolo
from torch import nn

import backbones

SIZE = (3, 52, 76)


class Decodes(nn.Module):
    """A segmentation model whose encoder is timm's, as in segmentation_models_pytorch."""

    def __init__(self, name, **args):
        super().__init__()
        self.encoder = timm.create_model(name, features_only=True, **args)
        self.heads = nn.ModuleList(nn.Conv2d(n, 5, 1) for n in self.encoder.feature_info.channels())

    def forward(self, x):
        return sum(head(one).mean((2, 3)) for head, one in zip(self.heads, self.encoder(x)))


class Pooled(nn.Module):
    """Gives a list, as detectors do."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Sequential(nn.Conv2d(3, 12, 4, 4), nn.BatchNorm2d(12), nn.ReLU())

    def forward(self, x):
        return [self.rows(x).mean((2, 3))]


def stage_names(prefix, count=4):
    return [f"{prefix}{i}" for i in range(count)]


# A host, a size, and behind what layers go when nothing is said
HOSTS = {
    "features": (lambda: timm.create_model("convnext_atto", features_only=True), stage_names("stages_")),
    "encoder": (lambda: Decodes("convnext_atto"), stage_names("encoder.stages_")),
    "normalised first": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), timm.create_model("convnext_atto", num_classes=7)),
        stage_names("1.stages."),
    ),
    "data parallel": (
        lambda: nn.DataParallel(timm.create_model("convnext_atto", num_classes=7)), stage_names("module.stages.")
    ),
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
def test_stages_of_a_timm_model_within(host):
    make, names = HOSTS[host]
    model, x = alive(make()).eval(), torch.randn(2, *SIZE)
    wanted = model(x)
    backbones.insert(model, GATES[0], input_size=SIZE)
    assert list(layers(model)) == [f"{name}.attn_{GATES[0]}" for name in names]
    for got, one in zip(*(out if isinstance(out, list) else [out] for out in (model(x), wanted))):
        assert torch.equal(got, one)


@pytest.mark.parametrize("block", [GATES[0], MIXERS[0]])
def test_features_of_a_vit(block):
    args = dict(depth=3, img_size=(48, 80), embed_dim=48, features_only=True)
    model, x = alive(timm.create_model("vit_tiny_patch16_224", **args)).eval(), torch.randn(2, 3, 48, 80)
    wanted = model(x)
    backbones.insert(model, block)
    assert list(layers(model)) == [f"model.blocks.{i}.attn_{block}" for i in range(3)]
    assert all(map(torch.equal, model(x), wanted))


def test_a_gate_behind_the_last_block_of_a_wrapped_vit_would_change_what_nobody_reads():
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=(48, 80), embed_dim=48)
    model = nn.Sequential(nn.BatchNorm2d(3), vit)
    backbones.insert(model, GATES[0])
    assert list(layers(model)) == [f"1.blocks.{i}.attn_{GATES[0]}" for i in range(2)]


# Hosts that list no stages: what could match is told, and does


OFFERED = {
    "resnet": (lambda: torchvision.models.resnet18(num_classes=7), ["layer*", "layer*.*", "layer*.*.downsample"]),
    "wrapped": (
        lambda: nn.DataParallel(torchvision.models.resnet18(num_classes=7)),
        ["module.layer*", "module.layer*.*", "module.layer*.*.downsample"],
    ),
    "chain": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2)), ["0", "1"]),
    "all of a chain": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), ["*"]),
    "yolo": (Yolo, ["model", "model.*", "model.*.cv*"]),
    "list": (Pooled, ["rows"]),
    "vit": (
        lambda: torchvision.models.VisionTransformer(28, 4, 2, 3, 48, 96),
        ["encoder", "encoder.layers", "encoder.layers.encoder_layer_*",
         "encoder.layers.encoder_layer_*.self_attention", "encoder.layers.encoder_layer_*.mlp"],
    ),
    "Hugging Face": (
        JoinedViT,
        ["embeddings", "encoder.layer.*", "encoder.layer.*.attention", "encoder.layer.*.intermediate",
         "encoder.layer.*.output", "encoder.layer.*.attention.attention", "encoder.layer.*.attention.output"],
    ),
}  # fmt: skip


def size_of(host):
    return (3, 28, 28) if host in ("vit", "Hugging Face") else SIZE


@pytest.mark.parametrize("host", OFFERED)
@pytest.mark.parametrize("at", [None, "nowhere.*"])
def test_what_gives_maps_or_tokens_is_offered(host, at):
    make, wanted = OFFERED[host]
    model = make()
    said = f"{type(model).__name__} lists no stages" if at is None else f"matches no module of {type(model).__name__}"
    with pytest.raises(ValueError, match=re.escape(f"at={at!r}: {said}; what could match: ")) as raised:
        backbones.insert(model, GATES[0], at, input_size=size_of(host))
    assert str(raised.value).partition("what could match: ")[2].split(", ") == wanted
    assert not layers(model)


@pytest.mark.parametrize(
    "host, at",
    [(host, at) for host, (_, offered) in OFFERED.items() for at in offered[: 1 if host == "wrapped" else None]],
)
def test_what_is_offered_works(host, at):
    model, x = alive(OFFERED[host][0]()).eval(), torch.randn(2, *size_of(host))
    wanted = copy.deepcopy(model)(x)
    backbones.insert(model, GATES[0], at, input_size=size_of(host))
    assert layers(model)
    flat = [list(out.values()) if isinstance(out, dict) else [*out] for out in (model(x), wanted)]
    assert all(map(torch.equal, *flat))


def test_a_host_of_neither_maps_nor_tokens_says_so():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 44, 7))
    with pytest.raises(ValueError, match="what could match: nothing: it gives no maps and no tokens"):
        backbones.insert(model, GATES[0], input_size=(3, 28, 44))


# Wildcards


class Heads(Yolo):
    """With a head that gives a list, and a row that is left out."""

    def __init__(self):
        super().__init__()
        head, idle = Pooled(), nn.Conv2d(16, 16, 1)
        head.rows = nn.Conv2d(16, 5, 1)
        for i, row in enumerate((head, idle), start=len(self.model)):
            row.i, row.f = i, -1
            self.model.append(row)

    def forward(self, x):
        given = []
        for row in self.model[:-1]:
            x = row(x if row.f == -1 else [x if f == -1 else given[f] for f in row.f])
            given.append(x)
        return x


def test_wildcards_pass_over_what_gives_no_map():
    model, x = alive(Heads()).eval(), torch.randn(2, *SIZE)
    wanted = model(x)
    backbones.insert(model, GATES[0], "model.*", input_size=SIZE)
    assert list(layers(model)) == [f"model.{i}.attn_{GATES[0]}" for i in range(6)]
    assert all(map(torch.equal, model(x), wanted))


@pytest.mark.parametrize("at, place, why", [
    ("model.6", "model.6", "gives neither a feature map"),
    ("model.7", "model.7", "is not called when the model runs"),
    (["model.[0-5]", "model.6"], "model.6", "gives neither a feature map"),
    ("model.[67]", "model.6", "gives neither a feature map"),
    ("model.*.act", "model.0.act", "is also model.1.act"),
])  # fmt: skip
def test_a_name_in_full_and_a_wildcard_of_nothing_are_refused(at, place, why):
    model = Heads()
    with pytest.raises(ValueError, match=f"at='{place}': {why}"):
        backbones.insert(model, GATES[0], at, input_size=SIZE)
    assert not layers(model)


# Models that would not notice


def wrapped():
    yield "compiled", torch.compile(Host()), r"model is compiled.*\(model\._orig_mod\), and compile that after it"
    whole, part = Host(), Host()
    whole.compile()
    yield "compiled in place", whole, "model=Host: model is compiled"
    part.place = torch.compile(part.place)
    yield "compiled in part", part, r"model\.place is compiled.*model\.place\._orig_mod"


@pytest.mark.parametrize("kind, model, why", [pytest.param(*row, id=row[0]) for row in wrapped()])
@pytest.mark.parametrize("call", [backbones.insert, backbones.replace])
def test_compiled_models_are_refused(call, kind, model, why):
    with pytest.raises(ValueError, match=why):
        call(model, GATES[0], "place", input_size=SIZE)
    assert not layers(model)


def test_models_of_several_processes_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Host())
        with pytest.raises(ValueError, match="model would not average .*; change model.module, and wrap that after it"):
            backbones.insert(model, GATES[0], "module.place", input_size=SIZE)
    finally:
        torch.distributed.destroy_process_group()
