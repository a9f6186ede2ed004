"""`backbones.export_onnx`: one file that gives the model's answers at any size, or an error and no file."""

import copy
import json
import tomllib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conftest import GATES, OPTIONS, alive, every_block, in_turn
from torch import nn
from torch.nn.utils import prune

import backbones
from backbones.export import describe_export
from vision_attn import create_layer, list_blocks

ROOT = Path(__file__).parents[2]
SIZES = [(1, 40, 28), (3, 52, 44), (2, 4, 60)]  # not among those that export_onnx itself tries


def vit(block, **args):
    return timm.create_model(f"vit_tiny_patch4_32_{block}", **{"depth": 1, "num_classes": 7, **args})


def resnet(block, **args):
    return timm.create_model(f"cifar_resnet20_{block}", **{"num_classes": 7, "attn_at": "layer3.2", **args})


def assert_same_answers(model, path, sizes=SIZES, channels=3):
    """The file against the model, in onnxruntime and without the code under test."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, *size in sizes:
        x = torch.randn(batch, channels, *size)
        (got,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(x), rtol=1e-4, atol=1e-5)


def shape_of_input(path):
    """Of the graph's input; a name where it is free."""
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


# Right graphs


def of_ones_own(block, attn_kwargs):
    return nn.Sequential(nn.Conv2d(3, 24, 4, 4), create_layer(block, 24, **attn_kwargs), nn.Conv2d(24, 7, 3, padding=1))


FREE = dict(dynamic_img_size=True)
# Once is enough of what a block repeats: each time makes the graph longer.
ONCE = {
    "binary_partition": {"levels": 1},
    "multiscale": {"kernel_size": 3, "scale_factor": 3, "levels": 1},
    "star": {"cycles": 1},
}
# Blocks that do not choose and whose graphs are short: most of the time of an export is the same for any graph.
SHORT = [
    "attention_free", "axial", "cbam", "collaborative", "dense", "efficient", "expectation_maximization", "fast_l2",
    "fixed", "fourier", "gaussian_prior", "global_context", "hand_crafted", "inducing_points", "light_non_local",
    "linear", "linformer", "low_rank", "luna", "memory_compressed", "performer", "random_features", "residual_logits",
    "single_head", "synthesizer", "talking_heads",
]  # fmt: skip
SHORT = [name for name in SHORT if name in list_blocks()]


def first_options_of(block):
    return OPTIONS.get(block, [{}])[0]


def hosts_of_blocks():
    """Every block in a small network, alone where its graph is long; in a ViT and a ResNet none."""
    for name in list_blocks():
        for host, make, args, quick in (
            ("of_ones_own", of_ones_own, {}, name not in (*SHORT, *ONCE)),
            ("once", of_ones_own, {}, name in ONCE),
            ("vit", vit, FREE, False),
            ("resnet", resnet, {}, False),
        ):
            options = ONCE.get(name) if host == "once" else first_options_of(name)
            if options is not None:
                marks = () if quick else pytest.mark.slow
                yield pytest.param(make, args, name, options, id=f"{host}-{name}", marks=marks)


def export_for_any_size(model, path):
    errors = backbones.export_onnx(model, path, image_size=(28, 36))
    assert len(errors) == 6 and all(0 <= error < 1e-4 for error in errors.values())
    assert all(height != 28 and width != 36 for _, height, width in list(errors)[1:])
    assert {(28, 36)}.isdisjoint(size[1:] for size in errors) and len({batch for batch, *_ in errors}) > 2
    assert shape_of_input(path) == ["batch", 3, "height", "width"]


@pytest.mark.parametrize("make, args, block, options", list(hosts_of_blocks()))
def test_every_block_exports_for_any_size(tmp_path, make, args, block, options):
    model = alive(make(block, attn_kwargs=options, **args)).eval()
    export_for_any_size(model, tmp_path / "m.onnx")
    assert_same_answers(model, tmp_path / "m.onnx")


