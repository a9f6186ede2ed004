"""Weights of models with a block, by name: stock ones, own ones, from the hub, of a distributed run."""

import pytest
import timm
import torch
from conftest import GATES, MIXERS, alive, every_mixer, in_turn
from named import NARROW, THIN, blocks_in, images, made, smallest_models
from safetensors.torch import save_file
from timm.models import load_checkpoint, save_for_hf

from vision_attn import list_blocks


def of_one_shape(ours, theirs) -> set[str]:
    """Keys that two state_dicts have in one shape."""
    return {key for key in ours.keys() & theirs.keys() if ours[key].shape == theirs[key].shape}


def stock_file(folder, stock, args, suffix=".safetensors", **changes):
    """A stock model with random weights, and its file; ``changes``: values by key, None takes it out."""
    model = alive(timm.create_model(stock, **args)).eval()
    weights = {**model.state_dict(), **{key.replace("/", "."): value for key, value in changes.items()}}
    weights = {key: value for key, value in weights.items() if value is not None}
    path = str(folder / f"{stock}{suffix}")
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    return model, path


def loaded(name, path, **args):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=path), **args).eval()


WITH_WEIGHTS = [
    ("resnet18", NARROW, (67, 43)),
    ("cifar_resnet20", {}, (29, 37)),
    ("vit_tiny_patch4_32", THIN, (32, 32)),
]


@in_turn({"block": list_blocks(), "stock, args, size": WITH_WEIGHTS})
def test_stock_weights_load_and_only_the_block_is_new(tmp_path, stock, args, size, block):
    plain, path = stock_file(tmp_path, stock, args, ".pth" if block in GATES else ".safetensors")
    model = loaded(f"{stock}_{block}", path, **args)
    theirs, ours = plain.state_dict(), model.state_dict()
    inside = tuple(f"{name}." for name in blocks_in(model))
    same = of_one_shape(ours, theirs)
    assert all(key.startswith(inside) for key in (theirs.keys() | ours.keys()) - same)
    assert all(torch.equal(ours[key], theirs[key]) for key in same)
    x = images(size)
    if not stock.startswith("vit") or block in GATES:
        assert torch.equal(model(x), plain(x))
    if stock.startswith("vit") and block == "dense":
        torch.testing.assert_close(model(x), plain(x))


@in_turn({"block": list_blocks(), "stock, args, size": WITH_WEIGHTS})
def test_stock_weights_fit_as_they_fit_the_stock_model(tmp_path, stock, args, size, block):
    """Other classes and other channels; another size of a ViT: what timm does to the stock weights it does here."""
    _, path = stock_file(tmp_path, stock, args)
    more = dict(in_chans=1, num_classes=3, **args, **(dict(img_size=(20, 44)) if stock.startswith("vit") else {}))
    plain, model = loaded(stock, path, **more), loaded(f"{stock}_{block}", path, **more)
    theirs, ours = plain.state_dict(), model.state_dict()
    head = ("fc.", "head.")
    same = [key for key in of_one_shape(ours, theirs) if not key.startswith(head)]
    assert all(torch.equal(ours[key], theirs[key]) for key in same) and len(same) > 20
    assert ours[f"{model.default_cfg['classifier']}.weight"].shape[0] == 3
    assert model(images(more.get("img_size", size), channels=1)).isfinite().all()


KEYS = [
    ("cifar_resnet20", "layer3.1.bn2.weight"),
    ("cifar_resnet20", "fc.bias"),
    ("vit_tiny_patch4_32", "blocks.1.norm2.bias"),
    ("vit_tiny_patch4_32", "blocks.1.attn.qkv.weight"),
    ("vit_tiny_patch4_32", "blocks.0.attn.proj.bias"),
]


@in_turn({"block": list_blocks(), "stock, key": KEYS})
def test_a_stock_file_that_lacks_a_weight_is_refused(tmp_path, stock, key, block):
    args = THIN if stock.startswith("vit") else {}
    model = timm.create_model(f"{stock}_{block}", **args)
    if key not in of_one_shape(model.state_dict(), timm.create_model(stock, **args).state_dict()):
        return  # a block of several steps, or of fewer queries, has no use for it
    _, path = stock_file(tmp_path, stock, args, **{key: None})
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        loaded(f"{stock}_{block}", path, **args)


@in_turn({"block": list_blocks(), "stock, args": [("cifar_resnet20", {}), ("vit_tiny_patch4_32", THIN)]})
def test_a_stock_file_with_something_else_is_refused(tmp_path, stock, args, block):
    _, path = stock_file(tmp_path, stock, args, surplus=torch.zeros(1))
    with pytest.raises(RuntimeError, match="surplus"):
        loaded(f"{stock}_{block}", path, **args)


@every_mixer
def test_queries_of_another_width_are_new_and_the_rest_is_loaded(tmp_path, block):
    plain, path = stock_file(tmp_path, "vit_tiny_patch4_32", THIN)
    model = loaded(f"vit_tiny_patch4_32_{block}", path, **THIN, attn_kwargs=dict(key_dim=48))
    theirs, ours = plain.state_dict(), model.state_dict()
    same = [key for key in of_one_shape(ours, theirs) if ".attn." not in key or ".attn.proj." in key]
    assert all(torch.equal(ours[key], theirs[key]) for key in same)
    assert model(images((32, 32))).isfinite().all()


@smallest_models
def test_own_weights_load_whole(tmp_path, stock, args, size, block):
    model = alive(made(stock, block, args, num_classes=10)).eval()
    path = str(tmp_path / "own.safetensors")
    save_file(model.state_dict(), path)
    again = loaded(f"{stock}_{block}", path, **args)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    x = images(size)
    assert torch.equal(model(x), again(x))


def test_own_weights_of_other_options_are_refused(tmp_path):
    path = str(tmp_path / "own.safetensors")
    save_file(made("cifar_resnet20", "dense", num_classes=10, attn_kwargs=dict(key_dim=16)).state_dict(), path)
    with pytest.raises(RuntimeError, match="size mismatch for layer2.2.attn_dense.block.qkv.weight"):
        loaded("cifar_resnet20_dense", path)


@smallest_models
def test_saved_for_the_hub_and_back(tmp_path, stock, args, size, block):
    at = ["blocks.1"] if stock.startswith("vit") else ["layer2", "layer3.1"]
    options = dict(num_heads=4) if block in MIXERS else dict(init_gain=0.5)
    args = dict(args, attn_at=at, attn_kwargs=options)
    model = alive(made(stock, block, args)).eval()
    save_for_hf(model, tmp_path, model_args=args)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert blocks_in(again) == blocks_in(model) and again.num_classes == 7
    x = images(size)
    assert torch.equal(again(x), model(x))


@smallest_models
def test_checkpoint_of_a_distributed_run(tmp_path, stock, args, size, block):
    model = alive(made(stock, block, args)).eval()
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / "last.pth")
    again = made(stock, block, args).eval()
    load_checkpoint(again, str(tmp_path / "last.pth"))
    x = images(size)
    assert torch.equal(again(x), model(x))
