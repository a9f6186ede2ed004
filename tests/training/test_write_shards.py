"""write_shards.py: the same images, labels and classes in shards, which train without another word."""

import io
import json
import tarfile
from collections import Counter

import pytest
from pictures import make_folder, picture
from scripts import load, options, refused

from training import checkpoint
from training.config import DataConfig
from training.datasets import create_datasets


@pytest.fixture
def photos(tmp_path):
    root = make_folder(tmp_path / "photos", ("ant", "bee"), images=7)
    picture(seed=77).save(root / "train" / "bee" / "Large.JPG")
    return root


def members(path):
    """{key: (bytes, label)} of a shard."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            found.setdefault(key, {})[ending] = tar.extractfile(member).read()
    return {key: (next(v for k, v in files.items() if k != "cls"), int(files["cls"])) for key, files in found.items()}


def test_shards_hold_every_image_once_with_its_label(photos, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert load("write_shards").main(options(dir=photos, path=shards, images=4)) == 0
    assert capsys.readouterr().out.splitlines() == [
        "train: 15 images of 2 classes in 4 shards",
        "validation: 14 images of 2 classes in 4 shards",
    ]
    info = json.loads((shards / "_info.json").read_text())
    assert info["class_names"] == ["ant", "bee"]
    for split, folder in (("train", "train"), ("validation", "val")):
        told = info["splits"][split]
        held = [members(shards / name) for name in told["filenames"]]
        assert (
            told["shard_lengths"] == [len(each) for each in held] and sum(told["shard_lengths"]) == told["num_samples"]
        )
        got = Counter(sample for each in held for sample in each.values())
        there = {name: (photos / folder / name).iterdir() for name in ("ant", "bee")}
        assert got == Counter((p.read_bytes(), ["ant", "bee"].index(name)) for name, ps in there.items() for p in ps)
    labels = [label for name in info["splits"]["train"]["filenames"] for _, label in members(shards / name).values()]
    assert labels != sorted(labels)  # shuffled


def test_a_run_on_shards_needs_no_counts_and_is_evaluated_on_the_folder(photos, tmp_path, capsys):
    shards = tmp_path / "shards"
    assert load("write_shards").main(options(dir=photos, path=shards, images=4)) == 0
    config = DataConfig("wds", str(shards))
    train, val, classes = create_datasets(config)
    assert (len(train), len(val), classes) == (15, 14, ["ant", "bee"])
    run = options(data__name="wds", data__dir=shards, model__name="cifar_resnet20", data__img_size=11, batch_size=4)
    assert load("train_imagenet").main([*run, *options(epochs=1, threads=1, output=tmp_path / "run")]) == 0
    best = tmp_path / "run" / "best.pt"
    capsys.readouterr()
    argv = ["--eval", str(best), *options(data__name="folder", data__dir=photos, threads=1)]
    assert load("train_imagenet").main(argv) == 0
    assert f"loss {checkpoint.load(best)['metrics']['loss']:.4f}" in capsys.readouterr().out
    assert "data.num_classes is 3, but wds has 2 classes" in refused(
        "train_imagenet", [*run, *options(data__num_classes=3)], capsys
    )


def test_a_share_is_kept_for_validation(tmp_path):
    make_folder(tmp_path / "photos", ("ant", "bee"), ("",), images=5)
    argv = options(dir=tmp_path / "photos", path=tmp_path / "shards", val_share=0.4, seed=3)
    assert load("write_shards").main(argv) == 0
    _, val, _ = create_datasets(DataConfig(dir=str(tmp_path / "photos"), val_share=0.4), seed=3)
    held = {content for content, _ in members(tmp_path / "shards" / "validation-000000.tar").values()}
    assert held == {open(val.name(index), "rb").read() for index in range(len(val))} and len(held) == 4


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(name="digits"), "name='digits': must be folder or csv"),
        (dict(images=0), "images=0: must be 1 or more"),
        (dict(dir="nowhere"), "data.dir nowhere is not a directory"),
        (dict(path="FULL"), "holds shards already, train-0.tar among them"),
    ],
)
def test_what_cannot_be_written_is_said(given, named, photos, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    with tarfile.open(tmp_path / "full" / "train-0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a"), io.BytesIO())
    given = {key: str(value).replace("FULL", str(tmp_path / "full")) for key, value in given.items()}
    line = refused("write_shards", options(**{"dir": photos, "path": tmp_path / "shards"} | given), capsys)
    assert named in line and not (tmp_path / "shards").exists()