class SideBySide(nn.Module):
    """Blocks on the features of one convolution, each with an output of its name."""

    def __init__(self, blocks):
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 4, 4)
        self.layers = nn.ModuleDict({block: create_layer(block, 24, **first_options_of(block)) for block in blocks})

    def forward(self, x):
        x = self.conv(x)
        return {block: layer(x) for block, layer in self.layers.items()}


@pytest.mark.parametrize("blocks", [SHORT[start : start + 4] for start in range(0, len(SHORT), 4)], ids="-".join)
def test_blocks_with_short_graphs_export_side_by_side(tmp_path, blocks):
    model = alive(SideBySide(blocks)).eval()
    assert not any(hasattr(module, "choose") for module in model.modules())  # which would be given three tries
    try:
        export_for_any_size(model, tmp_path / "m.onnx")
    except backbones.ExportError as error:
        for block in blocks:
            error.add_note(f"{block} alone: {exports_alone(block, tmp_path)}")
        raise
    assert_outputs(model, tmp_path / "m.onnx", blocks)


def exports_alone(block, folder):
    try:
        export_for_any_size(alive(of_ones_own(block, first_options_of(block))).eval(), folder / f"{block}.onnx")
    except backbones.ExportError as error:
        return error
    return "right"


def test_of_blocks_side_by_side_the_wrong_one_is_named(tmp_path, monkeypatch):
    right, wrong = SHORT[:2]
    kind = type(create_layer(wrong, 24).block)

    def export(model, path):
        if any(isinstance(module, kind) for module in model.modules()):
            raise backbones.ExportError("not right")

    monkeypatch.setitem(globals(), "export_for_any_size", export)
    with pytest.raises(backbones.ExportError) as failure:
        test_blocks_with_short_graphs_export_side_by_side(tmp_path, [right, wrong])
    assert failure.value.__notes__ == [f"{right} alone: right", f"{wrong} alone: not right"]


@pytest.mark.parametrize("block", ["adaptive_span", pytest.param("global_local", marks=pytest.mark.slow)])
def test_one_tile_when_traced_may_be_several(tmp_path, block):
    """What torch then says of shapes is wrong, and onnxruntime must not believe it."""
    model = alive(vit(block, dynamic_img_size=True)).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(20, 28))
    assert_same_answers(model, tmp_path / "m.onnx", [(1, 36, 44), (2, 68, 20)])


@pytest.mark.slow
@in_turn(
    {
        "block": list_blocks(),
        "name, args": [("resnet18", {}), ("vit_tiny_patch4_32", dict(depth=2, dynamic_img_size=True))],
        "gains": ["new", "trained"],
    },
    rest=False,
)
def test_every_block_in_its_usual_places(tmp_path, block, name, args, gains):
    model = timm.create_model(f"{name}_{block}", num_classes=7, **args).eval()
    if gains == "trained":
        alive(model).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(64, 96))
    assert_same_answers(model, tmp_path / "m.onnx", [(1, 40, 100), (3, 132, 44)])


@pytest.mark.slow
@every_block
def test_layers_inserted_in_a_window_attention_export(tmp_path, block):
    args = dict(img_size=56, depths=(1,), embed_dim=48, num_heads=(3,))
    model = timm.create_model("swin_tiny_patch4_window7_224", **args)
    alive(backbones.insert(model, block)).eval()
    assert set(backbones.export_onnx(model, tmp_path / "m.onnx")) == {(b, 56, 56) for b in (1, 3, 4, 5, 7, 8)}


def test_a_vit_of_one_size_exports_for_any_batch(tmp_path):
    model = alive(vit("dense", img_size=(20, 28))).eval()
    errors = backbones.export_onnx(model, tmp_path / "m.onnx", dynamic=True)
    assert {size[1:] for size in errors} == {(20, 28)} and len(errors) == 6 and 2 not in {size[0] for size in errors}
    free, *fixed = shape_of_input(tmp_path / "m.onnx")
    assert isinstance(free, str) and fixed == [3, 20, 28]
    assert_same_answers(model, tmp_path / "m.onnx", [(2, 20, 28), (11, 20, 28)])


