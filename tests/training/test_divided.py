"""Images without a validation split, images in tables, classes of unequal size, and images that are not square."""

import csv
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import MEAN, STD, make_folder, picture
from PIL import Image
from scripts import load, options, refused
from timm.data import Mixup
from torch import nn

from training import checkpoint
from training.classification import Classification, class_weights
from training.config import AugmentConfig, Config, DataConfig
from training.datasets import create_datasets
from training.distributed import Processes
from training.seeding import seed_all
from training.transforms import train_transform

TINY = options(model__name="cifar_resnet20", data__img_size=11, batch_size=4, threads=1, epochs=1)


def paths(dataset):
    return [dataset.name(index) for index in range(len(dataset))]


@pytest.mark.parametrize("inside", ["train", ""])
def test_a_share_of_each_class_is_kept_for_validation(inside, tmp_path):
    make_folder(tmp_path, ("ant", "bee"), (inside,), images=7)
    (tmp_path / inside / "cow").mkdir()
    picture().save(tmp_path / inside / "cow" / "only.png")
    config = DataConfig(dir=str(tmp_path), val_share=0.3)
    splits = {}
    for seed in (0, 1):
        train, val, classes = create_datasets(config, seed=seed)
        assert classes == ["ant", "bee", "cow"]
        assert Counter(val.targets) == {0: 2, 1: 2} and Counter(train.targets) == {0: 5, 1: 5, 2: 1}
        assert sorted(paths(train) + paths(val)) == sorted(map(str, (tmp_path / inside).rglob("*.png")))
        assert paths(create_datasets(config, seed=seed)[1]) == paths(val)
        splits[seed] = paths(val)
    assert splits[0] != splits[1]


def test_a_run_is_evaluated_on_the_images_it_kept(tmp_path, capsys):
    make_folder(tmp_path / "data", ("ant", "bee"), ("",), images=6)
    data = options(data__dir=tmp_path / "data", data__val_share=0.4, seed=3, output=tmp_path / "run")
    assert load("train_imagenet").main([*TINY, *data]) == 0
    best = tmp_path / "run" / "best.pt"
    capsys.readouterr()
    assert load("train_imagenet").main(["--eval", str(best), "--threads", "1"]) == 0
    first, note, last = capsys.readouterr().out.splitlines()
    where = tmp_path / "data"
    told = f"note: of {where} the images that val_share 0.4 sets aside; to evaluate all, put them into {where}/val"
    assert (
        note == told
        and first.endswith("4 to evaluate")
        and f"loss {checkpoint.load(best)['metrics']['loss']:.4f}" in last
    )
    assert load("report").main(options(run=tmp_path / "run")) == 0  # which reads the same ones
    make_folder(tmp_path / "later", ("ant", "bee"), ("val",), images=3)
    capsys.readouterr()
    assert load("train_imagenet").main(["--eval", str(best), *options(threads=1, data__dir=tmp_path / "later")]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.endswith("6 to evaluate")


def write_table(path, rows, names=("path", "label")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture
def table(tmp_path):
    """train.csv and val.csv beside images of three labels in one folder."""
    (tmp_path / "all").mkdir()
    for number in range(12):
        picture(seed=number).save(tmp_path / "all" / f"{number}.png")
    rows = [(f"all/{number}.png", ("a dog", "10", "9")[number % 3]) for number in range(12)]
    write_table(tmp_path / "train.csv", rows[:9])
    write_table(tmp_path / "val.csv", rows[9:])
    return tmp_path


def test_tables_name_images_and_their_labels(table):
    train, val, classes = create_datasets(DataConfig("csv", str(table)))
    assert classes == ["9", "10", "a dog"] and (len(train), len(val)) == (9, 3)
    for dataset in (train, val):
        for index, name in enumerate(paths(dataset)):
            number = int(name.split("/")[-1][:-4])
            image, target = dataset[index]
            assert classes[target] == ("a dog", "10", "9")[number % 3]
            assert np.array_equal(np.asarray(image), np.asarray(picture(seed=number)))
    train, val, _ = create_datasets(DataConfig("csv", str(table), val_share=0.3))
    assert (len(train), len(val)) == (6, 3) and Counter(val.targets) == {0: 1, 1: 1, 2: 1}
    write_table(table / "own.csv", [("all/0.png", "x"), ("all/1.png", "y")], ("file", "kind"))
    columns = dict(input_key="file", target_key="kind", train_split="own.csv", val_split="own.csv")
    assert create_datasets(DataConfig("csv", str(table), **columns))[2] == ["x", "y"]


@pytest.mark.parametrize(
    "row, named",
    [
        (("all/77.png", "9"), "train.csv, line 2: there is no image "),
        (("", "9"), "train.csv, line 2: must have path and label, got '', '9'"),
        (("all/0.png",), "train.csv, line 2: must have path and label, got 'all/0.png', None"),
        (("all/9.png", "9"), "validation has classes that training lacks: 10, a dog"),
    ],
)
def test_tables_that_say_too_little_are_refused(row, named, table, tmp_path, capsys):
    write_table(table / "train.csv", [row])
    argv = [*TINY, *options(data__name="csv", data__dir=table, output=tmp_path / "run")]
    assert named in refused("train_imagenet", argv, capsys)


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(data__val_share=1, data__dir="HERE"), "data.val_share must be in (0, 1), got 1.0"),
        (dict(data__val_share=0.2, data__name="digits"), "data.val_share must be left out with data.name digits"),
        (dict(data__val_share=0.2, data__dir="HERE"), "data.val_share must be left out: data.dir HERE has a valid"),
        (dict(data__val_share=0.2, data__dir="HERE", data__val_split="v"), "data.val_split must be left out with"),
        (dict(data__name="csv", data__dir="HERE"), "data.dir HERE has no table train.csv"),
        (dict(data__img_size="[3, 4, 5]"), "data.img_size must be at least 1, or a height and a width of at least 1, "),
        (dict(data__img_size="[0, 5]"), "data.img_size must be at least 1, or a height and a width of at least 1, "),
        (dict(data__img_size=0), "data.img_size must be at least 1, or a height and a width of at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_said(given, named, tmp_path, capsys):
    make_folder(tmp_path, ("ant", "bee"))
    given = {name: str(value).replace("HERE", str(tmp_path)) for name, value in given.items()}
    line = refused("train_imagenet", [*TINY, *options(**given), *options(output=tmp_path / "run")], capsys)
    assert named.replace("HERE", str(tmp_path)) in line


def test_a_table_that_contradicts_itself_is_refused(table, capsys):
    write_table(table / "train.csv", [("all/0.png", "9"), ("all/0.png", "10")])
    line = refused("train_imagenet", [*TINY, *options(data__name="csv", data__dir=table)], capsys)
    assert "train.csv, line 3: all/0.png is 9 above and 10 here" in line


def test_balanced_classes_count_alike(tmp_path):
    make_folder(tmp_path, ("ant", "bee"), images=2)
    for number in range(4):
        picture(seed=number).save(tmp_path / "train" / "bee" / f"more{number}.png")
    config = Config(data=DataConfig(dir=str(tmp_path), balance=True), batch_size=4)
    task = Classification(config, Processes(torch.device("cpu")))
    assert torch.equal(task.weights, torch.tensor([2.0, 8 / 12]))
    assert torch.equal(class_weights(task.train_set, 3), torch.tensor([8 / 6, 8 / 18, 8 / 3]))

    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    images, targets = torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 1, 1])
    single = [F.cross_entropy(model(images[i : i + 1]), targets[i : i + 1]) for i in range(4)]
    expected = sum(loss * task.weights[target] for loss, target in zip(single, targets)) / 4
    assert torch.allclose(task.loss(model, images, targets), expected)

    task.mixup = Mixup(mixup_alpha=0.4, num_classes=2, label_smoothing=0.0)
    seed_all("here")
    mixed = task.loss(model, images.clone(), targets)
    seed_all("here")
    pictures, soft = Mixup(mixup_alpha=0.4, num_classes=2, label_smoothing=0.0)(images.clone(), targets)
    each = -(soft * F.log_softmax(model(pictures), -1)).sum(1) * (soft @ task.weights)
    assert torch.allclose(mixed, each.mean())


