"""`backbones.insert`: the model stays what it was, bit for bit, and the new layer is where it was asked for."""

import copy
import pickle
import re
from functools import cache

import pytest
import timm
import torch
import torchvision
from conftest import GATES, MIXERS, alive, every_block, every_mixer, in_turn
from torch import nn

import backbones
from vision_attn import Grid, OnMap, OnTokens, list_blocks
from vision_attn.layout import Residual

# model, its arguments, the size of an image it takes, and where layers go when nothing is said
HOSTS = {
    "resnet18": (dict(channels=(16, 24, 40, 56)), (67, 43), ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
    "resnet50": (dict(channels=(8, 12, 20, 28)), (67, 43), ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
    "cifar_resnet20": ({}, (29, 37), ["layer1.2", "layer2.2", "layer3.2"]),
    "regnety_002": ({}, (67, 43), ["s1.b1", "s2.b1", "s3.b4", "s4.b7"]),
    "convnext_atto": ({}, (67, 43), [f"stages.{i}" for i in range(4)]),
    "efficientnet_b0": ({}, (67, 43), ["blocks.0.0", "blocks.1.1", "blocks.2.1", "blocks.4.2", "blocks.6.0"]),
    "mobilenetv3_small_050": ({}, (67, 43), ["blocks.0.0", "blocks.1.1", "blocks.3.1", "blocks.5.0"]),
    "vit_tiny_patch16_224": (dict(depth=2, img_size=(48, 80)), (48, 80), ["blocks.0", "blocks.1"]),
    "deit_tiny_distilled_patch16_224": (dict(depth=2, img_size=(48, 80)), (48, 80), ["blocks.0", "blocks.1"]),
    "deit3_small_patch16_224": (dict(depth=2, img_size=(48, 80), embed_dim=96), (48, 80), ["blocks.0", "blocks.1"]),
    "eva02_tiny_patch14_224": (dict(depth=2, img_size=(42, 70)), (42, 70), ["blocks.0", "blocks.1"]),
    "swin_tiny_patch4_window7_224": (
        dict(img_size=(56, 84), depths=(1, 1, 2, 1), embed_dim=48), (56, 84), [f"layers.{i}" for i in range(4)],
    ),
}  # fmt: skip

every_host = in_turn({"host": HOSTS, "block": GATES[:1] + MIXERS[-1:]})


def made(host, **more):
    return copy.deepcopy(built(host, **more)), torch.randn(2, 3, *HOSTS[host][1])


@cache
def built(host, **more):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return alive(timm.create_model(host, num_classes=7, **{**HOSTS[host][0], **more}))


def places(host, block):
    """Where layers go when nothing is said: a gate not behind the last block of a ViT that reads a class token."""
    return HOSTS[host][2][:-1] if host.startswith(("vit", "deit")) and block in GATES else HOSTS[host][2]


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Residual)}


def run(model, x):
    torch.manual_seed(1)
    return model(x)


# The model stays what it was


@in_turn({"block": list_blocks(), "host": HOSTS})
def test_same_function_bit_for_bit(host, block):
    model, x = made(host, drop_rate=0.2, drop_path_rate=0.2)
    before, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    assert backbones.insert(model, block) is model
    after = model.state_dict()
    assert [key for key in after if key in before] == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    new = tuple(f"{name}.attn_{block}." for name in places(host, block))
    assert all(key.startswith(new) for key in after.keys() - before.keys())
    assert torch.equal(run(model.eval(), x), run(twin.eval(), x))
    outs = [run(one.train(), x) for one in (model, twin)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    theirs, ours = dict(twin.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(ours[key].grad, p.grad) for key, p in theirs.items() if p.grad is not None)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in twin.state_dict().items())  # running statistics too


@in_turn({"prefix": [0, 1, 5], "block": GATES + MIXERS[:1]})
def test_same_function_with_any_number_of_prefix_tokens(block, prefix):
    tokens = dict(class_token=prefix > 0, reg_tokens=max(0, prefix - 1), global_pool="avg")
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=(48, 80), num_classes=7, **tokens)
    x, twin = torch.randn(3, 3, 48, 80), copy.deepcopy(alive(model))
    backbones.insert(model, block)
    assert torch.equal(model.eval()(x), twin.eval()(x))


