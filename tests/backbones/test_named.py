"""Stock models with a block, by name: whatever works on timm's own models works on these."""

import pytest
import timm
import torch
from conftest import GATES, MIXERS, alive, every_block, every_gate, every_mixer, in_turn
from named import CIFAR_AND_VIT, NARROW, RESNETS, THIN, VITS, blocks_in, images, made, small_models, smallest_models
from timm.layers import Attention, DropPath, create_feature_extractor
from torch import nn

import backbones
from vision_attn import Gate, Grid, Mixer, layer, list_blocks
from vision_attn.layout import OnMap, OnTokens, Residual

# Names


@every_block
def test_every_stock_model_is_listed_with_every_block(block):
    assert {f"{stock}_{block}" for stock in RESNETS + VITS} <= set(timm.list_models(f"*_{block}"))
    assert set(timm.list_models(f"*_{block}", module="attn_resnet")) == {f"{stock}_{block}" for stock in RESNETS}
    assert set(timm.list_models(f"*_{block}", module="attn_vit")) == {f"{stock}_{block}" for stock in VITS}


@pytest.mark.parametrize("stock", RESNETS + VITS)
def test_weights_are_those_of_the_stock_model(stock):
    plain = timm.get_pretrained_cfg(stock)
    for block in list_blocks():
        cfg = timm.get_pretrained_cfg(f"{stock}_{block}")
        assert (cfg.tag, cfg.input_size, cfg.mean, cfg.std) == (plain.tag, plain.input_size, plain.mean, plain.std)
        assert (cfg.hf_hub_id, cfg.num_classes, cfg.classifier) == (
            plain.hf_hub_id,
            plain.num_classes,
            plain.classifier,
        )
        assert not cfg.custom_load


# Building


@small_models
def test_classes_channels_and_gradients(stock, args, size, block):
    model = alive(made(stock, block, args, num_classes=5, in_chans=5)).train()
    out = model(images(size, batch=3, channels=5))
    assert out.shape == (3, 5)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    gains = [m.gain for m in model.modules() if isinstance(m, Residual)]
    assert all(gain.grad.any() for gain in gains)


LARGE = [("resnet50", {}), pytest.param("resnet101", {}, marks=pytest.mark.slow)]
LARGE += [(stock, dict(depth=3)) for stock in VITS[:3]]


@in_turn({"block": list_blocks(), "stock, args": LARGE})
def test_large_models_are_made_without_memory(stock, args, block):
    model = made(stock, block, args, device="meta")
    assert model(torch.randn(2, 3, 224, 224, device="meta")).shape == (2, 7)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert blocks_in(model)


@in_turn({"block": list_blocks(), "in_chans, num_classes": [(1, 3), (5, 0)]})
def test_gray_and_other_images(block, in_chans, num_classes):
    for stock, args, size in (case.values for case in CIFAR_AND_VIT):
        model = made(stock, block, args, in_chans=in_chans, num_classes=num_classes).eval()
        assert model(images(size, channels=in_chans)).shape == (2, num_classes or model.num_features)


@smallest_models
def test_another_head(stock, args, size, block):
    model = made(stock, block, args).eval()
    model.reset_classifier(11)
    assert model(images(size)).shape == (2, 11)
    model.reset_classifier(0)
    assert model(images(size)).shape == (2, model.num_features)


@smallest_models
def test_unknown_arguments_are_refused(stock, args, size, block):
    with pytest.raises(TypeError, match="nonsense"):
        made(stock, block, args, nonsense=1)
    with pytest.raises(TypeError, match="nonsense"):
        made(stock, block, args, attn_kwargs=dict(nonsense=1))
    with pytest.raises(ValueError, match="attn_kwargs='nonsense=1': must be a dict"):
        made(stock, block, args, attn_kwargs="nonsense=1")


