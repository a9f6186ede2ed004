"""What real folders hold and real machines do: each works, or gives one clear line and exit code 2."""

import os
import resource
import signal
import warnings

import numpy as np
import pytest
from pictures import make_folder, picture
from PIL import Image
from scripts import CLASSIFY, PIXELS, load, options

from training import checkpoint
from training.log import read_rows

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
TINY = options(model__name="cifar_resnet20", data__img_size=8, batch_size=8, threads=1, epochs=1, data__name="folder")
PIXEL = [*PIXELS, *options(model__name="pixel_imagenet32", data__name="folder", data__img_size=5, batch_size=8)]
SCRIPTS = {"train_imagenet": TINY, "train_pixels": PIXEL}


def exif_turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(path, "JPEG", exif=exif)


def bomb(path):
    """A PNG of a few kilobytes that says it has 400 million pixels."""
    Image.new("1", (20_000, 20_000)).save(path, "PNG")


def cut_off(path):
    picture(64, 64).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:900])


KINDS = {
    "1×1": lambda path: picture(1, 1).save(path, "PNG"),
    "grey": lambda path: picture(mode="L").save(path, "PNG"),
    "CMYK": lambda path: picture(mode="CMYK").save(path, "JPEG"),
    "16-bit": lambda path: Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800).save(path, "PNG"),
    "palette": lambda path: picture(mode="P").save(path, "GIF"),
    "transparent": lambda path: picture(mode="RGBA").save(path, "PNG"),
    "turned": exif_turned,
}
UNREADABLE = {
    "cut off": cut_off,
    "bomb": bomb,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "data", images=10)


def run(script, folder, output, *argv):
    return load(script).main([*SCRIPTS[script], *options(data__dir=folder, output=output), *argv])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_kind_of_image_is_trained_on_and_evaluated(script, folder, tmp_path, capsys):
    for split in ("train", "val"):
        for number, write in enumerate(KINDS.values()):
            write(folder / split / "cat" / f"kind-{number}.jpg")
    assert run(script, folder, tmp_path / "run", "--epochs", "2") == 0
    out, err = capsys.readouterr()
    assert "24 images an epoch, 27 to evaluate" in out and "error" not in err
    assert not (tmp_path / "run" / "bad_images.csv").exists()