@every_host
def test_inserting_leaves_frozen_parts_frozen(host, block):
    model, _ = made(host)
    model.train()
    frozen = model.get_submodule(HOSTS[host][2][0]).eval()
    modes = {m: m.training for m in model.modules()}
    backbones.insert(model, block, init_gain=0.5)
    assert all(m.training == mode for m, mode in modes.items()) and not frozen.training
    assert all(m.training for m in layers(model).values())
    assert all(m.gain.item() == 0.5 for m in layers(model).values())
    backbones.insert(model.eval(), (GATES + MIXERS)[1])
    assert not any(m.training for m in model.modules())


# The layer does its work


@every_host
def test_layer_sees_the_output_of_its_place_once(host, block):
    model, x = made(host)
    seen, counts = {}, {}
    for name in places(host, block):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: out.clone()})
        )
    backbones.insert(model, block)
    alive(model).eval()
    for name, layer in layers(model).items():
        layer.register_forward_hook(
            lambda m, args, out, name=name: counts.update(
                {name: [*counts.get(name, []), (args[0].clone(), out.clone())]}
            )
        )
    after = {}
    for name in places(host, block):
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: after.update({name: out.clone()})
        )
    with torch.no_grad():
        model(x)
    assert list(counts) == [f"{name}.attn_{block}" for name in places(host, block)]
    for name in places(host, block):
        ((came, went),) = counts[f"{name}.attn_{block}"]  # once
        if host.startswith("swin"):
            came, went = came.permute(0, 2, 3, 1), went.permute(0, 2, 3, 1)
        assert torch.equal(came, seen[name]) and torch.equal(went, after[name]) and not torch.equal(came, went)


@every_host
def test_checkpointing_does_not_pass_the_layer_by(host, block):
    """Some hosts run the parts of a stage one by one when they checkpoint, and never call the stage."""
    model, x = made(host)
    alive(backbones.insert(model, block)).eval()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    outs = [one(x) for one in (model, twin)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    assert all(layer.gain.grad is not None for layer in layers(twin).values())


@every_block
def test_one_step_trains_the_layer(block):
    model, x = made("resnet18")
    backbones.insert(model, block)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    for name, layer in layers(model).items():
        assert layer.gain != 0 and all(p.grad is not None for p in layer.parameters()), name


@in_turn({"block": list_blocks(), "host": [host for host in HOSTS if host.startswith(("vit", "eva", "swin"))]})
def test_any_size_where_the_host_takes_any_size(host, block):
    free = dict(strict_img_size=False) if host.startswith("swin") else dict(dynamic_img_size=True)
    model, x = made(host, **free)
    alive(backbones.insert(model, block)).eval()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    wanted = model(x)
    assert model(torch.randn(2, 3, 112, 224)).isfinite().all()
    assert all(torch.equal(one(x), wanted) for one in copies)


# Where


PLACES = [
    ("resnet18", "layer3", ["layer3.1"]),
    ("resnet18", "layer3.*", ["layer3.0", "layer3.1"]),
    ("resnet18", "layer[13].0", ["layer1.0", "layer3.0"]),
    ("resnet18", ["layer4.0", "layer1"], ["layer1.1", "layer4.0"]),
    ("resnet18", ("layer3", "layer3.1", "layer?"), [f"layer{i}.1" for i in (1, 2, 3, 4)]),  # each place once
    ("resnet18", "layer2.0.conv2", ["layer2.0.conv2"]),
    ("resnet18", "maxpool", ["maxpool"]),
    ("vit_tiny_patch16_224", "blocks.1", ["blocks.1"]),
    ("eva02_tiny_patch14_224", "blocks.*.attn", ["blocks.0.attn", "blocks.1.attn"]),
    ("convnext_atto", "stages.2.blocks.[0-2]", [f"stages.2.blocks.{i}" for i in range(3)]),
]


@in_turn({"block": list_blocks(), "host, at, places": [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in PLACES]})
def test_places_by_name_wildcard_and_list(block, host, at, places):
    model = backbones.insert(made(host)[0], block, at)
    assert list(layers(model)) == [f"{place}.attn_{block}" for place in places]


def test_wildcards_do_not_cross_dots():
    model, _ = made("vit_tiny_patch16_224", depth=11)
    backbones.insert(model, "cbam" if "cbam" in list_blocks() else GATES[0], "blocks.1*")
    assert [name.split(".")[1] for name in layers(model)] == ["1", "10"]


def test_a_layer_used_twice_in_one_place_is_one_hook():
    model, x = made("resnet18")
    calls = []
    backbones.insert(model, GATES[0], ["layer3", "layer3.1"])
    (layer,) = layers(model).values()
    layer.register_forward_hook(lambda *args: calls.append(1))
    model(x)
    assert len(calls) == 1


@in_turn({"block": list_blocks(), "at": ["layer5", "layer3.7", "layer3*.conv9", "", ["layer3", "stages.*"], []]})
def test_a_wrong_place_lists_the_right_ones_and_changes_nothing(block, at):
    model, _ = made("resnet18")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"at=.*layer1, layer2, layer3, layer4$"):
        backbones.insert(model, block, at)
    assert list(model.state_dict()) == keys and not layers(model)


