"""`backbones.replace`: a block takes the place of a model's own attention, and says what became of the weights."""

import copy
import re
from functools import cache

import pytest
import timm
import torch
from conftest import GATES, MIXERS, OPTIONS, every_block, every_mixer, in_turn
from timm.layers import Attention, PatchDropout
from timm.models.eva import EvaAttention
from torch import nn

import backbones
from vision_attn import Grid, Mixer, OnMap, create_block, list_blocks
from vision_attn.rotary import Rotary

VIT = dict(depth=2, img_size=(48, 80), num_classes=7)
EVA = dict(depth=2, img_size=(42, 70), num_classes=7)
ATTENTION = ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]


def made(name, **args) -> nn.Module:
    """In eval mode and float64, with no gain, norm, bias or statistic at a special value."""
    model = timm.create_model(name, **args).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += torch.randn_like(p).mul(0.2).add(0.1)
    return model


def shapes(block) -> dict:
    return {key: t.shape for key, t in create_block(block, 192, num_heads=3).state_dict().items()}


WHOLE = [name for name in MIXERS if shapes(name) == shapes("dense")]  # qkv and proj are the ViT's


def refuses(name, **options):
    try:
        create_block(name, 192, **options)
    except ValueError:
        return True
    return False


ATTN_DROP_REFUSED = [name for name in MIXERS if refuses(name, attn_drop=0.5)]
ROTARY_REFUSED = [name for name in MIXERS if refuses(name, rotary="axial")]


def images(*size):
    return torch.randn(2, 3, *size, dtype=torch.float64)


def attentions(names, keys=ATTENTION):
    return tuple(f"{name}.{key}" for name in names for key in keys)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Self-attention


@pytest.mark.parametrize(
    "host, args",
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", dict(qkv_bias=False, reg_tokens=4, class_token=False, global_pool="avg")),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
    ],
)
def test_dense_is_the_attention_of_a_vit(host, args):
    model, x = made(host, **VIT, **args), images(48, 80)
    wanted, keys, old = model(x), list(model.state_dict()), copy.deepcopy(model.state_dict())
    report = backbones.replace(model, "dense")
    taken = [key for key in ATTENTION if f"blocks.0.attn.{key}" in keys]
    assert report == (model, attentions(["blocks.0.attn", "blocks.1.attn"], taken), (), ())
    assert list(model.state_dict()) == keys and all(torch.equal(model.state_dict()[key], old[key]) for key in keys)
    close(model(x), wanted)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_dense_takes_over_the_norms_of_queries_and_keys(norm):
    model, x = made("vit_tiny_patch16_224", **VIT, qk_norm=True), images(48, 80)
    for part in model.blocks:
        part.attn.q_norm, part.attn.k_norm = norm(64, dtype=torch.float64), norm(64, dtype=torch.float64)
        nn.init.normal_(part.attn.q_norm.weight), nn.init.normal_(part.attn.k_norm.weight)
    wanted = model(x)
    report = backbones.replace(model, "dense", "blocks.1")
    assert report.new == report.unused == () and "blocks.1.attn.q_norm.weight" in report.copied
    assert isinstance(model.blocks[1].attn.k_norm, norm)
    close(model(x), wanted)


def test_dense_is_the_attention_of_an_eva_without_rotary_positions():
    for fused in (True, False):
        for bias in (True, False):
            args = dict(use_rot_pos_emb=False, qkv_fused=fused, qkv_bias=bias)
            model, x = made("eva02_tiny_patch14_224", **EVA, **args), images(42, 70)
            assert type(model.blocks[0].attn) is EvaAttention
            wanted = model(x)
            report = backbones.replace(model, "dense")
            taken = [key for key in ATTENTION if bias or key != "qkv.bias"]
            assert report.copied == attentions(["blocks.0.attn", "blocks.1.attn"], taken) and report.new == ()
            close(model(x), wanted)