def test_one_size_on_request(tmp_path):
    model = alive(resnet("dense", in_chans=1)).eval()
    errors = backbones.export_onnx(model, str(tmp_path / "new" / "folder" / "m.onnx"), image_size=23, dynamic=False)
    assert {size[1:] for size in errors} == {(23, 23)}
    free, *fixed = shape_of_input(tmp_path / "new/folder/m.onnx")
    assert isinstance(free, str) and fixed == [1, 23, 23]
    assert_same_answers(model, tmp_path / "new/folder/m.onnx", [(2, 23, 23)], channels=1)


@pytest.mark.parametrize("opset", [18, pytest.param(20, marks=pytest.mark.slow), 23])  # 20 is everywhere else
def test_opsets(tmp_path, opset):
    model = alive(vit("dense", dynamic_img_size=True)).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", opset=opset)
    written = onnx.load(tmp_path / "m.onnx")
    assert {one.domain: one.version for one in written.opset_import}[""] == opset
    assert (opset == 23) == any(node.op_type == "Attention" for node in written.graph.node)
    assert_same_answers(model, tmp_path / "m.onnx")


@pytest.mark.parametrize("opset, error, said", [(99, ValueError, "opset=99: .* wrote"), (27, Exception, "opset|load")])
def test_an_opset_that_is_not_known_leaves_no_file(tmp_path, opset, error, said):
    with pytest.raises(error, match=said) as failure:
        backbones.export_onnx(nn.Conv2d(3, 5, 3), tmp_path / "m.onnx", image_size=29, opset=opset)
    assert isinstance(failure.value, (ValueError, backbones.ExportError)) and not list(tmp_path.iterdir())


def test_a_new_layer_is_exported_as_it_is_and_the_model_is_left_alone(tmp_path):
    """Random gains are for the check alone."""
    model = nn.Sequential(
        nn.Conv2d(3, 24, 4, 4), nn.BatchNorm2d(24), create_layer("dense", 24), nn.Conv2d(24, 7, 3, padding=1)
    )
    model.train()[-1].eval()
    before, modes = copy.deepcopy(model.state_dict()), {m: m.training for m in model.modules()}
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(28, 36))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {m: m.training for m in model.modules()} == modes and all(p.grad is None for p in model.parameters())
    assert_same_answers(copy.deepcopy(model).eval(), tmp_path / "m.onnx")


def test_one_file_with_the_weights_in_it(tmp_path):
    model = alive(vit("dense")).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").stat().st_size > sum(4 * p.numel() for p in model.parameters())
    weights = onnx.load(tmp_path / "m.onnx", load_external_data=False).graph.initializer
    assert not any(weight.external_data for weight in weights)


# Several outputs


