"""The scripts beside training: they do what their first lines say, and bad input gets one line and exit code 2."""

import csv
import json
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from conftest import alive
from pictures import picture
from PIL import Image
from safetensors.torch import save_file
from scripts import PIXELS, load, options
from timm.data import ImageNetInfo, create_transform
from torchvision.transforms import functional as TF

import backbones
from training import checkpoint
from training.comparison import Finished, _curves, grouped
from training.datasets import Digits
from training.image_folder import order
from training.report import Page, add_answers, add_curves, confusion, mistakes, varied
from training.trained import open_trained
from vision_attn.cost import flops

ROOT = Path(__file__).parent.parent


def script(name: str):
    return runpy.run_path(str(ROOT / f"{name}.py"))


@pytest.fixture
def trained(tmp_path):
    """A checkpoint as train_imagenet.py leaves it, of a model that knows nothing."""
    torch.manual_seed(0)
    args = dict(num_classes=10, in_chans=3, attn_at="layer3.2")
    model = alive(timm.create_model("cifar_resnet20_cbam", **args))
    data = dict(mean=[0.5] * 3, std=[0.25] * 3, input_size=[3, 32, 32], interpolation="bicubic", crop_pct=1.0)
    checkpoint.save(
        tmp_path / "best.pt",
        model="cifar_resnet20_cbam",
        model_args=args,
        insert=None,
        imports=[],
        scaler=None,
        state_dict=model.state_dict(),
        ema=None,
        optimizer={},
        epoch=1,
        step=1,
        within={"steps": 0, "loss": 0.0, "bad": 0},
        metrics={},
        history=[
            dict(epoch=epoch, step=9, lr=0.1, train_loss=2.0, loss=1.5, top1=50.0, seconds=3.0) for epoch in (1, 2)
        ],
        data=data | dict(class_names=[str(digit) for digit in range(10)]),
        config=dict(data=dict(name="digits")),
        versions=checkpoint.versions(),
        made={},
    )
    return tmp_path / "best.pt", model.eval()


def test_checkpoint_is_exported(trained, tmp_path, capsys):
    path, model = trained
    assert script("export_onnx")["main"](["--checkpoint", str(path), "--path", str(tmp_path / "out" / "m.onnx")]) == 0
    assert "largest difference" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "out" / "m.onnx")
    images = torch.randn(3, 3, 29, 41)
    (got,) = session.run(None, {"image": images.numpy()})
    np.testing.assert_allclose(got, model(images).detach().numpy(), atol=1e-5)


