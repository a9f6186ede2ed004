"""`backbones.replace` on hosts that turn queries and keys by their places: the block turns as the host did."""

import copy
import pickle

import pytest
import timm
import torch

import backbones
from vision_attn.rotary import Rotary

TINY = dict(depth=2, embed_dim=48, num_heads=2, num_classes=7, dynamic_img_size=True)
LEARNED = [f"blocks.{i}.attn.rotary.frequencies" for i in range(2)]
HOSTS = {
    "eva": ("eva02_tiny_patch14_224", dict(patch_size=16)),
    "eva of one size": ("eva02_tiny_patch14_224", dict(patch_size=16, dynamic_img_size=False)),
    "eva stretched": ("eva02_tiny_patch14_224", dict(patch_size=16, ref_feat_shape=(3, 11))),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "axial": ("vit_small_patch16_rope_224", dict(global_pool="avg")),
    "mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "mixed, rows first": ("vit_small_patch16_rope_mixed_ape_224", dict(rope_grid_indexing="ij")),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {}),
}


def made(host, **args):
    """A host whose answers depend on where things are."""
    name, own = HOSTS[host]
    model = timm.create_model(name, **{**TINY, "img_size": (48, 80), **own, **args}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def images(*size):
    return torch.randn(2, 3, *size)


def rotaries(model):
    return [part for part in model.modules() if isinstance(part, Rotary)]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("host", HOSTS)
def test_dense_answers_as_the_host_does(host):
    model, sizes = made(host), [(48, 80)] if "one size" in host else [(48, 80), (112, 48)]
    inputs = [images(*size) for size in sizes]
    wanted = [model(x) for x in inputs]
    report = backbones.replace(model, "dense")
    assert report.unused == report.new == () and model.rope is None and len(rotaries(model)) == 2
    assert [name for name in report.copied if "rotary" in name] == (LEARNED if "mixed" in host else [])
    for x, answer in zip(inputs, wanted):
        close(model(x), answer)
    close(pickle.loads(pickle.dumps(copy.deepcopy(model)))(inputs[0]), wanted[0])
    for part in model.blocks:
        part.attn.rotary = None
    assert (model(inputs[0]) - wanted[0]).abs().max() > 0.02  # so the positions do tell


def test_a_size_that_is_set_later_turns_as_the_host_does():
    host, x = made("eva of one size"), images(80, 112)
    model = copy.deepcopy(host)
    backbones.replace(model, "dense")
    for one in (host, model):
        one.set_input_size((80, 112))
    close(model(x), host(x))


@pytest.mark.parametrize("host", ["dinov3", "mixed"])
def test_some_attentions_turn_beside_the_rest_of_the_host(host):
    model, x = made(host), images(48, 80)
    wanted = model(x)
    report = backbones.replace(model, "dense", "blocks.1")
    assert report.unused == () and model.rope is not None and len(rotaries(model)) == 1
    close(model(x), wanted)


def test_learned_frequencies_go_on_learning_and_are_not_decayed():
    model = made("mixed").train()
    backbones.replace(model, "criss_cross")
    model(images(48, 80)).square().sum().backward()
    found = dict(model.named_parameters())
    assert all(found[name].grad.any() for name in LEARNED)
    assert {*LEARNED} <= model.no_weight_decay()


@pytest.mark.parametrize("host", ["eva", "dinov3"])
def test_half_precision_turns_as_the_host_does(host):
    model, x = made(host).bfloat16(), images(48, 80).bfloat16()
    wanted = model(x).float()
    backbones.replace(model, "dense")
    assert (model(x).float() - wanted).norm() < 0.05 * wanted.norm()


def test_what_a_block_refuses_and_what_is_unknown_stays_unused():
    names = ("blocks.0.attn.rope", "blocks.1.attn.rope")
    for args, block in ((dict(rope_type="mrope"), "dense"), ({}, "linear")):
        model = made("dinov3", **args)
        report = backbones.replace(model, block)
        assert report.unused == names and model.rope is not None and not rotaries(model)
    model = made("mixed")
    assert backbones.replace(model, "dense", num_heads=4).unused == names  # frequencies are of two heads


def test_rotary_positions_that_are_asked_for_are_the_blocks_own():
    model = made("mixed")
    report = backbones.replace(model, "dense", rotary="mixed")
    assert report.unused == ("blocks.0.attn.rope", "blocks.1.attn.rope") and set(LEARNED) <= set(report.new)
    model = made("mixed")
    assert backbones.replace(model, "dense", rotary=None).unused and not rotaries(model)


def test_named_models_take_rotary_positions():
    args = dict(depth=1, num_classes=7, dynamic_img_size=True, attn_kwargs=dict(rotary="mixed"))
    model = timm.create_model("vit_tiny_patch4_32_window", **args)
    assert model(images(24, 40)).shape == (2, 7) and len(rotaries(model)) == 1
    assert "blocks.0.attn.rotary.frequencies" in model.no_weight_decay()