def assert_outputs(model, path, names, sizes=SIZES):
    """Of a model that gives a flat dict or list of tensors. Errors are shares of an output's norm: some are near 0."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == names
    assert {output.shape[0] for output in session.get_outputs()} == {"batch"}
    for batch, *size in sizes:
        x = torch.randn(batch, 3, *size)
        wanted = model(x)
        wanted = wanted.values() if isinstance(wanted, dict) else wanted
        for got, right in zip(session.run(names, {"image": x.numpy()}), wanted, strict=True):
            assert (torch.from_numpy(got) - right).norm() < 1e-5 * right.norm()


def test_a_list_of_features(tmp_path):
    model = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 4))
    alive(backbones.insert(model, GATES[0], "layer1")).eval()
    errors = backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(36, 44))
    assert len(errors) == 6 and max(errors.values()) < 1e-4
    assert_outputs(model, tmp_path / "m.onnx", ["output_0", "output_1", "output_2"])


def segmentation(aux):
    features = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    layers = {"layer4": "out", "layer3": "aux"} if aux else {"layer4": "out"}
    heads = torchvision.models.segmentation.fcn
    backbone = torchvision.models._utils.IntermediateLayerGetter(features, layers)
    return heads.FCN(backbone, heads.FCNHead(512, 5), heads.FCNHead(256, 5) if aux else None)


@pytest.mark.parametrize("aux", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_dict_of_segmentations(tmp_path, aux):
    model = alive(backbones.insert(segmentation(aux), GATES[0], "backbone.layer2", input_size=(3, 64, 64))).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(45, 61))
    assert_outputs(model, tmp_path / "m.onnx", ["out", "aux"] if aux else ["out"])


@pytest.mark.slow
def test_torchvisions_segmentation_model(tmp_path):
    model = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=5, aux_loss=True
    )
    alive(backbones.insert(model, GATES[0], "backbone.layer3", input_size=(3, 64, 64))).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(45, 61))
    assert_outputs(model, tmp_path / "m.onnx", ["out", "aux"])


class Several(nn.Module):
    """A small network that gives ``outputs(features)``."""

    def __init__(self, outputs):
        super().__init__()
        self.conv, self.outputs = nn.Conv2d(3, 5, 3, padding=1), outputs

    def forward(self, x):
        return self.outputs(self.conv(x))


def test_outputs_may_be_called_like_what_is_inside(tmp_path):
    model = Several(lambda x: {"conv2d": x.relu(), "relu": x.tanh(), "conv2d_0": 2 * x}).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(20, 28))
    assert_outputs(model, tmp_path / "m.onnx", ["conv2d", "relu", "conv2d_0"])


def test_branches_know_the_names_of_outputs(tmp_path):
    def outputs(x):
        relu = x.relu()
        (scaled,) = torch.cond(x.sum() > 0, lambda r: (r * 2,), lambda r: (r / 3,), (relu,))
        return {"conv2d": scaled, "relu": relu}

    model = Several(outputs).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(20, 28))
    assert_outputs(model, tmp_path / "m.onnx", ["conv2d", "relu"])


def test_outputs_inside_outputs(tmp_path):
    def outputs(x):
        return {"maps": (x, [x.relu(), x.mean((2, 3))]), "labels": x.argmax(1), "7": x.exp()}

    model = Several(outputs).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(29, 31))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = ["maps_0", "maps_1_0", "maps_1_1", "labels", "output_7"]
    assert [output.name for output in session.get_outputs()] == names
    x = torch.randn(3, 3, 17, 23)
    maps, labels, exp = model(x).values()
    for got, right in zip(session.run(names, {"image": x.numpy()}), (maps[0], *maps[1], labels, exp), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), right, rtol=1e-4, atol=1e-5)


def test_an_output_that_is_called_as_the_input_is_goes_by_another_name(tmp_path):
    """As in networks that restore an image."""
    model = Several(lambda x: {"image": x.exp(), "depth": {"image": x.mean(1)}}).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(29, 31))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["output_image", "depth_image"]
    x = torch.randn(3, 3, 17, 23)
    given = model(x)
    for got, right in zip(session.run(None, {"image": x.numpy()}), (given["image"], given["depth"]["image"])):
        torch.testing.assert_close(torch.from_numpy(got), right, rtol=1e-4, atol=1e-5)


def test_every_output_is_compared(tmp_path):
    def outputs(x):
        return x, x * int((x.shape[2] * x.shape[3]) ** 0.5)

    with pytest.raises(backbones.ExportError, match="differs from PyTorch by .* in output_1"):
        backbones.export_onnx(Several(outputs).eval(), tmp_path / "m.onnx", image_size=(29, 31))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "output, said", [("a word", "str as output"), ({"a": 3}, "int as a"), ([None], "NoneType as output_0")]
)
def test_what_is_no_tensor_is_named(tmp_path, output, said):
    with pytest.raises(ValueError, match=f"model: gives {said}, must give nothing but tensors"):
        backbones.export_onnx(Several(lambda x: output).eval(), tmp_path / "m.onnx", image_size=29)


def test_two_outputs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="model: gives two tensors that would both be called maps_0"):
        backbones.export_onnx(Several(lambda x: {"maps": [x], "maps_0": x}).eval(), tmp_path / "m.onnx", image_size=29)


def found():
    """Gives what a detector gives: boxes, labels and scores of each image."""
    return Several(lambda x: [dict(boxes=one[0], labels=one[1], scores=one[2]) for one in x])


def detector():
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    return torchvision.models.detection.FasterRCNN(backbone, num_classes=5)


@pytest.mark.parametrize(
    "make, name", [(found, "Several"), pytest.param(detector, "FasterRCNN", marks=pytest.mark.slow)]
)
def test_a_detector_is_refused_in_a_line(tmp_path, make, name):
    with pytest.raises(ValueError, match=rf"model={name}: gives 3 tensors for one image and 6 for two.*backbone\)$"):
        backbones.export_onnx(make(), tmp_path / "m.onnx", image_size=64)


@pytest.mark.slow
def test_the_backbone_of_a_detector(tmp_path):
    backbone = detector().backbone
    alive(backbones.insert(backbone, GATES[0], "body.layer2", input_size=(3, 64, 64))).eval()
    backbones.export_onnx(backbone, tmp_path / "m.onnx", image_size=(64, 96))
    assert_outputs(backbone, tmp_path / "m.onnx", ["output_0", "output_1", "output_2", "output_3", "pool"])


def test_a_pruned_model_says_what_to_do_first(tmp_path):
    model, x = Several(torch.relu).eval(), torch.randn(2, 3, 29, 31)
    prune.l1_unstructured(model.conv, "weight", amount=0.3)
    wanted = model(x)
    with pytest.raises(ValueError, match=r"^model=Several: is pruned, .*prune.remove\(module, name\)$"):
        backbones.export_onnx(model, tmp_path / "m.onnx", image_size=29)
    prune.remove(model.conv, "weight")
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=29)
    assert torch.equal(model(x), wanted)
    assert_same_answers(model, tmp_path / "m.onnx", [(2, 40, 28)])


def test_what_torch_can_not_export_is_said_in_a_line(tmp_path):
    def outputs(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(backbones.ExportError, match="torch .* can't export Several: ") as failure:
        backbones.export_onnx(Several(outputs).eval(), tmp_path / "m.onnx", image_size=29)
    assert len(str(failure.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def properties(path):
    return {prop.key: json.loads(prop.value) for prop in onnx.load(path).metadata_props}


def test_the_file_says_what_it_is(tmp_path):
    model = alive(resnet("cbam")).eval()
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(28, 36), metadata={"class_names": ["a", "b"]})
    config = model.pretrained_cfg
    assert properties(tmp_path / "m.onnx") == {
        "model": "cifar_resnet20_cbam",
        "blocks": ["cbam"],
        "image_size": [28, 36],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "num_classes": 7,
        "vision_attn": tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"],
        "precision": "fp32",
        "class_names": ["a", "b"],
    }


@every_block
def test_the_file_names_its_block_and_not_what_it_is_made_of(block):
    assert describe_export(resnet(block), (28, 36))["blocks"] == [block]


@pytest.mark.slow
@in_turn(
    {
        "block": list_blocks(),
        "precision, opset": [("fp16", 23), ("int8", 20)],
        "make, args": [(resnet, {}), (vit, FREE)],
    },
    rest=False,
)
def test_every_block_in_a_smaller_file(tmp_path, block, precision, opset, make, args):
    """`export_onnx` compares the answers at six sizes."""
    model = alive(make(block, **args)).eval()
    errors = backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(28, 36), precision=precision, opset=opset)
    assert len(errors) == 6 and (tmp_path / "m.onnx").is_file()


@in_turn(
    {
        "precision, share, error": [("fp16", 0.7, 0.02), ("int8", 0.5, 0.2)],
        "make, args": [pytest.param(resnet, {}, marks=pytest.mark.slow), (vit, FREE)],
        "block": ["cbam", "criss_cross"],
    }
)
def test_smaller_files_keep_the_answers(tmp_path, precision, share, error, make, args, block):
    """cbam uses the weights of its perceptron twice, which onnxruntime's own quantiser turns around twice."""
    model = alive(make(block, **args)).eval()
    backbones.export_onnx(model, tmp_path / f"{precision}.onnx", image_size=(28, 36), precision=precision)
    weights = onnx.load(tmp_path / f"{precision}.onnx").graph.initializer
    in_float32 = sum(4 * p.numel() for p in model.parameters())
    assert sum(onnx.numpy_helper.to_array(weight).nbytes for weight in weights) < share * in_float32
    session = onnxruntime.InferenceSession(tmp_path / f"{precision}.onnx", providers=["CPUExecutionProvider"])
    for batch, *size in SIZES:
        x = torch.randn(batch, 3, *size)
        (got,), wanted = session.run(None, {"image": x.numpy()}), model(x)
        assert got.dtype == np.float32
        assert (torch.from_numpy(got) - wanted).abs().max() < error * wanted.abs().max()


