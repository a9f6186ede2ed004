"""Folders of images as people have them: nested, hidden, stray, empty, of many formats, and laid out in other ways."""

import io
import os
import tarfile

import numpy as np
import pytest
from pictures import make_folder, picture
from PIL import Image
from timm.utils import natural_key

from training.config import DataConfig
from training.datasets import create_datasets
from training.loader import as_mode
from training.pixels import ImageConfig, create_images

FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".ppm": "PPM",
    ".avif": "AVIF",
}


def read(root, **options):
    """(class, path within the split) of the images to train on and to evaluate; the classes; what was said."""
    said = []
    *sets, classes = create_datasets(DataConfig("folder", str(root), **options), tell=said.append)
    names = [[dataset.name(i) for i in range(len(dataset))] for dataset in sets]
    found = [
        [(classes[dataset[i][1]], os.path.relpath(name, root).split(os.sep, 1)[1]) for i, name in enumerate(some)]
        for dataset, some in zip(sets, names)
    ]
    return *found, classes, said


def put(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed=seed).save(path, **options)


def encoded(name, seed=0):
    file = io.BytesIO()
    picture(seed=seed).save(file, name)
    return file.getvalue()


def refused(root, **options):
    with pytest.raises(ValueError) as info:
        create_datasets(DataConfig("folder", str(root), **options))
    return str(info.value)


def test_the_class_is_the_first_folder_below_the_split(tmp_path):
    for split in ("train", "val"):
        for path in ("cat/a/1.png", "cat/2.png", "cat/a/deep/3.png", "dog/a/1.png"):
            put(tmp_path / split / path)
    train, val, classes, said = read(tmp_path)
    assert classes == ["cat", "dog"] and said == []
    assert (
        train
        == val
        == [
            ("cat", "cat/2.png"),
            ("cat", "cat/a/1.png"),
            ("cat", "cat/a/deep/3.png"),
            ("dog", "dog/a/1.png"),
        ]
    )


def test_hidden_files_and_folders_are_left_out_without_a_word(tmp_path):
    make_folder(tmp_path, images=2)
    for path in ("cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", ".trash/0.png", "._x.png", "dog/b/.c/1.png"):
        put(tmp_path / "train" / path)
    (tmp_path / "train" / ".DS_Store").write_text("")
    train, _, classes, said = read(tmp_path)
    assert classes == ["cat", "dog"] and said == [] and len(train) == 4


def test_a_hidden_folder_above_hides_nothing(tmp_path):
    make_folder(tmp_path / ".data" / "mine", images=2)
    assert len(read(tmp_path / ".data" / "mine")[0]) == 4


def test_what_is_left_out_is_told_in_one_line_for_each_split(tmp_path):
    make_folder(tmp_path, images=2)
    put(tmp_path / "train" / "preview.png")
    (tmp_path / "train" / "notes.txt").write_text("")
    (tmp_path / "train" / "eel" / "more").mkdir(parents=True)
    for path in ("cat/1.heic", "cat/more/2.HEIC", "dog/3.xmp", "dog/README"):
        (tmp_path / "train" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / path).write_text("")
    train, _, classes, said = read(tmp_path)
    assert classes == ["cat", "dog"] and len(train) == 4
    assert said == [
        f"{tmp_path}/train: left out files in no class folder: notes.txt, preview.png; "
        "class folders without images: eel; files of other endings: .heic 2, .xmp 1, no ending 1"
    ]
    for i in range(7):
        (tmp_path / "val" / f"{i}.txt").write_text("")
    *_, said = read(tmp_path)
    assert said[1] == f"{tmp_path}/val: left out files in no class folder: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more"