def test_rectangles_are_seen_as_rectangles(tmp_path, capsys):
    make_folder(tmp_path / "data", ("ant", "bee"), images=4)
    argv = [*TINY, "--data.img_size", "11", "19", *options(data__dir=tmp_path / "data", output=tmp_path / "run")]
    assert load("train_imagenet").main(argv) == 0
    assert "input 3×11×19" in capsys.readouterr().out
    best = tmp_path / "run" / "best.pt"
    assert checkpoint.load(best)["data"]["input_size"] == [3, 11, 19]
    assert load("train_imagenet").main(["--eval", str(best), "--threads", "1"]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert "input 3×11×19" in first and f"loss {checkpoint.load(best)['metrics']['loss']:.4f}" in last
    assert load("train_imagenet").main(["--eval", str(best), "--threads", "1", "--data.img-size", "13", "7"]) == 0
    assert "input 3×13×7" in capsys.readouterr().out


def test_a_vit_is_made_for_the_rectangle(tmp_path, capsys):
    make_folder(tmp_path / "data", ("ant", "bee"), images=4)
    argv = options(model__name="vit_tiny_patch4_32_criss_cross", batch_size=4, threads=1, epochs=1)
    argv += options(model__args='{"embed_dim": 24, "depth": 1, "num_heads": 2}', data__dir=tmp_path / "data")
    argv += ["--data.img_size", "12", "20", *options(output=tmp_path / "run")]
    assert load("train_imagenet").main(argv) == 0
    assert checkpoint.load(tmp_path / "run" / "best.pt")["state_dict"]["pos_embed"].shape[1] == 1 + 3 * 5


@pytest.mark.parametrize("size", [(11, 29), (29, 11), (17, 17)])
def test_the_centre_of_an_image_fills_the_rectangle(size):
    white = Image.new("RGB", (41, 37), "white")
    tensor = train_transform(AugmentConfig(crop="centre"), size, MEAN, STD)(white)
    assert tensor.shape == (3, *size) and tensor.min() == 255