class Cubes(nn.Module):
    """Layers that cube features, behind gains of zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.gains = nn.Conv2d(3, 5, 3, padding=1), nn.Parameter(torch.zeros(8))

    def forward(self, x):
        x = self.conv(x)
        for gain in self.gains:
            x = x + gain * x**3
        return x


def test_gains_for_the_check_let_no_answers_run_away(tmp_path):
    torch.manual_seed(0)
    errors = backbones.export_onnx(Cubes().eval(), tmp_path / "m.onnx", image_size=(29, 31))
    assert all(error < 1e-4 for error in errors.values())


# Wrong graphs


class Wrong(nn.Module):
    """A layer whose graph holds for the traced size alone, behind a gain."""

    def __init__(self, gain=0.0, size=1.0):
        super().__init__()
        self.conv, self.gain, self.size = nn.Conv2d(3, 5, 3, padding=1), nn.Parameter(torch.full((1,), gain)), size

    def forward(self, x):
        x = self.conv(x)
        return self.size * (x + self.gain * self.update(x))


class RootOfSize(Wrong):
    def update(self, x):
        return x * int((x.shape[2] * x.shape[3]) ** 0.5) / 30


class OddOrEven(Wrong):
    def update(self, x):
        return 2 * x if x.shape[2] % 2 else x


class OwnPathForExport(Wrong):
    def update(self, x):
        return x / (29 if torch.compiler.is_exporting() else x.shape[2])


class FixedPooling(Wrong):
    def update(self, x):
        return F.interpolate(F.adaptive_avg_pool2d(x, 2), size=x.shape[2:])


@in_turn({"wrong": [RootOfSize, OddOrEven, OwnPathForExport, FixedPooling], "gain": [0.0, 0.5]})
def test_a_wrong_graph_is_an_error_and_leaves_no_file(tmp_path, wrong, gain):
    """Also where the layer's gain is still zero, so that the wrong part does not show in the output."""
    model = wrong(gain).eval()
    with pytest.raises(backbones.ExportError, match=r"at \(batch, height, width\) = .* onnxruntime"):
        backbones.export_onnx(model, tmp_path / "m.onnx", image_size=(29, 31))
    assert not list(tmp_path.iterdir())
    assert model.gain.item() == gain