@smallest_models
def test_stochastic_depth(stock, args, size, block):
    model = alive(made(stock, block, args, drop_path_rate=0.5))
    assert any(isinstance(m, DropPath) and m.drop_prob == 0.5 for m in model.modules())
    x = images(size)
    assert torch.equal(model.eval()(x), model(x))
    torch.manual_seed(1)
    assert len({model.train()(x).sum().item() for _ in range(5)}) > 1


# Where the block goes


@every_block
def test_gates_sit_in_every_slot_and_mixers_behind_two_stages(block):
    places = {".".join(name.split(".")[:2]) for name in blocks_in(made("resnet18", block, device="meta"))}
    everywhere = {f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)}
    assert places == (everywhere if block in GATES else {"layer2.1", "layer3.1"})


@in_turn({"block": list_blocks(), "stock, args, last": [("resnet50", NARROW, "bn3"), ("cifar_resnet20", {}, "bn2")]})
def test_in_the_slot_a_block_follows_the_last_norm_and_precedes_the_sum(stock, args, last, block):
    model = alive(made(stock, block, args, attn_at="layer3.*")).eval()
    assert blocks_in(model) == [f"layer3.{i}.se" for i in range(len(model.layer3))]
    part, seen = model.layer3[1], {}
    for name in (last, "se"):
        part.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: (args[0].clone(), out.clone())})
        )  # copies, because the host adds in place
    x = torch.randn_like(model.layer3[0](images((9, 7), channels=model.layer2[-1].get_submodule(last).num_features)))
    out = part(x)
    assert torch.equal(seen["se"][0], seen[last][1])
    assert torch.equal(out, (seen["se"][1] + x).relu())


@every_block
def test_behind_a_stage_of_a_resnet(block):
    model = made("resnet18", block, NARROW, attn_at="layer3")
    assert blocks_in(model) == [f"layer3.1.attn_{block}"]
    model = alive(model).eval()
    x, stage = images((9, 7), channels=NARROW["channels"][1]), model.layer3
    with_block = stage(x)
    added = stage[1]._modules[f"attn_{block}"]
    with torch.no_grad():
        added.gain.zero_()
        before = stage(x)
        added.gain.fill_(0.3)
        assert not torch.equal(added(before), before)
        assert torch.equal(stage(x), added(before)) and not torch.equal(before, with_block)


@every_block
def test_several_places_in_a_resnet(block):
    model = made("resnet18", block, attn_at=["layer1", "layer[24].1", "layer*"], device="meta")
    stages = {f"layer{i}.1.attn_{block}" for i in (1, 2, 3, 4)}
    assert set(blocks_in(model)) == stages | {"layer2.1.se", "layer4.1.se"}
    assert made("resnet18", block, NARROW, attn_at=("layer4.0",))(images((67, 43))).shape == (2, 7)


@in_turn({"block": list_blocks(), "at": [None, "blocks.[6-9]*", "blocks.1*", ["blocks.0", "blocks.11"]]})
def test_places_in_a_vit(block, at):
    model = made("vit_tiny_patch4_32", block, attn_at=at, device="meta")
    wanted = {"blocks.[6-9]*": (6, 7, 8, 9), "blocks.1*": (1, 10, 11)}.get(str(at), (0, 11))
    if at is None:  # behind the last block a gate would only change what the class token no longer reaches
        wanted = range(12 if block in MIXERS else 11)
    suffix = "attn" if block in MIXERS else f"attn_{block}"
    assert blocks_in(model) == [f"blocks.{i}.{suffix}" for i in wanted]
    stock = [i for i, part in enumerate(model.blocks) if type(part.attn) is Attention]
    assert stock == [i for i in range(12) if i not in wanted or block in GATES]


@in_turn({"block": list_blocks(), "at": ["layer5", "layer3.7", "layer3.0.conv1", "", ["layer3", "stage.*"], []]})
def test_a_wrong_place_in_a_resnet_lists_the_right_ones(block, at):
    with pytest.raises(ValueError, match="^attn_at=") as refusal:
        made("resnet18", block, attn_at=at, device="meta")
    assert "layer3" in str(refusal.value) and "layer4.1" in str(refusal.value)


