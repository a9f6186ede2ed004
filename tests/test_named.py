"""Stock models with a block, by name: whatever works on timm's own models works on these."""

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from conftest import GATES, MIXERS, alive, every_block, every_gate, every_mixer
from safetensors.torch import save_file
from timm.layers import Attention, DropPath, create_feature_extractor
from timm.models import load_checkpoint, save_for_hf
from timm.utils import ModelEmaV3
from torch import nn

import backbones
from vision_attn import Gate, Grid, Mixer, layer, list_blocks
from vision_attn.layout import OnMap, OnTokens, Residual

RESNETS = ["resnet18", "resnet50", "resnet101", "cifar_resnet20", "cifar_resnet32", "cifar_resnet56"]
VITS = ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_tiny_patch4_32"]
# stock model, its arguments, and the size of an image it takes
SMALL = [
    pytest.param("resnet18", {}, (67, 43), id="resnet18"),
    pytest.param("cifar_resnet20", {}, (29, 37), id="cifar_resnet20"),
    pytest.param("vit_tiny_patch4_32", dict(depth=2, img_size=(28, 44)), (28, 44), id="vit"),
]
CIFAR_AND_VIT = SMALL[1:]

COMPILED = [pytest.param(name, marks=() if name == "dense" else pytest.mark.slow) for name in list_blocks()]

compiled_block = pytest.mark.parametrize("block", COMPILED)
small_models = pytest.mark.parametrize("stock, args, size", SMALL)
smallest_models = pytest.mark.parametrize("stock, args, size", CIFAR_AND_VIT)


def made(stock, block, args=None, **more):
    return timm.create_model(f"{stock}_{block}", **{"num_classes": 7, **(args or {}), **more})


def images(size, batch=2, channels=3):
    return torch.randn(batch, channels, *size)


def blocks_in(model):
    """Names of the layers with a block, and of the mixers that stand for a ViT's attention."""
    found = [name for name, m in model.named_modules() if isinstance(m, (Residual, Mixer))]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


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


@every_block
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


@every_block
@pytest.mark.parametrize("stock", ["resnet50", "resnet101", *VITS[:3]])
def test_large_models_are_made_without_memory(stock, block):
    model = made(stock, block, device="meta")
    assert model(torch.randn(2, 3, 224, 224, device="meta")).shape == (2, 7)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert blocks_in(model)


@every_block
@pytest.mark.parametrize("in_chans, num_classes", [(1, 3), (5, 0)])
def test_gray_and_other_images(block, in_chans, num_classes):
    for stock, args, size in (case.values for case in CIFAR_AND_VIT):
        model = made(stock, block, args, in_chans=in_chans, num_classes=num_classes).eval()
        assert model(images(size, channels=in_chans)).shape == (2, num_classes or model.num_features)


@every_block
@smallest_models
def test_another_head(stock, args, size, block):
    model = made(stock, block, args).eval()
    model.reset_classifier(11)
    assert model(images(size)).shape == (2, 11)
    model.reset_classifier(0)
    assert model(images(size)).shape == (2, model.num_features)


@smallest_models
def test_unknown_arguments_are_refused(stock, args, size):
    for block in list_blocks():
        with pytest.raises(TypeError, match="nonsense"):
            made(stock, block, args, nonsense=1)
        with pytest.raises(TypeError, match="nonsense"):
            made(stock, block, args, attn_kwargs=dict(nonsense=1))


@every_block
@smallest_models
def test_stochastic_depth(stock, args, size, block):
    model = alive(made(stock, block, args, drop_path_rate=0.5))
    assert any(isinstance(m, DropPath) and m.drop_prob == 0.5 for m in model.modules())
    x = images(size)
    assert torch.equal(model.eval()(x), model(x))
    torch.manual_seed(1)
    assert len({model.train()(x).sum().item() for _ in range(5)}) > 1


# Where the block goes