def test_a_wrong_graph_of_small_outputs_is_an_error(tmp_path):
    """As of a model that ends in a softmax over many classes."""
    with pytest.raises(backbones.ExportError):
        backbones.export_onnx(OddOrEven(0.5, size=1e-5), tmp_path / "m.onnx", image_size=(29, 31))


class AtATie(nn.Module):
    """Gives what its graph gives in one call of ``period``, as near a tie."""

    def __init__(self, period):
        super().__init__()
        self.conv, self.period, self.calls = nn.Conv2d(3, 5, 3, padding=1), period, 0

    def forward(self, x):
        x = self.conv(x)
        if torch.compiler.is_exporting():
            return x
        self.calls += 1
        return x + int(self.calls % self.period > 0)


class Chooses(AtATie):
    def choose(self):
        """That it is there says that ties are possible."""


def test_what_chooses_may_choose_otherwise_at_a_tie_but_not_for_three_batches(tmp_path):
    assert len(backbones.export_onnx(Chooses(3).eval(), tmp_path / "m.onnx", image_size=(29, 31))) == 6
    for model in (Chooses(4), AtATie(3)):
        with pytest.raises(backbones.ExportError, match="differs from PyTorch"):
            backbones.export_onnx(model.eval(), tmp_path / "m.onnx", image_size=(29, 31))