@in_turn({"block": list_blocks(), "at": ["layer3", "blocks.7", "", ["blocks.1", "block.0"], []]})
def test_a_wrong_place_in_a_vit_lists_the_right_ones(block, at):
    with pytest.raises(ValueError, match="^attn_at=") as refusal:
        made("vit_tiny_patch4_32", block, depth=2, attn_at=at)
    assert "blocks.0" in str(refusal.value) and "blocks.1" in str(refusal.value)


@every_mixer
def test_options_reach_a_mixer(block):
    for stock, args in (("cifar_resnet20", {}), ("vit_tiny_patch4_32", THIN)):
        model = made(stock, block, args, attn_kwargs=dict(num_heads=4, proj_drop=0.25), device="meta")
        heads = [step for m in outermost(model) if isinstance(m, Mixer) for step in m.steps or (m,)]
        assert heads and all(one.num_heads == 4 and one.proj_drop.p == 0.25 for one in heads)


@every_block
def test_options_reach_a_layer(block):
    for stock, args in (("cifar_resnet20", {}), ("vit_tiny_patch4_32", THIN)):
        if stock.startswith("vit") and block in MIXERS:
            continue  # there a mixer is no layer: it stands for the attention
        model = made(stock, block, args, attn_kwargs=dict(init_gain=0.25))
        assert all(m.gain.item() == 0.25 for m in model.modules() if isinstance(m, Residual))


@in_turn({"block": MIXERS, "stock, args": [("resnet18", {}), ("vit_tiny_patch4_32", THIN)]})
def test_bad_options_are_named(block, stock, args):
    with pytest.raises(ValueError, match="num_heads=5"):
        made(stock, block, args, device="meta", attn_kwargs=dict(num_heads=5))


@every_mixer
def test_a_mixer_keeps_the_heads_and_dropouts_of_the_vit(block):
    model = made("vit_tiny_patch4_32", block, depth=1, num_heads=6, proj_drop_rate=0.25, qkv_bias=False)
    for step in model.blocks[0].attn.steps:
        assert step.num_heads == 6 and step.proj_drop.p == 0.25 and step.qkv.bias is None


# Sizes of images


def outermost(model):
    """The blocks of a model, without the steps that they are made of."""
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, Mixer | Gate)}
    return [m for name, m in blocks.items() if not any(name.startswith(f"{other}.") for other in blocks)]


def grids_seen(model):
    """Fills with the grid of every call of a block."""
    seen = []
    for m in outermost(model):
        if isinstance(m, Mixer):
            m.register_forward_hook(lambda m, args, out: seen.append(args[1]))
        else:
            m.register_forward_hook(lambda m, args, out: seen.append(Grid(*args[0].shape[2:])))
    return seen


@every_block
def test_one_vit_takes_any_image(block):
    model = alive(made("vit_tiny_patch4_32", block, THIN, dynamic_img_size=True)).eval()
    seen = grids_seen(model)
    for height, width in [(28, 44), (44, 28), (20, 52), (4, 4)]:
        seen.clear()
        assert model(images((height, width))).isfinite().all()
        assert seen and set(seen) == {Grid(height // 4, width // 4)}


@every_block
def test_a_size_that_varies_gives_what_a_fixed_size_gives(block):
    args = dict(THIN, pos_embed="none", reg_tokens=3)
    anything = alive(made("vit_tiny_patch4_32", block, args, dynamic_img_size=True)).eval()
    fixed = made("vit_tiny_patch4_32", block, args, img_size=(20, 52)).eval()
    fixed.load_state_dict(anything.state_dict())
    anything(images((28, 44)))
    x = images((20, 52))
    assert torch.equal(anything(x), fixed(x))
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(images((52, 20)))


@in_turn({"block": list_blocks(), "prefix": [0, 1, 4]})
def test_prefix_tokens_are_counted(block, prefix):
    tokens = dict(class_token=prefix > 0, reg_tokens=max(0, prefix - 1), global_pool="avg")
    model = alive(made("vit_tiny_patch4_32", block, depth=1, img_size=(20, 28), **tokens)).eval()
    seen = grids_seen(model)
    assert model.num_prefix_tokens == prefix and model(images((20, 28))).isfinite().all()
    assert set(seen) == {Grid(5, 7)}


@every_block
def test_padded_patches_are_counted(block):
    model = made("vit_tiny_patch4_32", block, depth=1, dynamic_img_size=True, dynamic_img_pad=True).eval()
    seen = grids_seen(model)
    assert model(images((21, 31))).shape == (2, 7) and set(seen) == {Grid(6, 8)}


# Features


@small_models
def test_intermediates_lead_to_the_output(stock, args, size, block):
    model, x = alive(made(stock, block, args)).eval(), images(size)
    last, taps = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x)) and len(taps) == len(model.feature_info)
    assert torch.equal(model.forward_head(last), model(x))