@in_turn({"block": MIXERS, "fused": [True, False]})
def test_an_eva_hands_over_its_projections_and_its_positions(block, fused):
    model, x = made("eva02_tiny_patch14_224", **EVA, qkv_fused=fused), images(42, 70)
    old = copy.deepcopy(model.blocks[0].attn)
    report = backbones.replace(model, block, "blocks.0")
    new = model.blocks[0].attn
    assert isinstance(new, Mixer) and type(model.blocks[1].attn) is EvaAttention
    assert ("blocks.0.attn.rope" in report.unused) == (block in ROTARY_REFUSED)
    assert any(isinstance(part, Rotary) for part in new.modules()) == (block not in ROTARY_REFUSED)
    assert model.rope is not None  # of the other block
    if block in WHOLE:
        q, k, v = new.qkv.weight.chunk(3)
        q_bias, k_bias, v_bias = new.qkv.bias.chunk(3)
        if fused:
            assert torch.equal(torch.cat([q, k, v]), old.qkv.weight)
            assert torch.equal(q_bias, old.q_bias) and torch.equal(v_bias, old.v_bias)
        else:
            assert torch.equal(q, old.q_proj.weight) and torch.equal(k, old.k_proj.weight)
            assert torch.equal(v, old.v_proj.weight)
            assert torch.equal(q_bias, old.q_proj.bias) and torch.equal(v_bias, old.v_proj.bias)
        assert not k_bias.any()  # EVA's keys have no bias
        assert torch.equal(new.proj.weight, old.proj.weight) and torch.equal(new.proj.bias, old.proj.bias)
        assert report.copied == attentions(["blocks.0.attn"]) and report.new == ()
        assert report.unused == (("blocks.0.attn.rope",) if block in ROTARY_REFUSED else ())
    assert model(x).isfinite().all()


@every_mixer
def test_report_accounts_for_every_weight(block):
    model = made("vit_tiny_patch16_224", **VIT)
    old = copy.deepcopy(model)
    report = backbones.replace(model, block)
    theirs = {key for key in old.state_dict() if ".attn." in key}
    ours = {key for key in model.state_dict() if ".attn." in key}
    assert set(report.copied) | set(report.new) == ours and not set(report.copied) & set(report.new)
    assert set(report.copied) | set(report.unused) == theirs and not set(report.copied) & set(report.unused)
    assert all(torch.equal(model.state_dict()[key], old.state_dict()[key]) for key in report.copied)
    was, now = old.state_dict(), model.state_dict()
    assert set(report.new) & set(report.unused) == {k for k in theirs & ours if was[k].shape != now[k].shape}
    if block in WHOLE:
        assert report.copied == attentions(["blocks.0.attn", "blocks.1.attn"]) and report.new == report.unused == ()
    text = str(report)
    assert text.startswith("copied: ") and "\nnew: " in text and "\nunused: " in text
    assert all(key in text for names in report[1:] for key in names)


@every_mixer
def test_queries_of_another_width_are_new(block):
    model, x = made("vit_tiny_patch16_224", **VIT), images(48, 80)
    proj = model.blocks[1].attn.proj.weight.clone()
    report = backbones.replace(model, block, "blocks.1", key_dim=96)
    if block in WHOLE:
        assert report.copied == attentions(["blocks.1.attn"], ATTENTION[2:])
        assert report.new == report.unused == attentions(["blocks.1.attn"], ATTENTION[:2])
        assert torch.equal(model.blocks[1].attn.proj.weight, proj)
    assert model(x).isfinite().all()


@every_mixer
def test_the_block_inherits_the_settings_of_the_attention(block):
    args = dict(num_heads=6, qkv_bias=False, proj_bias=False, proj_drop_rate=0.25, qk_norm=True)
    model = timm.create_model("vit_tiny_patch16_224", **VIT, **args, dtype=torch.bfloat16).train()
    model.blocks[1].attn.eval()
    # collaborative heads share what they compare
    compares = block != "collaborative" and {"q", "k"} <= set(create_block(block, 192, num_heads=6).projects)
    if not compares:
        with pytest.raises(ValueError, match="qk_norm=True"):
            backbones.replace(model, block)
    backbones.replace(model, block, **{} if compares else {"qk_norm": False})
    for part in model.blocks:
        for step in part.attn.steps:
            assert step.num_heads == 6 and step.qkv.bias is None and step.proj.bias is None
            assert step.proj_drop.p == 0.25
            if compares:
                assert type(step.q_norm) is type(step.k_norm) is not nn.Identity
        assert {p.dtype for p in part.attn.parameters()} == {torch.bfloat16}
    assert model.blocks[0].attn.training
    backbones.replace(other := made("vit_tiny_patch16_224", **VIT), block, num_heads=4, proj_drop=0.5)
    assert not any(m.training for m in other.modules())
    assert all(s.num_heads == 4 and s.proj_drop.p == 0.5 for part in other.blocks for s in part.attn.steps)