@pytest.mark.parametrize("script, kind", [("train_imagenet", kind) for kind in UNREADABLE] + [("train_pixels", "text")])
def test_an_unreadable_image_is_replaced_counted_and_named(script, kind, folder, tmp_path, capsys):
    bad = folder / "train" / "cat" / "4.png"
    UNREADABLE[kind](bad)
    argv = options(batch_size=20, epochs=2)
    assert run(script, folder, tmp_path / "run", *argv, "--max-bad", "0.1") == 0
    out = capsys.readouterr().out
    assert "note: unreadable images, replaced by others: 1; they are in" in out
    rows = read_rows(tmp_path / "run" / "bad_images.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "1"), ("2", "2")]
    assert all(row["image"].startswith(f"{bad}: ") for row in rows)

    assert run(script, folder, tmp_path / "strict", *argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(
        f"error: 1 of the epoch's 20 training images can't be read, more than max_bad = 0.001; the last is {bad}: "
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unreadable_image_to_evaluate_is_an_error_that_names_it(script, workers, folder, tmp_path, capsys):
    bad = folder / "val" / "dog" / "7.png"
    cut_off(bad)
    assert run(script, folder, tmp_path / "run", *options(data__workers=workers, max_bad=1.0)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: 1 of the images to evaluate can't be read, the first is {bad}: OSError: image file")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_out_of_range_is_one_line(workers, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    for split in ("train", "validation"):
        rows = {"image": [picture(seed=i) for i in range(8)], "label": [-1 if i == 3 else i % 2 for i in range(8)]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "mine" / f"{split}.parquet")
    argv = options(data__name=f"hfds/{tmp_path}/mine", data__workers=workers)
    assert run("train_imagenet", tmp_path / "cache", tmp_path / "run", *argv) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has the label -1, but labels are 0..1; there is no checkpoint yet" in line


@pytest.mark.parametrize(
    "classes, splits, named",
    [
        ((), (), "is not a directory"),
        ((), ("train", "val"), "Found 0 images"),
        (("cat",), ("train", "val"), "must have at least 2 classes, has 1"),
        (("cat", "dog"), ("train",), "has no folder val or validation"),
    ],
)
def test_folders_that_can_not_be_trained_on(classes, splits, named, tmp_path, capsys):
    for split in splits:
        (tmp_path / "data" / split).mkdir(parents=True)
    make_folder(tmp_path / "data", classes, splits)
    assert run("train_imagenet", tmp_path / "data", tmp_path / "run") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1 and named in lines[-1]
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, capsys):
    argv = [*CLASSIFY, *options(output=tmp_path, epochs=2, save_every=3, keep=2, resume="auto")]
    assert load("train_imagenet").main([*argv, "--epochs", "1"]) == 0
    last = checkpoint.load(tmp_path / "last.pt")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # beyond the limit is then an error, as on a full disk
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        assert load("train_imagenet").main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and f"the last good checkpoint is {tmp_path}/step-{last['step']:08d}.pt" in line
    assert checkpoint.load(tmp_path / "last.pt")["step"] == last["step"]
    assert load("train_imagenet").main(argv) == 0
    assert checkpoint.load(tmp_path / "last.pt")["epoch"] == 2 and not list(tmp_path.glob(".*"))


def test_a_folder_that_can_not_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert load("train_imagenet").main([*CLASSIFY, "--output", str(tmp_path / "file" / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "Not a directory" in line


def test_a_folder_of_another_owner_is_one_line(tmp_path, capsys):
    assert load("train_imagenet").main([*CLASSIFY, "--output", "/proc/self"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_names_of_files_need_not_be_utf_8(folder, tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "train" / "cat" / "4.png").rename(folder / "train" / "cat" / name)
    (folder / "train" / "cat" / name).write_text("nothing")
    assert run("train_imagenet", folder, tmp_path / "run", *options(batch_size=20, max_bad=0.1)) == 0
    assert name in read_rows(tmp_path / "run" / "bad_images.csv")[0]["image"]
    assert run("train_imagenet", folder, tmp_path / "strict", *options(batch_size=20)) == 2
    assert "caf\\udce9.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, named",
    [
        (options(model__name="vit_tiny_patch16_224", data__img_size=8), "vit_tiny_patch16_224"),
        (options(model__name="vit_tiny_patch4_32", model__args__img_size=100), "does not take images of"),
        (
            options(batch_size=6, optim__accumulate=2, augment__mixup=0.2),
            "batch_size must be a multiple of 2 × optim.acc",
        ),
    ],
)
def test_a_model_that_does_not_take_the_images_is_one_line(argv, named, folder, tmp_path, capsys):
    try:
        assert run("train_imagenet", folder, tmp_path / "run", *argv) == 2
    except SystemExit as exit:
        assert exit.code == 2
    assert named in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_reports_are_strict_about_images_and_classes(folder, tmp_path, capsys):
    output = tmp_path / "run"
    assert run("train_imagenet", folder, output) == 0
    make_folder(tmp_path / "other", ("ant", "bee"))
    scripts = {
        "report": ["--run", str(output)],
        "show_attention": ["--checkpoint", str(output / "best.pt"), "--path", str(tmp_path / "a.png")],
    }
    for name, argv in scripts.items():
        assert load(name).main([*argv, "--dir", str(tmp_path / "other")]) == 2
        assert "knows the classes ['cat', 'dog'], the data have ['ant', 'bee']" in capsys.readouterr().err
    assert load("report").main([*scripts["report"], "--path", str(tmp_path)]) == 2
    cut_off(folder / "val" / "cat" / "0.png")
    assert load("report").main(scripts["report"]) == 2
    assert "an image to evaluate can't be read: " in capsys.readouterr().err
    assert load("train_imagenet").main(["--eval", str(output / "best.pt"), *options(data__name="digits")]) == 2
