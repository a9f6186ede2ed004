"""`backbones.yolo.trainer`: blocks outlast everything that is done with a YOLO network, and its weights are kept.

An engine of this file does what ultralytics does: it trains another network, made from the rows that the first was made
from, and saves networks whole. ultralytics itself is tried where it is installed.
"""

import copy
import io
import pickletools
import sys
import zipfile

import pytest
import torch
from conftest import GATES, MIXERS, alive
from host_models import JoinedViT, layers
from test_offers import Heads
from test_places import Bottleneck, Conv, Yolo
from torch import nn

import backbones
from backbones.yolo import trainer
from vision_attn import layer

SIZE = (3, 52, 76)
BLOCKS = [GATES[0], "criss_cross" if "criss_cross" in MIXERS else MIXERS[0]]
ROWS = [(Conv, (3, 8, 3, 2)), (Conv, (8, 12, 3, 2)), (Bottleneck, (12,)), (Conv, (12, 16))]


class Network(nn.Module):
    """As ultralytics builds one: from rows, which it keeps."""

    def __init__(self, rows):
        super().__init__()
        self.yaml = rows
        self.model = nn.Sequential(*(kind(*args) for kind, args in rows))
        for i, row in enumerate(self.model):
            row.i, row.f = i, -1

    def forward(self, x):
        for row in self.model:
            x = row(x)
        return x

    def load(self, weights):
        own, theirs = self.state_dict(), weights.float().state_dict()
        self.load_state_dict({key: theirs[key] for key in own if key in theirs}, strict=False)

    def fuse(self):
        return Yolo.fuse(self)


class Engine:
    def __init__(self):
        self.seen = None  # the network before its first step

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = Network(cfg)
        if weights is not None:
            model.load(weights)
        return model

    def train(self, network):
        """A file with the trained network in half precision."""
        model = self.get_model(cfg=network.yaml, weights=network, verbose=False).train()
        self.seen = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(2, *SIZE)).square().mean().backward()
            optimizer.step()
        file = io.BytesIO()
        torch.save(dict(model=copy.deepcopy(model).half()), file)
        return file


def loaded(file):
    file.seek(0)
    return torch.load(file, weights_only=False)["model"].float().eval()


def blocks_of(model):
    return {key: value for key, value in model.state_dict().items() if ".attn_" in key}


def test_the_engine_alone_drops_blocks():
    network = Network(ROWS)
    backbones.insert(network, GATES[0], "model.*", input_size=SIZE)
    assert blocks_of(network) and not blocks_of(loaded(Engine().train(network)))


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_outlast_training_saving_and_training_again(block):
    stock = alive(Network(ROWS))
    kind = trainer(block, "model.[123]", base=Engine, input_size=SIZE)
    assert issubclass(kind, Engine)
    first, second = kind(), kind()
    once = loaded(first.train(stock))
    assert all(torch.equal(first.seen.state_dict()[key], value) for key, value in stock.state_dict().items())
    names = [f"model.{i}.attn_{block}" for i in (1, 2, 3)]
    assert list(layers(once)) == names and all(one.gain.item() for one in layers(once).values())
    twice = loaded(second.train(once))
    assert all(torch.equal(second.seen.state_dict()[key], value) for key, value in once.state_dict().items())
    assert list(layers(twice)) == names


@pytest.mark.parametrize("block", BLOCKS)
def test_a_loaded_network_is_fused(block):
    model = loaded(trainer(block, "model.*", base=Engine, input_size=SIZE)().train(Network(ROWS)))
    x = torch.randn(1, *SIZE)
    with torch.no_grad():
        wanted = model(x)
        fused = model.fuse()
        assert len(layers(fused)) == 4
        torch.testing.assert_close(fused(x), wanted, rtol=1e-3, atol=1e-4)


def test_a_wrong_place_is_told_when_the_network_is_built():
    with pytest.raises(
        ValueError, match=r"at='model.9': matches no module of Network; what could match: model, model.\*"
    ):
        trainer(GATES[0], "model.9", base=Engine, input_size=SIZE)().train(Network(ROWS))


# What is saved