@every_mixer
def test_dropout_of_attention_is_inherited_or_refused(block):
    model, x = made("vit_tiny_patch16_224", **VIT, attn_drop_rate=0.5), images(48, 80)
    wanted, keys = model(x), list(model.state_dict())
    if block in ATTN_DROP_REFUSED:
        with pytest.raises(ValueError, match="attn_drop=0.5"):
            backbones.replace(model, block)
        assert list(model.state_dict()) == keys and torch.equal(model(x), wanted)
        backbones.replace(model, block, attn_drop=0.0)
        assert model(x).isfinite().all()
    else:
        backbones.replace(model, block)
        assert all(step.attn_drop == 0.5 for part in model.blocks for step in part.attn.steps)
        assert not torch.equal(model.train()(x), model(x))


@every_mixer
def test_gradients_reach_every_new_weight(block):
    model, x = made("eva02_tiny_patch14_224", **EVA), images(42, 70)
    report = backbones.replace(model, block, **OPTIONS.get(block, [{}])[0])
    model.train()(x).square().sum().backward()
    weights = dict(model.named_parameters())
    for name in weights.keys() & {*report.copied, *report.new}:  # the rest are buffers
        assert weights[name].grad is not None and weights[name].grad.any(), name


@every_mixer
def test_replaced_models_take_other_sizes_and_copies(block):
    model = made("vit_tiny_patch16_224", **VIT, dynamic_img_size=True)
    backbones.replace(model, block)
    wanted, twin = model(x := images(48, 80)), copy.deepcopy(model)
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    model(images(80, 112))
    assert seen == [Grid(5, 7)]
    assert torch.equal(twin(x), wanted) and torch.equal(model(x), wanted)


def test_a_block_without_an_output_projection_leaves_that_of_the_host_over():
    vit = made("vit_tiny_patch16_224", **VIT)
    report = backbones.replace(vit, "criss_cross", out_proj=False)
    names = [f"blocks.{i}.attn" for i in range(2)]
    assert report.copied == attentions(names, ["qkv.weight", "qkv.bias"]) and report.new == ()
    assert report.unused == attentions(names, ["proj.weight", "proj.bias"])
    assert vit(images(48, 80)).isfinite().all()


def test_a_second_block_takes_the_place_of_part_of_the_rest():
    model, x = made("vit_tiny_patch16_224", **VIT), images(48, 80)
    wanted = model(x)
    backbones.insert(model, GATES[0])
    backbones.replace(model, "dense", "blocks.1")
    close(model(x), wanted)
    backbones.insert(model, MIXERS[0])
    close(model(x), wanted)
    assert len(model.patch_embed._forward_hooks) == 1  # one source of grids for all
    assert type(model.blocks[0].attn) is Attention


# Squeeze and excite


SQUEEZED = [("efficientnet_b0", 16), ("regnety_002", 13), ("mobilenetv3_small_050", 9), ("seresnet18", 8)]


@cache
def squeezed(host):
    """A model, where it squeezes, an image, and what the model makes of it without."""
    model, x = timm.create_model(host, num_classes=7).eval(), torch.randn(2, 3, 67, 43)
    places = [n for n, m in model.named_modules() if n.split(".")[-1] == "se" and not isinstance(m, nn.Identity)]
    bare = copy.deepcopy(model)
    for name in places:
        bare.set_submodule(name, nn.Identity())
    return model, places, x, bare(x)


@in_turn({"block": list_blocks(), "host, count": SQUEEZED})
def test_squeeze_and_excite_gives_way_to_any_block(host, count, block):
    model, places, x, bare = squeezed(host)
    assert len(places) == count
    model, old = copy.deepcopy(model), model.state_dict()
    report = backbones.replace(model, block)
    new = model.state_dict()
    assert all(type(model.get_submodule(name)) is OnMap for name in places)
    inside = tuple(f"{name}." for name in places)
    assert report.copied == ()
    assert report.unused == tuple(key for key in old if key.startswith(inside))
    assert report.new == tuple(key for key in new if key.startswith(inside))
    assert torch.equal(model(x), bare)  # the new layers are the identity until trained


@every_block
def test_part_of_the_squeeze_and_excite_layers(block):
    model = copy.deepcopy(squeezed("mobilenetv3_small_050")[0])
    report = backbones.replace(model, block, ["blocks.[02].*.se", "blocks.4"], init_gain=1.0)
    places = [name for name, m in model.named_modules() if isinstance(m, OnMap)]
    assert places == [f"blocks.{i}.{j}.se" for i, j in ((0, 0), (2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2))]
    assert all(model.get_submodule(name).gain == 1 for name in places)
    assert {key.split(".block.")[0].removesuffix(".gain") for key in report.new} == set(places)


