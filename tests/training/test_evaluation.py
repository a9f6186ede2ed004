"""--eval: model, images and their size are the checkpoint's; what is given wins where it can, else it is refused."""

import json
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from pictures import make_folder, make_shards
from PIL import Image
from safetensors.torch import save_file
from scripts import PIXELS, load, options
from timm.data import create_transform
from timm.models.vision_transformer import checkpoint_filter_fn

import backbones
from training import checkpoint
from training.classification import Classification
from training.trained import open_trained

TINY = options(model__name="cifar_resnet20", data__img_size=11, batch_size=8, threads=1, epochs=1)
VIT = options(model__name="vit_tiny_patch4_32_criss_cross", data__img_size=12, batch_size=8, threads=1, epochs=1)
VIT += options(model__args='{"embed_dim": 24, "depth": 2, "num_heads": 2}')
OWN = dict(mean=[0.4, 0.3, 0.2], std=[0.2, 0.3, 0.4], crop_pct=0.8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), ("ant", "bee", "cow"), images=5)


def trained(script, path, *argv):
    assert load(script).main([*argv, *options(output=path)]) == 0
    return path / "best.pt"


@pytest.fixture(scope="module")
def resnet(photos, tmp_path_factory):
    given = options(**{f"data__{name}": value for name, value in OWN.items()})
    return trained("train_imagenet", tmp_path_factory.mktemp("resnet"), *TINY, *given, *options(data__dir=photos))


@pytest.fixture(scope="module")
def vit(photos, tmp_path_factory):
    return trained("train_imagenet", tmp_path_factory.mktemp("vit"), *VIT, *options(data__dir=photos))