@pytest.mark.parametrize("stock", [*RESNETS, *VITS])
def test_features_are_listed_as_those_of_the_stock_model(stock):
    plain = timm.create_model(stock, features_only=True, device="meta").feature_info
    for block in (MIXERS[0], GATES[0]):
        ours = made(stock, block, features_only=True, device="meta").feature_info
        assert ours.channels() == plain.channels() and ours.reduction() == plain.reduction()


@small_models
def test_features_are_those_of_the_model(stock, args, size, block):
    indices = (0, 1) if stock.startswith("vit") else (1, 3)
    model = alive(made(stock, block, args)).eval()
    features = made(stock, block, args, features_only=True, out_indices=indices).eval()
    inner = getattr(features, "model", features)
    inner.load_state_dict({key: value for key, value in model.state_dict().items() if key in inner.state_dict()})
    x = images(size)
    maps = features(x)
    _, expected = model.forward_intermediates(x, indices=list(indices))
    assert [m.shape[1] for m in maps] == features.feature_info.channels() and len(maps) == 2
    assert all(torch.equal(a, b) for a, b in zip(maps, expected))
    for one in inner.modules():
        if isinstance(one, Residual):
            nn.init.zeros_(one.gain)
    if stock.startswith("vit") and block in MIXERS:
        return
    assert not torch.equal(features(x)[1], maps[1])  # the layers are part of the features


@every_block
def test_torch_fx_follows_a_resnet(block):
    model, x = alive(made("cifar_resnet20", block, attn_at=["layer1.*", "layer3"])).eval(), images((17, 23))
    traced = create_feature_extractor(model, ["layer3", "fc"])
    outs = traced(x)
    assert torch.equal(outs["fc"], model(x)) and outs["layer3"].shape == (2, 64, 5, 6)
    outs["fc"].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# timm's own slot


@every_gate
def test_layer_in_a_slot_of_timm(block):
    model = timm.create_model("resnet50", num_classes=7, block_args=dict(attn_layer=layer(block)), **NARROW).eval()
    named = made("resnet50", block, NARROW, attn_at="layer*.*").eval()
    assert blocks_in(model) == blocks_in(named) and len(blocks_in(model)) == 16
    alive(named).load_state_dict(alive(model).state_dict())
    x = images((67, 43))
    assert torch.equal(model(x), named(x))
    assert all(type(model.get_submodule(name)) is OnMap for name in blocks_in(model))


@every_block
def test_blocks_of_a_vit_are_what_they_should_be(block):
    model = made("vit_tiny_patch4_32", block, depth=2, device="meta")
    for name in blocks_in(model):
        kind = OnTokens if block in GATES else Mixer
        assert isinstance(model.get_submodule(name), kind)


def test_a_vit_of_small_patches_has_a_position_for_each():
    assert backbones.attn_vit.vit_tiny_patch4_32(device="meta").pos_embed.shape == (1, 65, 192)
