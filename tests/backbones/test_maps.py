"""`backbones.attention_maps`: where the blocks in a model look, as numbers and as a picture."""

from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy
import pytest
import timm
import torch
from conftest import GATES, MIXERS, every_block, often
from PIL import Image
from torch import nn

import backbones
from vision_attn import create_block, create_layer, list_blocks


def alive(model: nn.Module) -> nn.Module:
    """With no gain, norm or bias at a special initial value, and logits large enough to prefer some positions."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p += torch.randn_like(p).mul(0.2).add(0.1)
            elif "qkv" in name or ".key." in name:
                p *= 5
    return model.eval()


def resnet(block, **args):
    return alive(timm.create_model(f"cifar_resnet20_{block}", num_classes=7, **args))


def vit(block, **args):
    return alive(timm.create_model(f"vit_tiny_patch4_32_{block}", num_classes=7, depth=2, embed_dim=96, **args))


def images(*size, batch=3):
    return torch.randn(batch, 3, *size)


# Numbers


def test_maps_in_several_threads_are_those_of_their_own_images():
    model = vit(MIXERS[0])
    batches = [images(32, 32) for _ in range(4)]
    wanted = [backbones.attention_maps(model, batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda batch: backbones.attention_maps(model, batch), batches * 6))
    for maps, alone in zip(found, wanted * 6):
        assert maps.keys() == alone.keys() and all(torch.equal(maps[name], alone[name]) for name in alone)


@every_block
def test_a_map_for_each_block_in_a_resnet(block):
    maps = backbones.attention_maps(resnet(block), images(29, 37))
    sizes = {"layer1": (29, 37), "layer2": (15, 19), "layer3": (8, 10)}
    if block in GATES:
        assert list(maps) == [f"layer{stage}.{i}.se.block" for stage in (1, 2, 3) for i in range(3)]
    else:
        assert list(maps) == [f"layer{stage}.2.attn_{block}.block" for stage in (2, 3)]
    for name, one in maps.items():
        assert one.shape == (3, *sizes[name[:6]]) and one.isfinite().all() and (one >= 0).all()
        assert not one.requires_grad


@every_block
def test_a_map_for_each_block_in_a_vit(block):
    maps = backbones.attention_maps(vit(block, img_size=(20, 44)), images(20, 44))
    suffix = "attn" if block in MIXERS else f"attn_{block}.block"
    assert list(maps) == [f"blocks.0.{suffix}", f"blocks.1.{suffix}"][: 2 if block in MIXERS else 1]
    assert all(one.shape == (3, 5, 11) and (one >= 0).all() for one in maps.values())


LOOK_AT_NO_IMAGE = ("fourier", "global_filter", "hand_crafted", "spatial_gating")  # all images alike


@every_block
def test_images_have_maps_of_their_own(block):
    model, x = vit(block, dynamic_img_size=True), images(20, 44)
    maps = backbones.attention_maps(model, x)
    one = backbones.attention_maps(model, x[1:2])
    for name, values in maps.items():
        torch.testing.assert_close(one[name], values[1:2], rtol=1e-4, atol=1e-5)
        assert torch.allclose(values[0], values[1]) == (block in LOOK_AT_NO_IMAGE)
    assert all(m.shape == (2, 7, 3) for m in backbones.attention_maps(model, images(28, 12, batch=2)).values())


AVERAGES = [name for name in MIXERS if all(step.averages for step in create_block(name, 32).steps)]


@pytest.mark.parametrize("block", AVERAGES)
def test_maps_of_a_mixer_are_one_on_average(block):
    """Without prefix tokens all attention falls on the map."""
    without = vit(block, img_size=(20, 44), class_token=False, global_pool="avg")
    for model, size in ((without, (20, 44)), (resnet(block), (29, 37))):
        for values in backbones.attention_maps(model, images(*size)).values():
            torch.testing.assert_close(values.mean(dim=(1, 2)), torch.ones(3))
            assert values.std() > 1e-3 or block in ("fourier", "hand_crafted")  # where all are seen alike


@pytest.mark.parametrize("block", AVERAGES)
def test_what_goes_to_prefix_tokens_is_not_on_the_map(block):
    """The map is a row of sums over all queries; the rest of the attention is with the prefix tokens."""
    model = vit(block, img_size=(20, 44), reg_tokens=3)
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda m, args, out: seen.append(m.attention(*args)))
    maps = backbones.attention_maps(model, images(20, 44))
    prefix = seen[0][:, :, :, :4].sum(dim=(1, 2, 3)) / seen[0].shape[1]
    torch.testing.assert_close(maps["blocks.1.attn"].sum(dim=(1, 2)) + prefix, torch.full((3,), 4 + 55.0))


def test_map_of_a_mixer_is_what_a_position_receives():
    """A query matrix that looks at one position alone puts all of the map there."""
    layer = create_layer(MIXERS[0], 8, init_gain=1.0)
    layer.block.attention = lambda x, grid: torch.eye(15)[torch.full((15,), 7)].expand(2, 4, 15, 15)
    (one,) = backbones.attention_maps(layer, torch.randn(2, 8, 3, 5)).values()
    wanted = torch.zeros(2, 3, 5)
    wanted[:, 1, 2] = 15
    assert torch.equal(one, wanted)


@pytest.mark.parametrize("block", GATES)
def test_map_of_a_gate_is_its_own(block):
    layer, x = alive(create_layer(block, 8)), torch.randn(2, 8, 3, 5)
    (one,) = backbones.attention_maps(layer, x).values()
    assert torch.equal(one, layer.block.attention_map(x))


@every_block
def test_models_with_inserted_blocks(block):
    args = dict(img_size=(56, 84), depths=(1, 1), embed_dim=48, num_heads=(3, 6))
    model = timm.create_model("swin_tiny_patch4_window7_224", **args)
    maps = backbones.attention_maps(alive(backbones.insert(model, block)), images(56, 84))
    assert {name: one.shape[1:] for name, one in maps.items()} == {
        f"layers.0.attn_{block}.block": (14, 21),
        f"layers.1.attn_{block}.block": (7, 11),
    }


@every_block
def test_some_of_the_blocks(block):
    model, x = resnet(block, attn_at="layer*.1"), images(17, 23)
    everywhere = backbones.attention_maps(model, x)
    assert len(everywhere) == 3
    some = backbones.attention_maps(model, x, at="layer[23].*")
    assert list(some) == ["layer2.1.se.block", "layer3.1.se.block"]
    assert all(torch.equal(some[name], everywhere[name]) for name in some)
    with pytest.raises(ValueError, match=r"at='layer7': matches none of layer1\.1\.se\.block, layer2"):
        backbones.attention_maps(model, x, at="layer7")


def test_a_model_without_a_block_is_refused():
    with pytest.raises(ValueError, match="model=ResNet: has no block of vision_attn"):
        backbones.attention_maps(timm.create_model("resnet18"), images(64, 64))


# The model is left as it was


@every_block
def test_looking_changes_nothing(block):
    model, x = resnet(block).train(), images(29, 37)
    model.layer1.eval()
    modes = {m: m.training for m in model.modules()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    first = backbones.attention_maps(model, x)
    assert {m: m.training for m in model.modules()} == modes and model.training and not model.layer1[0].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    second = backbones.attention_maps(model.eval(), x)  # maps are those of eval mode either way
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_failure_leaves_no_trace():
    model = resnet(MIXERS[0]).train()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError):
        backbones.attention_maps(model, torch.randn(2, 5, 29, 37))
    assert model.training and [len(m._forward_hooks) for m in model.modules()] == hooks


# Pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_of_the_maps(tmp_path, channels):
    maps = {"layer1.block": torch.rand(2, 8, 10), "layer2.block": torch.rand(2, 4, 5)}
    pixels = torch.rand(2, channels, 29, 37)
    path = backbones.draw_maps(pixels, maps, tmp_path / "new" / "maps.png", titles=["a cat", "a dog"])
    assert path == tmp_path / "new" / "maps.png"
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 300 and picture.height > 200
        wide = picture.width
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 100
    one = backbones.draw_maps(pixels, {"layer1.block": maps["layer1.block"]}, str(tmp_path / "one.png"))
    with Image.open(one) as picture:
        assert picture.width < wide


@pytest.mark.parametrize("block", often(list_blocks()))
def test_a_picture_of_a_model(tmp_path, block):
    x = torch.rand(2, 3, 20, 44)
    maps = backbones.attention_maps(vit(block, dynamic_img_size=True), x)
    assert backbones.draw_maps(x, maps, tmp_path / f"{block}.png").stat().st_size > 5000


def test_a_position_is_drawn_where_it_is(tmp_path):
    """The brightest tile of the map is the brightest part of the picture."""
    values = torch.zeros(1, 2, 3)
    values[0, 0, 2] = 1  # top right
    path = backbones.draw_maps(torch.zeros(1, 3, 40, 60), {"m": values}, tmp_path / "m.png")
    with Image.open(path) as picture:
        light = numpy.asarray(picture.convert("L"), dtype=float)
    height, width = light.shape
    drawn = light[int(0.15 * height) : int(0.85 * height), width // 2 :]  # the map, without what is written around it
    dark = [[(part < 100).sum() for part in numpy.array_split(half, 2, axis=1)] for half in numpy.array_split(drawn, 2)]
    assert min(map(min, dark)) == dark[0][1]


def test_long_names_stay_in_the_picture_and_rows_close_up(tmp_path, monkeypatch):
    drawn, images = [], ["ILSVRC2012_val_00003351.JPEG,\nsays cat"] * 3
    monkeypatch.setattr(plt, "close", drawn.append)
    maps = {"stages.2.attn_rows_and_windows.block": torch.rand(3, 5, 7)}
    backbones.draw_maps(torch.rand(3, 3, 35, 35), maps, tmp_path / "m.png", images)
    (figure,) = drawn
    figure.draw_without_rendering()  # at its own resolution, no longer that of the file
    for text in [part for axis in figure.axes for part in (axis.title, axis.yaxis.label)]:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, text
    assert figure.axes[1].title.get_text().replace("\n", "") == "stages.2.attn_rows_and_windows"
    assert sum(axis.get_window_extent().height for axis in figure.axes[::2]) > 0.6 * figure.bbox.height