HOSTS = {
    "map": lambda block: backbones.insert(Network(ROWS), block, "model.*", input_size=SIZE),
    "tokens": lambda block: backbones.insert(JoinedViT(), block, "encoder.layer.*"),
    "replaced": lambda block: backbones.replace(JoinedViT(), MIXERS[0]).model,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("block", BLOCKS)
def test_saved_models_name_vision_attn_and_no_other_room(host, block, monkeypatch):
    file = io.BytesIO()
    torch.save(HOSTS[host](block), file)
    with zipfile.ZipFile(file) as parts:
        (name,) = (name for name in parts.namelist() if name.endswith("data.pkl"))
        steps = list(pickletools.genops(parts.read(name)))
    named = {arg.partition(" ")[0].partition(".")[0] for step, arg, _ in steps if step.name == "GLOBAL"}
    assert "vision_attn" in named and not named & {"backbones", "training"}
    for module in [module for module in sys.modules if module.partition(".")[0] == "backbones"]:
        monkeypatch.setitem(sys.modules, module, None)
    file.seek(0)
    assert isinstance(torch.load(file, weights_only=False), nn.Module)
    for module in [module for module in sys.modules if module.partition(".")[0] == "vision_attn"]:
        monkeypatch.setitem(sys.modules, module, None)
    file.seek(0)
    with pytest.raises(ModuleNotFoundError, match="vision_attn"):
        torch.load(file, weights_only=False)


# What such a network is asked


@pytest.mark.parametrize("block", BLOCKS)
def test_classes_of_layers_go_in_as_their_blocks_do(block):
    model, x = alive(Heads()).eval(), torch.randn(1, *SIZE)
    wanted = model(x)
    options = {} if block in GATES else dict(num_heads=2)
    backbones.insert(model, layer(block, init_gain=0.5, **options), "model.[25]", input_size=SIZE)
    assert [one.gain.item() for one in layers(model).values()] == [0.5, 0.5]
    assert all(one.block.num_heads == 2 for one in layers(model).values() if options)
    assert not torch.equal(model(x)[0], wanted[0])
    vit = JoinedViT()
    report = backbones.replace(vit, layer(BLOCKS[1], num_heads=2))
    assert report.copied and vit.encoder.layer[0].attention.num_heads == 2


class PSABlock(nn.Module):
    """Attention by convolutions, as YOLO11 has it."""

    def __init__(self):
        super().__init__()
        self.attn = nn.Conv2d(16, 16, 1)


def test_replace_tells_what_attention_there_is():
    one, two = (Network([*ROWS, *[(PSABlock, ())] * count]) for count in (1, 2))
    with pytest.raises(ValueError, match=r"no attention that can be replaced; .* another kind: model\.4 \(PSABlock\)$"):
        backbones.replace(one, "dense", input_size=SIZE)
    with pytest.raises(ValueError, match=r"another kind: model\.4 \(PSABlock, and 1 more\)$"):
        backbones.replace(two, "dense", input_size=SIZE)
    with pytest.raises(ValueError, match="^model=Yolo: has no attention that can be replaced$"):
        backbones.replace(Yolo(), "dense", input_size=SIZE)


# ultralytics itself


@pytest.fixture
def boxes(tmp_path):
    """Eight pictures of a box, and the YAML file that names them."""
    draw = pytest.importorskip("PIL.ImageDraw")
    from PIL import Image

    for part in ("images", "labels"):
        (tmp_path / part).mkdir()
    for i in range(8):
        picture = Image.new("RGB", (96, 64), (120, 120, 120))
        draw.Draw(picture).rectangle((4 * i, 2 * i, 4 * i + 20, 2 * i + 16), fill=(250, 0, 0))
        picture.save(tmp_path / "images" / f"{i}.png")
        middle = (4 * i + 10) / 96, (2 * i + 8) / 64
        (tmp_path / "labels" / f"{i}.txt").write_text(f"0 {middle[0]} {middle[1]} {20 / 96} {16 / 64}\n")
    file = tmp_path / "boxes.yaml"
    file.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: [box]\n")
    return file


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_ultralytics(block, boxes, tmp_path, monkeypatch):
    for name, value in (("OFFLINE", "true"), ("AUTOINSTALL", "false"), ("CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(f"YOLO_{name}", value)
    ultralytics = pytest.importorskip("ultralytics")
    args = dict(data=str(boxes), imgsz=64, workers=0, plots=False, project=str(tmp_path), device="cpu", verbose=False)
    fit = dict(args, epochs=1, batch=4, amp=False, exist_ok=True, optimizer="SGD")
    stock = ultralytics.YOLO("yolo11n.yaml").model
    names, x = list(stock.state_dict()), torch.randn(1, 3, 64, 96)
    wanted = stock.eval()(x)[0]
    backbones.insert(stock, block, "model.*")
    assert torch.equal(stock(x)[0], wanted) and set(names) <= stock.state_dict().keys() and len(layers(stock)) == 23
    with pytest.raises(
        ValueError, match=r"model.10 \(C2PSA\), model.10.m.0 \(PSABlock\), model.10.m.0.attn \(Attention\)$"
    ):
        backbones.replace(stock, "dense")
    yolo, kind = ultralytics.YOLO("yolo11n.yaml"), trainer(block, "model.[468]")
    yolo.train(trainer=kind, name="first", **fit)
    assert len(layers(yolo.model)) == 3
    file = tmp_path / "first" / "weights" / "last.pt"
    again, seen = ultralytics.YOLO(file), {}
    kept = {key: value.clone().float() for key, value in blocks_of(again.model).items()}
    assert any(value.any() for key, value in kept.items() if key.endswith("gain"))
    again.val(**args)
    assert len(again.predict(str(boxes.parent / "images" / "0.png"), imgsz=64, device="cpu", verbose=False)) == 1

    class Watched(kind):
        def get_model(self, *args, **kwargs):
            model = super().get_model(*args, **kwargs)
            seen.update({key: value.clone() for key, value in blocks_of(model).items()})
            return model

    again = ultralytics.YOLO(file)
    again.train(trainer=Watched, name="second", **fit)
    assert seen.keys() == kept.keys() and all(torch.equal(seen[key], kept[key]) for key in kept)
    assert len(layers(again.model)) == 3
    exported = ultralytics.YOLO(file).export(format="torchscript", imgsz=64, device="cpu")
    plain = ultralytics.YOLO(file).model.float().eval()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.load(exported)(x), plain(x)[0], rtol=1e-3, atol=1e-2)