def test_what_pillow_reads_is_read(tmp_path):
    for split in ("train", "val"):
        put(tmp_path / split / "rest" / "0.png")
        for ending, name in FORMATS.items():
            put(tmp_path / split / "cat" / f"0{ending}", format=name)
            put(tmp_path / split / "cat" / f"1{ending.upper()}", format=name)
        for ending in (".pdf", ".eps", ".mpg", ".h5", ".emf"):
            (tmp_path / split / "cat" / f"2{ending}").write_text("")
    train, val, _, said = read(tmp_path)
    assert len(train) == len(val) == 2 * len(FORMATS) + 1
    assert said[0].endswith("left out files of other endings: .emf 1, .eps 1, .h5 1, .mpg 1, .pdf 1")
    dataset, *_ = create_datasets(DataConfig("folder", str(tmp_path)))
    lossless = [i for i in range(len(dataset)) if dataset.name(i).lower().endswith((".bmp", ".tif", ".ppm"))]
    assert len(lossless) == 6
    assert all(np.array_equal(as_mode(dataset[i][0], "RGB"), picture()) for i in lossless)


@pytest.mark.parametrize("ending", [".gif", ".tif", ".webp"])
def test_of_several_frames_the_first_is_read(ending, tmp_path):
    make_folder(tmp_path, images=1)
    frames = [Image.new("RGB", (13, 7), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / "train" / "cat" / f"9{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if ending == ".webp" else {}))
    dataset, *_ = create_datasets(DataConfig("folder", str(tmp_path)))
    assert dataset.name(1) == str(path)
    assert np.array_equal(as_mode(dataset[1][0], "RGB"), frames[0])


def test_the_order_is_natural_and_that_of_names_that_differ_by_case_is_fixed(tmp_path):
    names = ["class10", "class2", "Cat", "cat", "CAT", "b", "A", "2²"]
    for split in ("train", "val"):
        for name in names:
            for image in ("10", "9", "x"):
                put(tmp_path / split / name / f"{image}.png")
    train, _, classes, _ = read(tmp_path)
    assert classes == ["2²", "A", "b", "CAT", "Cat", "cat", "class2", "class10"]
    usual = [name for name in classes if name != "2²"]
    assert sorted(usual, key=natural_key) == usual  # timm's order, which older checkpoints have
    assert [path for name, path in train if name == "class2"] == [f"class2/{image}.png" for image in ("9", "10", "x")]


def test_links_are_followed_but_not_into_a_circle(tmp_path):
    make_folder(tmp_path / "data", images=2)
    make_folder(tmp_path / "else", ("more",), ("there",), images=3)
    (tmp_path / "data" / "train" / "eel").symlink_to(tmp_path / "else" / "there" / "more")
    (tmp_path / "data" / "train" / "cat" / "back").symlink_to(tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    said = []
    train, _, classes = create_datasets(DataConfig("folder", str(tmp_path / "link")), tell=said.append)
    assert classes == ["cat", "dog", "eel"]
    assert [train.name(i).split("/train/")[1] for i in range(len(train)) if "eel" in train.name(i)] == [
        f"eel/{i}.png" for i in range(3)
    ]
    (broken,) = [i for i in range(len(train)) if train.name(i).endswith("gone.png")]
    with pytest.raises(FileNotFoundError):  # which training counts among the unreadable, and names
        train[broken]


@pytest.mark.parametrize("up", [".", "..", "../.."])
def test_a_class_that_is_a_link_to_the_split_or_above_is_left_out(up, tmp_path):
    make_folder(tmp_path / "data", images=2)
    (tmp_path / "data" / "train" / "loop").symlink_to(up)
    train, _, classes, said = read(tmp_path / "data")
    assert classes == ["cat", "dog"] and len(train) == 4
    assert said == [f"{tmp_path}/data/train: left out links to folders that hold them: loop"]


@pytest.mark.parametrize("up", ["..", "../..", "../../.."])
def test_a_link_in_a_class_to_the_split_or_above_is_not_followed(up, tmp_path):
    make_folder(tmp_path / "data", images=2)
    (tmp_path / "data" / "train" / "cat" / "loop").symlink_to(up)
    train, *_ = read(tmp_path / "data")
    assert len(train) == 4


def test_a_class_may_be_a_link_to_a_folder_beside_the_split(tmp_path):
    make_folder(tmp_path / "data", images=2)
    make_folder(tmp_path / "data" / "train_more", ("eel",), ("here",), images=3)
    (tmp_path / "data" / "train" / "eel").symlink_to(tmp_path / "data" / "train_more")
    train, _, classes, said = read(tmp_path / "data")
    assert classes == ["cat", "dog", "eel"] and len(train) == 7 and said == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_told_of(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "cat").chmod(0)
    try:
        assert "Permission denied" in refused(tmp_path)
    finally:
        (tmp_path / "train" / "cat").chmod(0o700)


def test_splits_in_capitals_and_of_other_names(tmp_path):
    make_folder(tmp_path, splits=("Train", "Valid"), images=2)
    assert len(read(tmp_path)[0]) == 4
    make_folder(tmp_path, ("ant", "bee", "cat", "dog"), splits=("train",), images=1)  # beside Train
    assert read(tmp_path)[2] == ["ant", "bee", "cat", "dog"]
    assert len(read(tmp_path, train_split="Train")[0]) == 4
    assert "has no folder fit, it has Train, Valid, train" in refused(tmp_path, train_split="fit")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "mine")
    assert DataConfig(dir="~/mine").dir == ImageConfig(dir="~/mine").dir == str(tmp_path / "mine")


def test_other_layouts_are_told_what_is_wanted(tmp_path):
    wanted = f"wanted are {tmp_path}/a/train/CLASS/IMAGE and {tmp_path}/a/val/CLASS/IMAGE"
    make_folder(tmp_path, splits=("a",))  # classes without a split
    shared = f"or {tmp_path}/a/train/CLASS/IMAGE or {tmp_path}/a/CLASS/IMAGE alone, with data.val_share"
    said = f"data.dir {tmp_path}/a has no folder train or training, it has cat, dog; {wanted}; {shared}"
    assert refused(tmp_path / "a") == said
    for folders in ("a", "b"):  # as it says
        make_folder(tmp_path / "shared" / folders, splits=("" if folders == "a" else "train",))
        assert len(read(tmp_path / "shared" / folders, val_share=0.4)[1]) == 2
    make_folder(tmp_path / "b", splits=("train",))
    assert f"{tmp_path}/b has no folder val or validation or valid or test, it has train;" in refused(tmp_path / "b")
    make_folder(tmp_path / "c")  # the split itself
    assert refused(tmp_path / "c" / "train").endswith(f"; if it is a split itself, give {tmp_path}/c")
    make_folder(tmp_path / "d", splits=("train",))
    for i in range(5):
        put(tmp_path / "d" / "val" / f"ILSVRC2012_val_{i}.JPEG", format="JPEG")  # as ImageNet is published
    assert refused(tmp_path / "d") == (
        f"Found 0 images in class folders of {tmp_path}/d/val, and 5 beside them: move each into the folder of its "
        f"class; wanted is {tmp_path}/d/val/CLASS/IMAGE"
    )
    make_folder(tmp_path / "e")
    (tmp_path / "e" / "val" / "Cat").mkdir()
    put(tmp_path / "e" / "val" / "Cat" / "0.png")
    assert "validation has classes that training lacks: Cat" in refused(tmp_path / "e")


def test_the_classes_of_a_trained_model_need_no_training_set(tmp_path):
    make_folder(tmp_path, ("dog",), ("val",))
    train, val, classes = create_datasets(DataConfig("folder", str(tmp_path)), known=["cat", "dog", "eel"])
    assert train is None and classes == ["cat", "dog", "eel"] and [val[i][1] for i in range(3)] == [1, 1, 1]
    with pytest.raises(ValueError, match=r"knows the classes \['cat', 'eel'\], the data have \['dog'\]"):
        create_datasets(DataConfig("folder", str(tmp_path)), known=["cat", "eel"])
    make_folder(tmp_path / "flat", splits=(".",))
    _, val, _ = create_datasets(DataConfig("folder", str(tmp_path / "flat"), val_split="."), known=["cat", "dog"])
    assert len(val) == 6


def test_pixel_models_read_by_the_same_rules(tmp_path):
    make_folder(tmp_path, images=2)
    put(tmp_path / "train" / "cat" / ".b" / "0.png")
    put(tmp_path / "train" / "cat" / "b" / "0.webp")
    put(tmp_path / "train" / "preview.png")
    said = []
    train, test = create_images(ImageConfig(dir=str(tmp_path)), 3, said.append)
    assert (len(train), len(test)) == (5, 4) and said == [
        f"{tmp_path}/train: left out files in no class folder: preview.png"
    ]


@pytest.mark.parametrize("labels", [["eel", "cat", "eel", "Dog"], ["2", "10", "2", "1"]])
def test_labels_that_are_text_become_sorted_classes(labels, tmp_path):
    datasets = pytest.importorskip("datasets")

    def write(split, labels):
        rows = {"image": [picture(seed=i) for i in range(len(labels))], "label": labels}
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "mine" / f"{split}.parquet")

    write("train", labels)
    write("validation", labels[:2])
    config = DataConfig(f"hfds/{tmp_path}/mine", str(tmp_path / "cache"))
    train, val, classes = create_datasets(config)
    expected = {"eel": ["cat", "Dog", "eel"], "2": ["1", "2", "10"]}[labels[0]]
    assert classes == expected
    assert [classes[target] for target in train.targets] == labels
    assert [classes[train[i][1]] for i in range(4)] == labels and [classes[val[i][1]] for i in range(2)] == labels[:2]
    none, val, classes = create_datasets(config, known=["a", *expected])
    assert none is None and [classes[val[i][1]] for i in range(2)] == labels[:2]
    with pytest.raises(ValueError, match="knows the classes"):
        create_datasets(config, known=["a", "b"])
    write("validation", ["ant"])
    with pytest.raises(ValueError, match="validation has classes that training lacks: ant"):
        create_datasets(DataConfig(config.name, str(tmp_path / "again")))


@pytest.mark.parametrize("labels, kind", [([2, 0, None, 1], "int64"), ([True, False, None, True], "bool")])
def test_labels_that_are_numbers_or_missing(labels, kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation"):
        rows = {"image": [picture(seed=i) for i in range(4)], "label": labels}
        features = datasets.Features(image=datasets.Image(), label=datasets.Value(kind))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "mine" / f"{split}.parquet")
    train, _, classes = create_datasets(DataConfig(f"hfds/{tmp_path}/mine", str(tmp_path / "cache")))
    assert classes == ["0", "1", "2"][: len(set(labels)) - 1]
    targets = [train[i][1] for i in (0, 1, 3)]
    assert targets == [int(labels[i]) for i in (0, 1, 3)] and all(type(target) is int for target in targets)
    assert train.targets == targets
    with pytest.raises(ValueError, match="has no label"):
        train[2]


def test_shards_hold_what_pillow_reads_and_hidden_files(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in (
            ("./._0.tif", b"not an image"),
            ("./0.tif", encoded("TIFF")),
            ("./0.cls", b"1"),
            ("./1.BMP", encoded("BMP", seed=1)),
            ("./1.cls", b"0"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    split = "train-0.tar|2"
    data = DataConfig("wds", str(tmp_path), train_split=split, val_split=split, num_classes=2)
    _, val, _ = create_datasets(data)
    samples = [read() for _, _, read in val]
    assert [target for _, target in samples] == [1, 0]
    assert all(np.array_equal(image, picture(seed=seed)) for seed, (image, _) in enumerate(samples))