# Refusals


WRONG = ["blocks.2.attn", "blocks.*.mlp", "attn", "", ["blocks.0", "stages.*"], [], "blocks.0.attn.qkv"]


@in_turn({"block": list_blocks(), "at": WRONG})
def test_a_wrong_place_lists_the_right_ones_and_changes_nothing(block, at):
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"at=.*blocks\.0\.attn, blocks\.1\.attn$"):
        backbones.replace(model, block, at)
    assert list(model.state_dict()) == keys and all(type(part.attn) is Attention for part in model.blocks)


@pytest.mark.parametrize("host", ["resnet18", "swin_tiny_patch4_window7_224", "convnext_atto"])
def test_a_model_without_replaceable_attention_says_so(host):
    for at in (None, "layer*.*", "blocks.*.attn"):
        with pytest.raises(ValueError, match=r"model=\w+: has no attention that can be replaced"):
            backbones.replace(timm.create_model(host), "dense", at)


@pytest.mark.parametrize("block", GATES)
def test_a_gate_can_not_stand_for_self_attention(block):
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    with pytest.raises(ValueError, match=f"block='{block}'.*is a gate.*insert"):
        backbones.replace(model, block)
    assert all(type(part.attn) is Attention for part in model.blocks)


@every_mixer
def test_bad_options_change_nothing(block):
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    with pytest.raises(ValueError, match="num_heads=5: must divide dim=192"):
        backbones.replace(model, block, num_heads=5)
    with pytest.raises(TypeError, match="nonsense"):
        backbones.replace(model, block, nonsense=5)
    assert all(type(part.attn) is Attention for part in model.blocks)


@pytest.mark.parametrize("option, said", [("device", "cpu"), ("dtype", "torch.float32")])
def test_another_type_or_device_is_refused_in_a_line(option, said):
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    other = {"device": "meta", "dtype": torch.bfloat16}[option]
    with pytest.raises(ValueError, match=f"^{option}={re.escape(repr(other))}: .*is the model's, {said}"):
        backbones.replace(model, "dense", **{option: other})
    assert all(type(part.attn) is Attention for part in model.blocks)


@every_mixer
def test_masks_of_the_host_are_refused(block):
    model, x = made("vit_tiny_patch16_224", **VIT), images(48, 80)
    backbones.replace(model, block)
    with pytest.raises(ValueError, match="attn_mask"):
        model(x, attn_mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        model.forward_features(x, is_causal=True)
    model(x, attn_mask=None)


@every_mixer
def test_tokens_that_are_not_the_grid_are_refused(block):
    model, x = made("vit_tiny_patch16_224", **VIT), images(48, 80)
    backbones.replace(model, block)
    model.patch_drop = PatchDropout(0.4).eval()  # which replace itself would refuse
    assert model(x).isfinite().all()
    with pytest.raises(ValueError, match=r"x has 10 tokens, but the latest patch embedding made 1 \+ 3×5"):
        model.train()(x)


@pytest.mark.parametrize("add", [backbones.insert, backbones.replace])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_dropped_patches_are_refused(add, name):
    model = made(name, **(EVA if name.startswith("eva") else VIT), patch_drop_rate=0.4)
    with pytest.raises(ValueError, match="patch_drop_rate: must be 0 beside a block"):
        add(model, "criss_cross")


@every_mixer
def test_tokens_without_a_patch_embedding_are_refused(block):
    model = made("vit_tiny_patch16_224", **VIT)
    backbones.replace(model, block)
    tokens = torch.randn(2, 16, 192, dtype=torch.float64)
    with pytest.raises(ValueError, match="grid: the patch embedding has not run"):
        model.blocks[0](tokens)
    model(images(48, 80))
    assert model.blocks[0](tokens).shape == tokens.shape
    with pytest.raises(ValueError, match="grid: the patch embedding has not run"):
        copy.deepcopy(model).blocks[0](tokens.clone())  # a copy does not go on with the images of the original


def test_rotary_positions_are_reported_where_there_are_some():
    model = made("eva02_tiny_patch14_224", **EVA, use_rot_pos_emb=False)
    assert backbones.replace(model, "dense").unused == ()


def test_an_attention_of_another_kind_is_left_alone():
    with pytest.raises(ValueError, match="has no attention that can be replaced"):
        backbones.replace(timm.create_model("beit_base_patch16_224", depth=1, img_size=32), "dense")
