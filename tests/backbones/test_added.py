"""What blocks bring to a host, by name: for learning rates of their own, and without weight decay on tables."""

import copy
import pickle

import pytest
import timm
from conftest import OPTIONS
from timm.optim import create_optimizer_v2

import backbones
from vision_attn import create_block, list_blocks
from vision_attn.zoo import block_class

SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)


def undecayed(model):
    """Names of what timm's optimizer applies no weight decay to, biases and other vectors aside."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.3).param_groups
    spared = [p for group in groups if not group["weight_decay"] for p in group["params"] if p.ndim > 1]
    return {names[parameter] for parameter in spared}


@pytest.mark.parametrize("way", ["named", "inserted", "replaced"])
def test_tables_of_blocks_are_spared_as_the_class_token_is(way):
    if way == "named":
        model = timm.create_model("vit_tiny_patch16_224_global_memory", **SMALL)
    else:
        model = timm.create_model("vit_tiny_patch16_224", **SMALL)
        change = backbones.insert if way == "inserted" else backbones.replace
        change(model, "global_memory", memory=5)
    inner = "attn_global_memory.block" if way == "inserted" else "attn"
    tables = {f"blocks.{i}.{inner}.memory" for i in (0, 1)}
    assert undecayed(model) == {"pos_embed", "cls_token", *tables}
    assert undecayed(copy.deepcopy(model)) == undecayed(model)
    assert pickle.loads(pickle.dumps(model.no_weight_decay))() == model.no_weight_decay()


def test_tables_in_the_slot_of_a_resnet_and_in_steps_of_a_block():
    model = timm.create_model("cifar_resnet20_axial", attn_at="layer2.1", attn_kwargs=dict(length=(5, 7)))
    chain = "layer2.1.se.block.chain"
    assert undecayed(model) == {f"{chain}.0.relative", f"{chain}.1.relative"}
    assert undecayed(timm.create_model("cifar_resnet20_cbam")) == set()


SPARING = [n for n in list_blocks() if any(getattr(m, "undecayed", ()) for m in create_block(n, 48).modules())]


@pytest.mark.parametrize("name", SPARING)
def test_what_a_block_spares_is_a_parameter_of_it(name):
    """With some options; None, or not there, with others."""
    declared, there = set(), set()
    causal = {} if block_class(name).not_causal else {"causal": True}
    for options in ({}, causal, *OPTIONS.get(name, ())):
        for module in create_block(name, 48, **{"num_heads": 2} | options).modules():
            declared |= {*getattr(module, "undecayed", ())}
            there |= {key for key, _ in module.named_parameters(recurse=False)}
    assert declared <= there


def test_what_is_new_is_what_the_stock_model_lacks():
    for block, options in (("cbam", {}), ("linformer", {}), ("low_rank", {}), ("criss_cross", {})):
        model = timm.create_model(f"vit_tiny_patch16_224_{block}", attn_kwargs=options, **SMALL)
        stock = dict(timm.create_model("vit_tiny_patch16_224", **SMALL).named_parameters())
        lacking = {n for n, p in model.named_parameters() if n not in stock or stock[n].shape != p.shape}
        assert backbones.new_parameters(model) == lacking
    model = timm.create_model("cifar_resnet20")
    before = {name for name, _ in model.named_parameters()}
    backbones.insert(model, "axial", at="layer2")
    assert backbones.new_parameters(model) == {name for name, _ in model.named_parameters()} - before