@pytest.mark.parametrize("at", ["fc", "global_pool", "head", "layer3.0.drop_block.*"])
def test_what_is_no_map_and_no_tokens_is_refused(at):
    model, _ = made("resnet18")
    with pytest.raises(ValueError, match="at="):
        backbones.insert(model, GATES[0], at)
    assert not layers(model)


@in_turn({"block": list_blocks(), "host": ["resnet18", "vit_tiny_patch16_224", "regnety_002"]})
def test_a_place_takes_a_block_once(block, host):
    model, x = made(host)
    backbones.insert(model, block, HOSTS[host][2][-1])
    keys, wanted = list(model.state_dict()), model.eval()(x)
    with pytest.raises(ValueError, match=f"{HOSTS[host][2][-1]} already has a {block}"):
        backbones.insert(model, block, HOSTS[host][2])
    assert list(model.state_dict()) == keys and torch.equal(model(x), wanted)


THIRDS = [pytest.param(list_blocks()[start::3], id=f"from_{start}") for start in range(3)]


@in_turn({"blocks": THIRDS, "host": ["resnet18", "vit_tiny_patch16_224", "regnety_002"]})
def test_other_blocks_go_behind_the_first(blocks, host):
    model, x = made(host)
    wanted, calls = model.eval()(x), {}
    for block in blocks:
        backbones.insert(model, block, HOSTS[host][2][-1])
    for name, layer in layers(model).items():
        layer.register_forward_hook(lambda m, args, out, name=name: calls.update({name: len(calls)}))
    assert torch.equal(model(x), wanted)
    assert [name.split(".attn_")[1] for name in calls] == blocks


@every_mixer
def test_a_bad_option_leaves_the_model_as_it_was(block):
    """3 heads divide the 24 channels of the first stage, not the 56 of the second."""
    model, x = made("regnety_002")
    keys, wanted = list(model.state_dict()), model.eval()(x)
    with pytest.raises(ValueError, match="num_heads=3: must divide dim=56"):
        backbones.insert(model, block, num_heads=3)
    assert list(model.state_dict()) == keys and torch.equal(model(x), wanted)
    backbones.insert(model, block, num_heads=4)


@pytest.mark.parametrize("block", ["nonsense", "cbamm"])
def test_an_unknown_block_is_refused(block):
    with pytest.raises(ValueError, match=f"block='{block}'"):
        backbones.insert(made("resnet18")[0], block)


def test_a_place_that_runs_all_its_children_is_refused():
    model = alive(timm.create_model("densenet121", num_classes=7)).eval()
    for at in (None, "features.denseblock2"):
        with pytest.raises(ValueError, match="features.denseblock2|features.denseblock1"):
            backbones.insert(model, GATES[0], at)
    x = torch.randn(2, 3, 67, 43)
    wanted = model(x)
    assert torch.equal(backbones.insert(model, GATES[0], "features.transition2")(x), wanted)


@pytest.mark.parametrize("block", [GATES[0], MIXERS[0]])
def test_tokens_whose_grid_the_model_does_not_tell_but_shows(block):
    model = alive(timm.create_model("xcit_nano_12_p16_224", num_classes=7, depth=2)).eval()
    x, met = torch.randn(2, 3, 48, 80), []
    wanted = model(x)
    backbones.insert(model, block)
    for layer in layers(model).values():
        layer.register_forward_hook(lambda m, args, out: met.append(args[1]))
    assert torch.equal(model(x), wanted) and met == [Grid(3, 5)] * len(layers(model))