def test_named_model_is_exported_with_its_arguments(tmp_path):
    arguments = ["--model", "vit_tiny_patch4_32_efficient", "--model_args", "{depth: 1, num_classes: 3}"]
    arguments += ["--image_size", "32", "--dynamic", "false", "--path", str(tmp_path / "m.onnx")]
    assert script("export_onnx")["main"](arguments) == 0
    (output,) = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_outputs()
    assert output.shape[1] == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--path", "m.onnx"], "checkpoint or model"),
        (["--path", "m.onnx", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--path", "m.onnx", "--model", "resnet1"], "resnet1"),
        (["--path", "m.onnx", "--model", "vit_tiny_patch4_32", "--image_size", "30"], "image_size"),
        (["--path", "m.onnx", "--model", "cifar_resnet20", "--opset", "3"], "opset=3"),
    ],
)
def test_what_cannot_be_exported_is_said(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert script("export_onnx")["main"](arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error
    assert not list(tmp_path.iterdir())


def test_attention_is_drawn_for_every_class(trained, tmp_path):
    names = script("show_attention")
    picture = tmp_path / "out" / "attention.png"
    assert names["main"](["--checkpoint", str(trained[0]), "--path", str(picture), "--at", "layer3.*"]) == 0
    width, height = Image.open(picture).size
    assert height > 2 * width  # ten rows, four columns
    assert varied(torch.tensor([0, 0, 0, 1, 0, 2, 0]), 4) == [0, 3, 5, 1]


@pytest.mark.parametrize("more, said", [(["--at", "nope*"], "nope*"), (["--count", "0"], "count=0")])
def test_what_cannot_be_drawn_is_said(trained, tmp_path, capsys, more, said):
    picture = tmp_path / "attention.png"
    assert script("show_attention")["main"](["--checkpoint", str(trained[0]), "--path", str(picture), *more]) == 2
    assert said in capsys.readouterr().err
    assert not picture.exists()


def test_attention_on_an_image_of_ones_own(trained, tmp_path, capsys):
    picture(41, 53).save(tmp_path / "photo.jpg")
    argv = ["--checkpoint", str(trained[0]), "--image", str(tmp_path / "photo.jpg"), "--at", "layer3.*"]
    assert script("show_attention")["main"](argv) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "attention.png")
    wide, low = Image.open(tmp_path / "attention.png").size
    assert script("show_attention")["main"]([*argv[:4], str(tmp_path / "photo.jpg"), *argv[4:]]) == 0  # two of them
    assert Image.open(tmp_path / "attention.png").size[1] > 1.5 * low
    assert script("show_attention")["main"]([*argv, "--dir", "."]) == 2
    assert "dir=.: must be left out with image" in capsys.readouterr().err
    assert script("show_attention")["main"]([*argv[:2], "--image", str(tmp_path / "none.jpg")]) == 2
    assert "none.jpg" in capsys.readouterr().err


def test_labels_of_rows_are_wrapped_and_inside_the_picture(tmp_path):
    names = ["black-and-tan coonhound", "golden retriever, a dog"]
    sizes = {}
    for wrapped, titles in ((False, ["cat,\nsays dog"]), (True, [f"{names[0]},\nsays {names[1]}"])):
        path = tmp_path / f"{wrapped}.png"
        backbones.draw_maps(torch.zeros(1, 3, 8, 8), {"a": torch.rand(1, 4, 4)}, path, titles)
        sizes[wrapped] = Image.open(path).convert("L")
    ink = np.asarray(sizes[True])[:, :5]
    assert (ink > 250).all()  # nothing is cut off
    dark = (np.asarray(sizes[True])[:, : sizes[True].width // 5] < 128).any(axis=1)
    lines = (dark[1:] & ~dark[:-1]).sum()
    assert lines >= 4


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_images_without_labels_get_the_likeliest_classes(trained, tmp_path, capsys):
    path, model = trained
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    pictures = {"photos/10.png": picture(41, 53, seed=1), "photos/9.jpg": picture(seed=2, mode="L")}
    pictures["photos/deep/a.png"] = picture(29, 31, seed=3)
    for name, image in pictures.items():
        image.save(tmp_path / name)
    (tmp_path / "photos" / "broken.png").write_bytes(b"nothing")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    argv = options(checkpoint=path, images=tmp_path / "photos", path=tmp_path / "out" / "p.csv", batch_size=2)
    assert script("predict")["main"](argv) == 0
    said = capsys.readouterr().out
    assert "note: 1 of 4 images can't be read, the first is" in said and "broken.png: UnidentifiedImageError" in said
    rows = table(tmp_path / "out" / "p.csv")
    assert [row["image"] for row in rows] == [str(tmp_path / name) for name in sorted(pictures, key=order)]
    prepare = create_transform(32, mean=[0.5] * 3, std=[0.25] * 3, crop_pct=1.0, interpolation="bicubic")
    for row in rows:
        with torch.no_grad():
            shares = model(prepare(Image.open(row["image"]).convert("RGB"))[None]).softmax(dim=1)[0]
        best = shares.topk(5)
        assert [row[f"top{place}"] for place in range(1, 6)] == [str(index) for index in best.indices.tolist()]
        for place, share in enumerate(best.values.tolist(), start=1):
            assert float(row[f"p{place}"]) == pytest.approx(share, abs=2e-3)


def test_published_models_name_what_they_see(tmp_path, capsys):
    torch.manual_seed(1)
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "w.safetensors")
    picture(41, 53).save(tmp_path / "photo.png")
    argv = options(model="resnet18", images=tmp_path / "photo.png", path=tmp_path / "p.csv", top=3)
    argv += options(model_args=json.dumps({"pretrained_cfg_overlay": {"file": str(tmp_path / "w.safetensors")}}))
    assert script("predict")["main"](argv) == 0
    (row,) = table(tmp_path / "p.csv")
    assert list(row) == ["image", "top1", "p1", "top2", "p2", "top3", "p3"]
    assert row["top1"] in ImageNetInfo().label_descriptions()


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(), "give either checkpoint or model"),
        (dict(model="resnet18", checkpoint="x.pt"), "give either checkpoint or model"),
        (dict(checkpoint="nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (dict(checkpoint="x.pt", model_args="{a: 1}"), "model_args={'a': 1}: is for model"),
        (dict(model="resnt18"), "Unknown model (resnt18); similar names: "),
        (dict(model="cifar_resnet20"), "No pretrained weights exist for cifar_resnet20"),
        (dict(model="resnet18", images="nowhere"), "images=nowhere: there is no such folder or image"),
        (dict(model="resnet18", images="empty"), "images=empty: holds no image"),
        (dict(model="resnet18", top=0), "top=0: must be 1 or more"),
    ],
)
def test_what_cannot_be_predicted_is_said(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("in", "empty"):
        (tmp_path / name).mkdir()
    picture().save(tmp_path / "in" / "photo.png")
    assert script("predict")["main"](options(**{"images": "in", "path": "p.csv"} | given)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and not (tmp_path / "p.csv").exists()


def test_a_report_has_everything_in_one_file(trained, tmp_path, capsys):
    path, model = trained
    assert script("report")["main"](["--run", str(tmp_path), "--count", "7"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    headings = ["Curves", "Confusion", "Accuracy of each class", "Mistakes", "Attention"]
    assert re.findall("<h2>(.*?)</h2>", page) == headings  # what was reached stands above, the configuration below
    assert page.index("<table>") < page.index("<h2>") and page.rindex("<h2>") < page.index("<details><summary>Config")
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 4 and "http" not in page

    images = torch.stack([TF.to_tensor(image.convert("RGB")) for image, _ in Digits(train=False)])
    targets = torch.tensor(Digits(train=False).targets)
    with torch.no_grad():
        expected = model((images - 0.5) / 0.25).softmax(dim=1)
    probabilities, labels = open_trained(path, backbones).answers()
    assert torch.equal(labels, targets) and torch.allclose(probabilities, expected, atol=1e-5)
    right = (expected.argmax(1) == targets).sum().item()
    assert f"{right} of 360 right" in page
    for digit in range(10):
        share = 100 * (expected.argmax(1) == targets)[targets == digit].float().mean()
        assert f"<td>{digit}</td><td>{(targets == digit).sum()}</td><td>{share:.1f} %</td>" in page


def test_mistakes_come_surest_first():
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3]])
    assert mistakes(probabilities, torch.tensor([0, 0, 0, 1]), 5) == [2, 3, 1]
    assert mistakes(probabilities, torch.tensor([0, 0, 0, 1]), 1) == [2]


def test_a_report_of_a_model_without_attention_and_of_pixels(tmp_path, capsys):
    run = options(data__img_size=8, threads=1, epochs=1, model__name="cifar_resnet20", output=tmp_path / "plain")
    assert load("train_imagenet").main(run) == 0
    assert load("train_pixels").main([*PIXELS, *options(epochs=1, output=tmp_path / "pixels")]) == 0
    for name, pictures in (("plain", 3), ("pixels", 3)):
        assert script("report")["main"](["--run", str(tmp_path / name), "--path", str(tmp_path / "r.html")]) == 0
        assert (tmp_path / "r.html").read_text().count("<img") == pictures
    assert script("report")["main"](["--run", str(tmp_path)]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert script("show_attention")["main"](["--checkpoint", str(tmp_path / "pixels" / "best.pt"), "--path", "x"]) == 2
    assert "is not a classifier's checkpoint" in capsys.readouterr().err


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two seeds of one run, and one run with a block, of two epochs each."""
    folder = tmp_path_factory.mktemp("runs")
    common = options(data__img_size=8, threads=1, epochs=2, model__name="cifar_resnet20", data__train_images=256)
    for name, more in (("a", dict(seed=1)), ("b", dict(seed=2)), ("gate", dict(seed=1, model__insert="cbam"))):
        assert load("train_imagenet").main([*common, *options(output=folder / name, **more)]) == 0
    return folder


def test_a_report_says_what_was_reached_and_on_what(seeds, tmp_path):
    best, last = (checkpoint.load(seeds / "gate" / f"{name}.pt") for name in ("best", "last"))
    assert script("report")["main"](options(run=seeds / "gate", path=tmp_path / "r.html")) == 0
    page = (tmp_path / "r.html").read_text()
    for row, which in (last["history"][best["epoch"] - 1], "best"), (last["history"][-1], "last"):
        assert f"<td>{which} epoch, {row['epoch']}</td>" in page
        assert f"<td>{row['top1']:.5g}</td>" in page and f"<td>{row['train_loss']:.5g}</td>" in page
    model = timm.create_model("cifar_resnet20", num_classes=10)
    backbones.insert(model, "cbam")
    assert page.index("best epoch, ") < page.index("<th>parameters</th>") < page.index("<h2>Curves</h2>")
    count = sum(parameter.numel() for parameter in model.parameters())
    seconds = sum(row["seconds"] for row in last["history"])
    for name, value in {
        "model": "cifar_resnet20 + cbam",
        "parameters": f"{count / 1e6:.3g} M",
        "forward, an image": f"{flops(model, torch.zeros(1, 3, 8, 8)) / 1e9:.3g} GFLOPs, 2 per multiply-add",
        "data": "digits",
        "images to train on": "256",
        "input": "3×8×8",
        "epochs": "2, 4 steps",
        "wall time": f"{seconds:.0f} s",
        "hardware": last["made"]["hardware"],
        "date": f"{last['made']['date']} UTC",
    }.items():
        assert f"<th>{name}</th><td>{value}</td>" in page
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", last["made"]["date"]) and "thread" in last["made"]["hardware"]


def test_runs_stand_side_by_side(seeds, tmp_path, monkeypatch, capsys):
    saved = {name: checkpoint.load(seeds / name / "last.pt") for name in ("a", "b", "gate")}
    argv = ["--runs", *(str(seeds / name) for name in saved), "--path", str(tmp_path / "r.html")]
    assert script("report")["main"](argv) == 0
    page = (tmp_path / "r.html").read_text()
    first = re.search("<table>(.*?)</table>", page)[1]
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", first)]
    table = [dict(zip(rows[0], row)) for row in rows[1:]]
    assert [(row["model"], row["runs"]) for row in table] == [("cifar_resnet20", "2"), ("cifar_resnet20 + cbam", "1")]
    for which, value_of in (
        ("best", lambda run: run["metrics"]["best_top1"]),
        ("last", lambda run: run["history"][-1]["top1"]),
    ):
        values = np.array([value_of(saved[name]) for name in "ab"])
        assert table[0][f"{which} top-1 %"] == f"{values.mean():.4g} ± {values.std(ddof=1):.2g}"
        assert table[1][f"{which} top-1 %"] == f"{value_of(saved['gate']):.4g}"
    assert all(row["GFLOPs"] and row["memory"].endswith("MiB") and float(row["images/s"]) > 0 for row in table)
    assert page.count("<img") == 1 and page.count("<details>") == 3
    assert all(f"<td>{seeds / name}</td>" in page for name in saved)


def test_groups_are_named_by_what_differs(seeds):
    opened = [script("report")["open_run"](seeds / name) for name in ("a", "b")]
    opened[1].saved["config"]["optim"]["lr"] = 0.7
    assert list(grouped(opened)) == ["cifar_resnet20, optim.lr 0.1", "cifar_resnet20, optim.lr 0.7"]


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "give either run or runs"),
        (["--run", "a", "--runs", "a", "b"], "give either run or runs"),
        (["--runs", "a", "--dir", "."], "dir=.: must be left out with runs"),
        (["--runs", "a", "nowhere"], "there is no checkpoint nowhere/best.pt"),
    ],
)
def test_what_cannot_be_reported_is_said(argv, said, seeds, monkeypatch, capsys):
    monkeypatch.chdir(seeds)
    assert script("report")["main"](argv) == 2
    assert said in capsys.readouterr().err


def test_long_names_of_many_classes_are_folded_and_shortened(tmp_path):
    page, count = Page("p"), 43
    probabilities = torch.eye(count)[torch.arange(count).roll(1)]
    names = [f"class number {index}, which has a rather long name" for index in range(count)]
    add_answers(page, probabilities, torch.arange(count), names)
    text = "".join(page.parts)
    assert text.count("<details>") == 1 and "3 more, which do better" in text
    assert all(f"<td>{name}</td>" in text for name in names)
    wide = {}
    for some in (["ant", "bee"], names[:2]):
        figure = confusion(np.eye(2, dtype=int), some)
        wide[len(some[0])] = figure.get_size_inches()[0]
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert all(len(label) <= 30 for label in labels)
    assert wide[max(wide)] > wide[3] + 1


def test_the_exported_classifier_is_as_accurate(tmp_path):
    """On all digits of the test set: float32 gives every answer PyTorch gives, int8 loses less than a point."""
    run = options(data__img_size=16, threads=1, epochs=4, model__name="cifar_resnet20_cbam", output=tmp_path / "run")
    run += options(batch_size=64, model__args='{"attn_at": "layer3.2"}')
    assert load("train_imagenet").main(run) == 0
    best = tmp_path / "run" / "best.pt"
    probabilities, targets = (trained := open_trained(best, backbones)).answers()
    images = trained.normalised(trained.pixels(range(len(targets)))).numpy()
    right = {}
    for precision in ("fp32", "int8"):
        path = tmp_path / f"{precision}.onnx"
        flag = [] if precision == "fp32" else ["--int8", "true"]
        assert script("export_onnx")["main"](["--checkpoint", str(best), "--path", str(path), *flag]) == 0
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        right[precision] = session.run(None, {"image": images})[0].argmax(axis=1)
    assert np.array_equal(right["fp32"], probabilities.argmax(dim=1).numpy())
    accuracy = {name: 100 * (answers == targets.numpy()).mean() for name, answers in right.items()}
    assert accuracy["fp32"] > 60 and abs(accuracy["int8"] - accuracy["fp32"]) <= 1


def test_epochs_are_counted_in_whole_numbers(monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    history = [{"epoch": 1, "loss": 0.7, "top1": 37.0}, {"epoch": 2, "loss": 0.5, "top1": 41.0}]
    add_curves(Page("one"), {"history": history})
    plt.close(_curves({"a": [Finished("run", {"history": history}, 1, 1)]}, "top-1 %", "top1"))
    for figure in drawn:
        for axis in figure.axes:
            assert all(tick == int(tick) for tick in axis.get_xticks())
    assert len(drawn) == 2