def evaluated(path, capsys, *argv, script="train_imagenet"):
    """The first line, and the loss or bits, of an evaluation."""
    capsys.readouterr()
    assert load(script).main(["--eval", str(path), "--threads", "1", *argv]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    return first, float(re.match(r"(?:loss|bits_per_dim) (\S+)", last)[1])


def refused(path, capsys, *argv, script="train_imagenet"):
    """The one line with which an evaluation is refused."""
    capsys.readouterr()
    try:
        assert load(script).main(["--eval", str(path), "--threads", "1", *argv]) == 2
    except SystemExit as exit:
        assert exit.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@torch.no_grad()
def loss_of(model, photos, size, mean, std, crop_pct, interpolation="bicubic"):
    """The same from timm's own transform."""
    prepare = create_transform(size, mean=mean, std=std, crop_pct=crop_pct, interpolation=interpolation)
    paths = [photos / "val" / name / f"{i}.png" for name in ("ant", "bee", "cow") for i in range(5)]
    images = torch.stack([prepare(Image.open(path)) for path in paths])
    return F.cross_entropy(model(images), torch.arange(3).repeat_interleave(5)).item()


def test_the_checkpoint_says_it_all(resnet, photos, capsys):
    first, loss = evaluated(resnet, capsys)
    assert first == f"{resnet}: cifar_resnet20, input 3×11×11, 3 classes; folder {photos}: 15 to evaluate"
    assert loss == pytest.approx(checkpoint.load(resnet)["metrics"]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    "given", [dict(img_size=17), dict(mean=[0.1, 0.2, 0.3]), dict(std=[0.5, 0.6, 0.7]), dict(crop_pct=1.0)]
)
@pytest.mark.parametrize("in_file", [False, True])
def test_size_and_normalisation_given_win(given, in_file, resnet, photos, tmp_path, capsys):
    ((name, value),) = given.items()
    (tmp_path / "c.yaml").write_text(f"data:\n  {name}: {value}\n")
    first, loss = evaluated(
        resnet, capsys, *(options(config=tmp_path / "c.yaml") if in_file else options(**{f"data__{name}": value}))
    )
    saved = checkpoint.load(resnet)
    model = timm.create_model("cifar_resnet20", num_classes=3).eval()
    model.load_state_dict(saved["state_dict"])
    side = given.get("img_size", 11)
    assert f"input 3×{side}×{side}," in first
    rest = {name: value for name, value in (OWN | given).items() if name != "img_size"}
    assert loss == pytest.approx(loss_of(model, photos, (side, side), **rest), abs=2e-4)
    assert abs(loss - saved["metrics"]["loss"]) > 1e-3


@pytest.mark.parametrize("given", [dict(data__img_size=20), dict(model__args__img_size=20)])
def test_a_vit_is_tested_at_another_size_by_its_resized_embedding(given, vit, photos, capsys):
    first, loss = evaluated(vit, capsys, *options(**given))
    assert "input 3×20×20," in first
    saved = checkpoint.load(vit)
    model = timm.create_model(saved["model"], **saved["model_args"] | {"img_size": 20}).eval()
    model.load_state_dict(checkpoint_filter_fn(saved["state_dict"], model))
    data = {name: saved["data"][name] for name in ("mean", "std", "crop_pct")}
    assert loss == pytest.approx(loss_of(model, photos, (20, 20), **data), abs=2e-4)
    assert evaluated(vit, capsys)[1] == pytest.approx(saved["metrics"]["loss"], abs=1e-4)


def test_arguments_of_the_model_win_where_its_weights_fit(vit, capsys):
    loss = evaluated(vit, capsys)[1]
    assert evaluated(vit, capsys, *options(model__args__attn_kwargs='{"scale": 3.0}'))[1] != loss
    line = refused(vit, capsys, *options(model__args__depth=3))
    assert (
        line.startswith(f"error: the weights of {vit} do not fit vit_tiny_patch4_32_criss_cross {{")
        and "blocks.2" in line
    )


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(model__name="resnet18"), "model.name is resnet18, but BEST holds cifar_resnet20"),
        (
            dict(model__args__num_classes=7),
            "the weights of BEST do not fit cifar_resnet20 {'num_classes': 7, '",
        ),
        (
            dict(model__args__in_chans=1),
            "the weights of BEST do not fit cifar_resnet20 {'num_classes': 3, '",
        ),
        (dict(data__num_classes=7), "data.num_classes is 7, but folder has 3 classes"),
        (dict(data__mean=[0.5]), "data.mean must have 3 values, one per channel, got [0.5]"),
        (dict(data__name="digits"), "the model knows the classes ['ant', 'bee', 'cow'], the data have ['0', '1',"),
        (dict(data__val_split="test"), "has no folder test, it has train, val"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(given, named, resnet, capsys):
    assert named.replace("BEST", str(resnet)) in refused(resnet, capsys, *options(**given))


def test_published_weights_are_evaluated_by_the_name_of_their_model(resnet, photos, tmp_path, capsys):
    """Of a file that stands for what timm would fetch."""
    overlay = {"file": str(resnet.with_name("best.safetensors")), "num_classes": 3, **OWN, "input_size": [3, 11, 11]}
    named = options(model__name="cifar_resnet20", model__args__pretrained_cfg_overlay=json.dumps(overlay))
    first, loss = evaluated("pretrained", capsys, *named, *options(data__dir=photos))
    assert first == f"pretrained: cifar_resnet20, input 3×11×11, 3 classes; folder {photos}: 15 to evaluate"
    assert loss == pytest.approx(checkpoint.load(resnet)["metrics"]["loss"], abs=1e-4)
    make_folder(tmp_path, ("ant", "bee"), ("val",))
    line = refused("pretrained", capsys, *named, *options(data__dir=tmp_path))
    assert line == "error: eval: cifar_resnet20 was published for 3 classes, folder has 2"
    line = refused("pretrained", capsys, *options(model__name="cifar_resnet20"))
    assert "No pretrained weights exist for cifar_resnet20" in line


def test_some_classes_of_imagenet_do_for_its_models(tmp_path, capsys):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18").eval()
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    make_folder(tmp_path / "data", ("n01440764", "n02102040"), ("val",), images=2)  # tench and springer, 0 and 217
    overlay = json.dumps({"file": str(tmp_path / "weights.safetensors")})
    argv = options(model__name="resnet18", model__args__pretrained_cfg_overlay=overlay, data__dir=tmp_path / "data")
    _, loss = evaluated("pretrained", capsys, *argv, *options(data__img_size=40))
    prepare = create_transform(40, interpolation="bicubic", crop_pct=plain.pretrained_cfg["crop_pct"])
    images = [
        prepare(Image.open(tmp_path / "data" / "val" / name / f"{i}.png"))
        for name in ("n01440764", "n02102040")
        for i in range(2)
    ]
    with torch.no_grad():
        expected = F.cross_entropy(plain(torch.stack(images)), torch.tensor([0, 0, 217, 217])).item()
    assert loss == pytest.approx(expected, abs=2e-3)
    line = refused("pretrained", capsys, *argv[:4])
    assert "the model knows the classes ['n01440764', " in line and "… 1000 in all], the data have ['0', " in line


def test_a_size_that_the_model_does_not_take_is_refused(vit, capsys):
    line = refused(vit, capsys, *options(data__img_size=3))  # less than a patch
    assert "vit_tiny_patch4_32_criss_cross does not take images of 3×3×3: " in line


def test_other_images_of_the_same_classes_need_no_training_set(resnet, photos, tmp_path, capsys):
    make_folder(tmp_path / "new", ("bee", "ant"), ("test",), images=7)
    first, _ = evaluated(resnet, capsys, *options(data__dir=tmp_path / "new"))
    assert first.endswith(f"3 classes; folder {tmp_path}/new: 14 to evaluate")
    make_folder(tmp_path / "other", ("bee", "fly"))
    line = refused(resnet, capsys, *options(data__dir=tmp_path / "other"))
    assert "knows the classes ['ant', 'bee', 'cow'], the data have ['bee', 'fly']" in line


def test_digits_are_tested_on_digits_alone(photos, tmp_path, capsys):
    best = trained("train_imagenet", tmp_path, *TINY, *options(batch_size=128, data__train_images=128))
    assert "digits: 360 to evaluate" in evaluated(best, capsys)[0]
    line = refused(best, capsys, *options(data__dir=photos))
    assert "data.dir must be left out with data.name digits; data.name folder reads images of your own, got" in line
    line = refused(best, capsys, *options(data__dir=photos, data__name="folder"))
    assert "knows the classes ['0', '1'," in line


def test_pixel_models_too(photos, resnet, tmp_path, capsys):
    argv = [*PIXELS, *options(model__name="pixel_imagenet32", data__img_size=5, batch_size=8, epochs=1)]
    best = trained("train_pixels", tmp_path, *argv, *options(data__dir=photos))
    first, bits = evaluated(best, capsys, script="train_pixels")
    assert first == f"{best}: pixel_imagenet32, input 3×5×5, 256 levels; folder {photos}: 15 to evaluate"
    assert bits == pytest.approx(checkpoint.load(best)["metrics"]["bits_per_dim"], abs=1e-4)
    for given, named in (
        (dict(data__img_size=7), f"data.img_size is 7, but {best} holds a model of 5"),
        (dict(data__name="digits"), f"{best} holds a model of 256 levels, digits has 17"),
        (dict(model__name="pixel_cifar10"), f"model.name is pixel_cifar10, but {best} holds pixel_imagenet32"),
        (dict(model__args__depth=2), f"the weights of {best} do not fit pixel_imagenet32 "),
    ):
        assert named in refused(best, capsys, *options(**given), script="train_pixels")
    assert "holds a model of None levels" in refused(resnet, capsys, script="train_pixels")
    assert f"{best} is not a classifier's checkpoint" in refused(best, capsys)


def test_the_other_scripts_refuse_what_they_do_not_use(photos, resnet, tmp_path, capsys):
    pixels = [*PIXELS, *options(model__name="pixel_imagenet32", data__img_size=5, batch_size=8, epochs=1)]
    best = trained("train_pixels", tmp_path, *pixels, *options(data__dir=photos))
    for script, given, named in (
        ("report", dict(run=tmp_path, dir=photos), f"dir={photos}: a report of a pixel model reads no images"),
        ("export_onnx", dict(checkpoint=best, path="m.onnx"), f"{best} is not a classifier's checkpoint"),
        ("export_onnx", dict(checkpoint=resnet, path="m.onnx", pretrained=True), "pretrained is for model"),
        (
            "export_onnx",
            dict(checkpoint=resnet, path="m.onnx", model_args="{num_classes: 7}"),
            "do not fit cifar_resnet20 {'num_classes': 7, 'in_chans': 3}: size mismatch for fc.bias",
        ),
    ):
        assert load(script).main(options(**given)) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ") and named in line


def test_a_report_about_shards_takes_a_folder(tmp_path, capsys):
    (tmp_path / "shards").mkdir()
    make_shards(tmp_path / "shards")
    data = dict(data__name="wds", data__dir=tmp_path / "shards", data__num_classes=3)
    best = trained("train_imagenet", tmp_path / "run", *TINY, *options(**data))
    assert "3 classes; wds" in evaluated(best, capsys)[0]
    make_folder(tmp_path / "photos", ("2", "0"), ("val",), images=2)
    assert load("report").main(options(run=tmp_path / "run")) == 2
    assert "are shards: give a folder of images with dir" in capsys.readouterr().err
    assert [target for _, target in open_trained(best, backbones, str(tmp_path / "photos")).images] == [0, 0, 2, 2]


def test_a_run_goes_on_with_the_same_classes_only(photos, tmp_path, capsys):
    argv = [*TINY, *options(output=tmp_path / "run", data__dir=tmp_path / "data")]
    make_folder(tmp_path / "data", ("cat", "dog"), images=5)
    assert load("train_imagenet").main(argv) == 0
    for split in ("train", "val"):
        (tmp_path / "data" / split / "cat").rename(tmp_path / "data" / split / "eel")
    assert load("train_imagenet").main([*argv, *options(resume="auto", epochs=2)]) == 2
    assert "knows the classes ['cat', 'dog'], the data have ['dog', 'eel']" in capsys.readouterr().err


def test_images_without_a_name_of_their_set_are_a_folder(photos, tmp_path, capsys):
    (photos / "train" / "preview.txt").write_text("")
    try:
        assert load("train_imagenet").main([*TINY, *options(data__dir=photos, output=tmp_path / "run")]) == 0
    finally:
        (photos / "train" / "preview.txt").unlink()
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert f"input 3×11×11, 3 classes; folder {photos}: 8 images an epoch, 15 to evaluate" in first
    assert second == f"note: {photos}/train: left out files in no class folder: preview.txt"


@pytest.mark.parametrize("at", ["training", "evaluation"])
def test_what_a_forward_pass_refuses_is_one_line(at, photos, tmp_path, monkeypatch, capsys):
    def loss(self, model, images, targets):
        raise ValueError("x has 7 tokens\nand more")

    def measure(self, model, images, targets):
        if len(images) > 1:  # the model is tried on one
            raise ValueError("x has 7 tokens\nand more")
        return {"top1": torch.zeros(()), "loss": torch.zeros(())}

    monkeypatch.setattr(Classification, *(("loss", loss) if at == "training" else ("measure", measure)))
    assert load("train_imagenet").main([*TINY, *options(data__dir=photos, output=tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: and more; ") and line.endswith("there is no checkpoint yet") == (at == "training")


@pytest.mark.parametrize("block", ["criss_cross", "cbam"])
def test_dropped_patches_are_refused_when_the_model_is_built(block, photos, tmp_path, capsys):
    argv = options(model__name=f"vit_tiny_patch4_32_{block}", model__args__patch_drop_rate=0.3, threads=1)
    assert load("train_imagenet").main([*argv, *options(data__dir=photos, output=tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "patch_drop_rate: must be 0 beside a block" in line