def test_gates_sit_in_every_slot_and_mixers_behind_two_stages():
    for block in list_blocks():
        places = {".".join(name.split(".")[:2]) for name in blocks_in(made("resnet18", block))}
        everywhere = {f"layer{stage}.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)}
        assert places == (everywhere if block in GATES else {"layer2.1", "layer3.1"})


@every_block
@pytest.mark.parametrize("stock, last", [("resnet50", "bn3"), ("cifar_resnet20", "bn2")])
def test_in_the_slot_a_block_follows_the_last_norm_and_precedes_the_sum(stock, last, block):
    model = alive(made(stock, block, attn_at="layer3.*")).eval()
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
    model = made("resnet18", block, attn_at="layer3")
    assert blocks_in(model) == [f"layer3.1.attn_{block}"]
    model = alive(model).eval()
    x, stage = images((9, 7), channels=128), model.layer3
    with_block = stage(x)
    added = stage[1]._modules[f"attn_{block}"]
    with torch.no_grad():
        added.gain.zero_()
        before = stage(x)
        added.gain.fill_(0.3)
        assert not torch.equal(added(before), before)
        assert torch.equal(stage(x), added(before)) and not torch.equal(before, with_block)


def test_several_places_in_a_resnet():
    for block in list_blocks():
        model = made("resnet18", block, attn_at=["layer1", "layer[24].1", "layer*"])
        stages = {f"layer{i}.1.attn_{block}" for i in (1, 2, 3, 4)}
        assert set(blocks_in(model)) == stages | {"layer2.1.se", "layer4.1.se"}
        assert made("resnet18", block, attn_at=("layer4.0",))(images((64, 64))).shape == (2, 7)


@every_block
@pytest.mark.parametrize("at", [None, "blocks.[6-9]*", "blocks.1*", ["blocks.0", "blocks.11"]])
def test_places_in_a_vit(block, at):
    model = made("vit_tiny_patch4_32", block, attn_at=at, device="meta")
    wanted = {"blocks.[6-9]*": (6, 7, 8, 9), "blocks.1*": (1, 10, 11)}.get(str(at), (0, 11))
    if at is None:  # behind the last block a gate would only change what the class token no longer hears
        wanted = range(12 if block in MIXERS else 11)
    suffix = "attn" if block in MIXERS else f"attn_{block}"
    assert blocks_in(model) == [f"blocks.{i}.{suffix}" for i in wanted]
    stock = [i for i, part in enumerate(model.blocks) if type(part.attn) is Attention]
    assert stock == [i for i in range(12) if i not in wanted or block in GATES]


@every_block
@pytest.mark.parametrize("at", ["layer5", "layer3.7", "layer3.0.conv1", "", ["layer3", "stage.*"], []])
def test_a_wrong_place_in_a_resnet_lists_the_right_ones(block, at):
    with pytest.raises(ValueError, match="attn_at=") as refusal:
        made("resnet18", block, attn_at=at)
    assert "layer3" in str(refusal.value) and "layer4.1" in str(refusal.value)


@every_block
@pytest.mark.parametrize("at", ["layer3", "blocks.7", "", ["blocks.1", "block.0"], []])
def test_a_wrong_place_in_a_vit_lists_the_right_ones(block, at):
    with pytest.raises(ValueError, match="at=") as refusal:
        made("vit_tiny_patch4_32", block, depth=2, attn_at=at)
    assert "blocks.0" in str(refusal.value) and "blocks.1" in str(refusal.value)


@every_mixer
def test_options_reach_a_mixer(block):
    for stock in ("cifar_resnet20", "vit_tiny_patch4_32"):
        model = made(stock, block, attn_kwargs=dict(num_heads=4, proj_drop=0.25), device="meta")
        heads = [step for m in outermost(model) if isinstance(m, Mixer) for step in m.steps or (m,)]
        assert heads and all(one.num_heads == 4 and one.proj_drop.p == 0.25 for one in heads)


@every_block
def test_options_reach_a_layer(block):
    for stock in ("cifar_resnet20", "vit_tiny_patch4_32"):
        if stock.startswith("vit") and block in MIXERS:
            continue  # there a mixer is no layer: it stands for the attention
        model = made(stock, block, attn_kwargs=dict(init_gain=0.25))
        assert all(m.gain.item() == 0.25 for m in model.modules() if isinstance(m, Residual))


@every_mixer
def test_bad_options_are_named(block):
    for stock in ("resnet18", "vit_tiny_patch4_32"):
        with pytest.raises(ValueError, match="num_heads=5"):
            made(stock, block, attn_kwargs=dict(num_heads=5))


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
    model = alive(made("vit_tiny_patch4_32", block, depth=2, dynamic_img_size=True)).eval()
    seen = grids_seen(model)
    for height, width in [(28, 44), (44, 28), (20, 52), (4, 4)]:
        seen.clear()
        assert model(images((height, width))).isfinite().all()
        assert seen and set(seen) == {Grid(height // 4, width // 4)}


@every_block
def test_a_size_that_varies_gives_what_a_fixed_size_gives(block):
    args = dict(depth=2, pos_embed="none", reg_tokens=3)
    anything = alive(made("vit_tiny_patch4_32", block, args, dynamic_img_size=True)).eval()
    fixed = made("vit_tiny_patch4_32", block, args, img_size=(20, 52)).eval()
    fixed.load_state_dict(anything.state_dict())
    anything(images((28, 44)))
    x = images((20, 52))
    assert torch.equal(anything(x), fixed(x))
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(images((52, 20)))


@every_block
@pytest.mark.parametrize("prefix", [0, 1, 4])
def test_prefix_tokens_are_counted(block, prefix):
    tokens = dict(class_token=prefix > 0, reg_tokens=max(0, prefix - 1), global_pool="avg")
    model = alive(made("vit_tiny_patch4_32", block, depth=1, img_size=(20, 28), **tokens)).eval()
    seen = grids_seen(model)
    assert model.num_prefix_tokens == prefix and model(images((20, 28))).isfinite().all()
    assert set(seen) == {Grid(5, 7)}


def test_padded_patches_are_counted():
    for block in list_blocks():
        model = made("vit_tiny_patch4_32", block, depth=1, dynamic_img_size=True, dynamic_img_pad=True).eval()
        seen = grids_seen(model)
        assert model(images((21, 31))).shape == (2, 7) and set(seen) == {Grid(6, 8)}


# Features


@every_block
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


@every_block
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
    model, x = alive(made("cifar_resnet20", block, attn_at=["layer1.*", "layer3"])).eval(), images((29, 37))
    traced = create_feature_extractor(model, ["layer3", "fc"])
    outs = traced(x)
    assert torch.equal(outs["fc"], model(x)) and outs["layer3"].shape == (2, 64, 8, 10)
    outs["fc"].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# Training


@every_block
@small_models
def test_checkpointing_changes_nothing(stock, args, size, block):
    model = alive(made(stock, block, args)).train()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = images(size)
    outs = []
    for one in (model, twin):
        outs.append(one(x))
        outs[-1].square().sum().backward()
    assert torch.equal(*outs)
    for (name, a), b in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(a.grad, b.grad), name


@every_block
@small_models
def test_autocast(stock, args, size, block):
    model, x = alive(made(stock, block, args)).train(), images(size)
    wanted = copy.deepcopy(model)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16 and (out - wanted).norm() < 0.05 * wanted.norm()
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@every_block
@small_models
def test_channels_last(stock, args, size, block):
    model, x = alive(made(stock, block, args)).eval(), images(size)
    wanted = model(x)
    got = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, wanted)


@every_block
@smallest_models
def test_copies_live_on_their_own(stock, args, size, block):
    """A deep copy, an average and a pickle give the same answers, after the original has seen another size."""
    free = dict(depth=2, dynamic_img_size=True) if stock.startswith("vit") else args
    model, x = alive(made(stock, block, free)).eval(), images(size)
    wanted = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    copies.append(ModelEmaV3(model).module)
    model(images((16, 20)))
    for one in copies:
        assert torch.equal(one(x), wanted)
    with torch.no_grad():
        for p in copies[0].parameters():
            p.zero_()
    assert torch.equal(model(x), wanted)


@every_block
def test_two_sizes_in_turn_and_their_gradients(block):
    """Multi-scale training: each forward and backward has the grid of its own images."""
    model = alive(made("vit_tiny_patch4_32", block, depth=2, dynamic_img_size=True)).eval()
    model.set_grad_checkpointing()
    small, large = images((12, 20)), images((28, 20))
    gradients = []
    for order in ([small, large], [large, small]):
        model.zero_grad()
        for x in order:
            model(x).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def compiled_equals(model, sizes):
    model = alive(model).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for size in sizes:
        x = images(size, batch=3)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


@compiled_block
def test_compiled_vit_in_one_graph(block):
    model = made("vit_tiny_patch4_32", block, depth=1, dynamic_img_size=True)
    compiled_equals(model, [(28, 44), (20, 12), (36, 28)])


@compiled_block
def test_compiled_resnet_in_one_graph(block):
    compiled_equals(made("cifar_resnet20", block, attn_at=["layer2.2", "layer3"]), [(29, 37), (41, 23)])


@pytest.mark.slow
@every_block
def test_compiled_training_step(block):
    for model, size in (
        (made("vit_tiny_patch4_32", block, depth=2, img_size=(28, 44)), (28, 44)),
        (made("resnet18", block), (67, 43)),
    ):
        model, x = alive(model).double().train(), images(size).double()
        twin = copy.deepcopy(model)
        torch._dynamo.reset()
        torch.compile(twin, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
        model(x).square().sum().backward()
        for (name, a), b in zip(model.named_parameters(), twin.parameters()):
            torch.testing.assert_close(b.grad, a.grad, msg=lambda text, name=name: f"{name}: {text}")


# Weights


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
    ("resnet18", {}, (67, 43)),
    ("cifar_resnet20", {}, (29, 37)),
    ("vit_tiny_patch4_32", dict(depth=2), (32, 32)),
]


@every_block
@pytest.mark.parametrize("stock, args, size", WITH_WEIGHTS)
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


@every_block
@pytest.mark.parametrize("stock, args, size", WITH_WEIGHTS)
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


@every_block
@pytest.mark.parametrize(
    "stock, key",
    [
        ("cifar_resnet20", "layer3.1.bn2.weight"),
        ("cifar_resnet20", "fc.bias"),
        ("vit_tiny_patch4_32", "blocks.1.norm2.bias"),
        ("vit_tiny_patch4_32", "blocks.1.attn.qkv.weight"),
        ("vit_tiny_patch4_32", "blocks.0.attn.proj.bias"),
    ],
)
def test_a_stock_file_that_lacks_a_weight_is_refused(tmp_path, stock, key, block):
    args = dict(depth=2) if stock.startswith("vit") else {}
    model = timm.create_model(f"{stock}_{block}", **args)
    if key not in of_one_shape(model.state_dict(), timm.create_model(stock, **args).state_dict()):
        return  # a block of several steps, or of fewer queries, has no use for it
    _, path = stock_file(tmp_path, stock, args, **{key: None})
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        loaded(f"{stock}_{block}", path, **args)


@every_block
def test_a_stock_file_with_something_else_is_refused(tmp_path, block):
    for stock, args in (("cifar_resnet20", {}), ("vit_tiny_patch4_32", dict(depth=2))):
        _, path = stock_file(tmp_path, stock, args, surplus=torch.zeros(1))
        with pytest.raises(RuntimeError, match="surplus"):
            loaded(f"{stock}_{block}", path, **args)


@every_mixer
def test_queries_of_another_width_are_new_and_the_rest_is_loaded(tmp_path, block):
    plain, path = stock_file(tmp_path, "vit_tiny_patch4_32", dict(depth=2))
    model = loaded(f"vit_tiny_patch4_32_{block}", path, depth=2, attn_kwargs=dict(key_dim=96))
    theirs, ours = plain.state_dict(), model.state_dict()
    same = [key for key in of_one_shape(ours, theirs) if ".attn." not in key or ".attn.proj." in key]
    assert all(torch.equal(ours[key], theirs[key]) for key in same)
    assert model(images((32, 32))).isfinite().all()


@every_block
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


@every_block
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


@every_block
@smallest_models
def test_checkpoint_of_a_distributed_run(tmp_path, stock, args, size, block):
    model = alive(made(stock, block, args)).eval()
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(dict(state_dict=weights), tmp_path / "last.pth")
    again = made(stock, block, args).eval()
    load_checkpoint(again, str(tmp_path / "last.pth"))
    x = images(size)
    assert torch.equal(again(x), model(x))


# timm's own slot


@every_gate
def test_layer_in_a_slot_of_timm(block):
    model = timm.create_model("resnet50", num_classes=7, block_args=dict(attn_layer=layer(block))).eval()
    named = made("resnet50", block, attn_at="layer*.*").eval()
    assert blocks_in(model) == blocks_in(named) and len(blocks_in(model)) == 16
    alive(named).load_state_dict(alive(model).state_dict())
    x = images((67, 43))
    assert torch.equal(model(x), named(x))
    assert all(type(model.get_submodule(name)) is OnMap for name in blocks_in(model))


def test_blocks_of_a_vit_are_what_they_should_be():
    for block in list_blocks():
        model = made("vit_tiny_patch4_32", block, device="meta")
        for name in blocks_in(model):
            kind = OnTokens if block in GATES else Mixer
            assert isinstance(model.get_submodule(name), kind)
    assert math.prod(backbones.attn_vit.vit_tiny_patch4_32().pos_embed.shape) == 65 * 192