def test_a_failed_export_keeps_what_was_there(tmp_path):
    (tmp_path / "m.onnx").write_text("an earlier file")
    with pytest.raises(backbones.ExportError):
        backbones.export_onnx(OddOrEven(), tmp_path / "m.onnx", image_size=(29, 31))
    assert (tmp_path / "m.onnx").read_text() == "an earlier file" and len(list(tmp_path.iterdir())) == 1


# Bad arguments


@pytest.mark.parametrize("opset", [17, 0, -1, "20", 20.0, None, True])
def test_a_wrong_opset_is_named(tmp_path, opset):
    with pytest.raises(ValueError, match=f"opset={opset!r}"):
        backbones.export_onnx(resnet("dense"), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["fp64", "int4", None, 8])
def test_a_wrong_precision_is_named(tmp_path, precision):
    with pytest.raises(ValueError, match=f"precision={precision!r}: must be one of 'fp32', 'fp16', 'int8'"):
        backbones.export_onnx(resnet("dense"), tmp_path / "m.onnx", precision=precision)
    assert not list(tmp_path.iterdir())


class Ones(Wrong):
    """Wrong where a norm's weight is not 1."""

    def __init__(self):
        super().__init__(0.5)
        self.weight = nn.Parameter(torch.ones(1))

    def update(self, x):
        return x * (1 + self.weight.log() * int((x.shape[2] * x.shape[3]) ** 0.5))


def test_a_wrong_graph_behind_a_new_norm_is_an_error(tmp_path):
    with pytest.raises(backbones.ExportError):
        backbones.export_onnx(Ones().eval(), tmp_path / "m.onnx", image_size=(29, 31), dynamic=True)


class LayerScale(Wrong):
    """Wrong where a gain for each channel is not nearly zero."""

    def __init__(self):
        super().__init__(0.5)
        self.scale = nn.Parameter(torch.full((5, 1, 1), 1e-5))

    def update(self, x):
        return self.scale * x * int((x.shape[2] * x.shape[3]) ** 0.5)


def test_a_wrong_graph_behind_a_small_gain_for_each_channel_is_an_error(tmp_path):
    with pytest.raises(backbones.ExportError):
        backbones.export_onnx(LayerScale().eval(), tmp_path / "m.onnx", image_size=(29, 31))


def test_a_size_to_try_that_the_model_does_not_take_is_named(tmp_path):
    model = Several(lambda x: F.avg_pool2d(x, 27)).eval()
    with pytest.raises(ValueError, match=r"^image_size: .* 24×36, .*dynamic=False"):
        backbones.export_onnx(model, tmp_path / "m.onnx", image_size=29)
    assert not list(tmp_path.iterdir())
    backbones.export_onnx(model, tmp_path / "m.onnx", image_size=29, dynamic=False)


@pytest.mark.parametrize("size", [0, -32, (32,), (32, 0), (3, 32, 32), "32", "ab", 32.0, (32.0, 32)])
def test_a_wrong_image_size_is_named(tmp_path, size):
    with pytest.raises(ValueError, match="image_size="):
        backbones.export_onnx(resnet("dense"), tmp_path / "m.onnx", image_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [30, (32, 33), (64, 32)])
def test_an_image_size_that_the_model_does_not_take_is_named(tmp_path, size):
    with pytest.raises(ValueError, match="image_size="):
        backbones.export_onnx(vit("dense"), tmp_path / "m.onnx", image_size=size)
    assert not list(tmp_path.iterdir())