@pytest.mark.parametrize("host, at", [("cait_xxs24_224", "blocks.1"), ("vit_tiny_patch16_224", "patch_embed")])
def test_tokens_that_lack_the_prefix_are_refused(host, at):
    """Some ViTs join the class token later than others; which tokens are the image can't be told."""
    model = timm.create_model(host, num_classes=7)
    with pytest.raises(ValueError, match=rf"at='{at}': {at} gives 196 tokens, .* must give 1 \+ 14×14"):
        backbones.insert(model, GATES[0], at)
    assert not layers(model)


# Other models


@in_turn(
    {
        "block": list_blocks(),
        "host, at": [("resnet18", "layer2"), ("efficientnet_b0", "blocks.2"), ("convnext_atto", "stages_1")],
    }
)
def test_feature_backbones(block, host, at):
    """Inserted after timm wrapped the model, a layer is part of the features of its stage and of all later ones."""
    model, x = made(host, features_only=True)[0].eval(), torch.randn(2, 3, 67, 43)
    before = model(x)
    assert layers(backbones.insert(model, block, at))
    assert all(torch.equal(a, b) for a, b in zip(model(x), before))
    for layer in layers(model).values():
        nn.init.constant_(layer.gain, 0.5)
    changed = [not torch.equal(a, b) for a, b in zip(model(x), before)]
    assert changed == sorted(changed) and 2 <= sum(changed) < len(changed)


@every_block
def test_feature_backbone_of_a_vit(block):
    """Its ViT is the child ``model``."""
    features, x = (
        made("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1))[0].eval(),
        torch.randn(2, 3, 48, 80),
    )
    before = features(x)
    (layer,) = layers(backbones.insert(features.model, block, "blocks.1")).values()
    assert all(torch.equal(a, b) for a, b in zip(features(x), before))
    nn.init.constant_(layer.gain, 0.5)
    assert [torch.equal(a, b) for a, b in zip(features(x), before)] == [True, False]


@cache
def of_torchvision():
    block = torchvision.models.resnet.BasicBlock
    return alive(torchvision.models.ResNet(block, [1, 2, 1, 1], num_classes=7)).eval()


@every_block
def test_models_of_torchvision(block):
    model = copy.deepcopy(of_torchvision())
    x = torch.randn(2, 3, 67, 43)
    wanted = model(x)
    backbones.insert(model, block, ["layer1", "layer2"])
    assert list(layers(model)) == [f"layer1.0.attn_{block}", f"layer2.1.attn_{block}"]
    assert torch.equal(model(x), wanted)


@every_block
def test_channels_type_and_device_are_those_of_the_model(block):
    model = timm.create_model("resnet18", in_chans=5, num_classes=7, device="meta", dtype=torch.bfloat16)
    backbones.insert(model, block)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    assert [layer.block.dim for layer in layers(model).values()] == [64, 128, 256, 512]


@pytest.mark.parametrize("option, said", [("device", "cpu"), ("dtype", "torch.float32")])
@pytest.mark.parametrize("host, at", [("resnet18", "layer1"), ("vit_tiny_patch16_224", "blocks.0")])
def test_another_type_or_device_is_refused_in_a_line(host, at, option, said):
    model, _ = made(host)
    other = {"device": "meta", "dtype": torch.bfloat16}[option]
    with pytest.raises(ValueError, match=f"^{option}={re.escape(repr(other))}: .*is the model's, {said}"):
        backbones.insert(model, GATES[0], at, **{option: other})
    assert not layers(model)


def test_image_size_can_be_given():
    model, sizes = timm.create_model("resnet18", in_chans=1, num_classes=7), []
    model.conv1.register_forward_hook(lambda m, args, out: sizes.append(tuple(args[0].shape)))
    backbones.insert(model, GATES[0], "layer1", input_size=(1, 67, 43))
    backbones.insert(model, GATES[0], "layer2")
    assert sizes == [(1, 1, 67, 43), (1, 1, 224, 224)]


def test_layers_are_for_maps_or_for_tokens():
    for host, kind in (("swin_tiny_patch4_window7_224", OnMap), ("vit_tiny_patch16_224", OnTokens)):
        model = backbones.insert(made(host)[0], GATES[0])
        assert all(type(layer) is kind for layer in layers(model).values())
