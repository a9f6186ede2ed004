"""train_pixels.py, run as a user runs it: one small layer and few epochs, but real images and the whole road."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scripts import REFUSED, load, log_of, names, refused
from torch import nn

from backbones.pixel import PixelTransformer
from training import checkpoint
from training.config import parse
from training.datasets import Digits
from training.pixels import PixelConfig, complete_model_args, create_images, integers, save_pictures

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*_pixels.yaml"))
script = load("train_pixels")

TINY = '{"dim": 26, "depth": 1, "num_heads": 2, "blocks": "dense"}'
FAST = ["--model.args", TINY, "--threads", "1", "--device", "cpu"]


# configuration and images


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_says_what_was_measured(path):
    config = parse("", ["--config", str(path)], PixelConfig)
    assert config.model.name == f"pixel_{path.stem.removesuffix('_pixels')}"
    assert complete_model_args(config)["levels"] == timm.get_pretrained_cfg(config.model.name).num_classes
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Time:", "Result:"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path.name} lacks {word}"
    assert f"--config configs/{path.name}" in header[0]


def test_a_typo_in_a_file_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("optim:\n  lrr: 3\n")
    with pytest.raises(SystemExit) as exit:
        script.main(["--config", str(path)])
    assert exit.value.code == 2
    assert "lrr" in capsys.readouterr().err


def test_digits_are_counts_and_the_split_is_the_classifier_s():
    from sklearn.datasets import load_digits

    train, test = create_images(PixelConfig().data, 1)
    assert (len(train), len(test)) == (1437, 360)
    assert (train.targets, test.targets) == (Digits(train=True).targets, Digits(train=False).targets)
    images = torch.stack([integers(8)(image) for part in (train, test) for image, _ in part])
    assert images.dtype == torch.int64 and images.shape == (1797, 1, 8, 8)
    pixels = load_digits().images.astype(int)
    assert sorted(image.tobytes() for image in images.numpy()) == sorted(image.tobytes() for image in pixels)


def test_larger_images_are_averaged_and_cut():
    pixels = np.arange(12 * 8 * 3).reshape(12, 8, 3).astype(np.uint8)
    values = integers(4)(Image.fromarray(pixels))  # to 6×4 by means of 2×2 pixels, then the rows in the middle
    means = pixels.astype(float).reshape(6, 2, 4, 2, 3).mean(axis=(1, 3))[1:5]
    assert values.dtype == torch.int64 and values.shape == (3, 4, 4)
    assert np.abs(values.permute(1, 2, 0).numpy() - means).max() <= 0.5


def test_pictures_hold_the_values(tmp_path):
    images = torch.randint(17, (2, 3, 1, 5, 7))
    save_pictures(tmp_path / "p.png", list(images), 17, side=20)
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture.shape == (2 * 15 + 3 * 4, 3 * 21 + 4 * 4, 3)  # each value is 3×3 pixels
    corner = picture[4 + 15 + 4 :, 4 + 2 * (21 + 4) :][1:15:3, 1:21:3, 0]
    assert np.abs(corner - images[1, 2, 0].numpy() * 255 / 16).max() <= 0.5


# runs


def test_digits(tmp_path, capsys):
    output, config = tmp_path / "run", tmp_path / "c.yaml"
    config.write_text("epochs: 5\noptim:\n  ema: 0.9\npictures: {every: 2, count: 3}\n")
    argv = ["--config", str(config), *FAST, "--epochs", "3", "--output", str(output)]
    assert script.main(argv) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "input 1×8×8, 17 levels; digits: 1344 images an epoch, 360 to evaluate" in lines[0]
    assert lines[1].startswith("epoch 1/3 ") and lines[3].startswith("epoch 3/3 ") and len(lines) == 5
    assert "images/s]" not in err  # no progress bar away from a terminal

    log = log_of(output)
    assert [row["epoch"] for row in log] == ["1", "2", "3"] and log[-1]["step"] == "42"
    bits = [[float(row[f"{part}_bits"]) for row in log] for part in ("train", "test")]
    for part in bits:
        assert math.log2(17) > part[0] > part[1] > part[2] > 1.8
    drawn = [f"{kind}-000{epoch}.png" for kind in ("completions", "samples") for epoch in (2, 3)]
    assert names(output) == ["best.pt", "best.safetensors", *drawn[:2], "config.json", "last.pt", "log.csv", *drawn[2:]]
    assert Image.open(output / drawn[0]).size == Image.open(output / drawn[2]).size[:1] + (3 * 68 + 4,)

    ckpt = checkpoint.load(output / "best.pt")
    model = timm.create_model(ckpt["model"], **ckpt["model_args"]).eval()
    model.load_state_dict(ckpt["ema"] or ckpt["state_dict"])
    assert ckpt["data"]["input_size"] == [1, 8, 8] and ckpt["data"]["levels"] == 17 and ckpt["epoch"] == 3
    images = torch.stack([integers(8)(image) for image, _ in Digits(train=False, raw=True)])
    with torch.no_grad():
        assert model.bits_per_dim(images).item() == pytest.approx(ckpt["metrics"]["bits_per_dim"], rel=1e-5)


def test_evaluation_repeats_the_bits_of_the_checkpoint_and_meets_targets(tmp_path, capsys):
    run = [*FAST, "--epochs", "1", "--output", str(tmp_path / "run")]
    assert script.main(run) == 0
    path = tmp_path / "run" / "best.pt"
    bits = checkpoint.load(path)["metrics"]["bits_per_dim"]
    assert names(path.parent) == [
        "best.pt",
        "best.safetensors",
        "config.json",
        "last.pt",
        "log.csv",
    ]  # no pictures by default
    capsys.readouterr()
    assert script.main(["--eval", str(path), "--output", str(tmp_path / "none"), "--batch_size", "77"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"bits_per_dim {bits:.4f}"
    assert not (tmp_path / "none").exists()
    assert script.main(["--eval", str(path), "--target_bits", "1"]) == 1
    assert f"{bits:.3f} bits per dimension are above the target 1.000" in capsys.readouterr().err
    assert script.main(["--eval", str(path), "--target_bits", f"{bits + 1e-3}"]) == 0
    other = ["--eval", str(path), "--data.name", "cifar10", "--data.dir", str(tmp_path)]
    assert "holds a model of 17 levels, cifar10 has 256" in refused("train_pixels", other, capsys)


def test_colour_images_of_a_folder_in_two_streams(tmp_path):
    for split, images in (("train", 4), ("val", 2)):
        for name in ("ant", "bee"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = np.random.default_rng(i).integers(0, 256, (19, 23, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    argv = ["--model.name", "pixel_imagenet32_axial", "--data.name", "folder", "--data.dir", str(tmp_path / "data")]
    argv += ["--model.args", '{"dim": 22, "depth": 1, "outer_depth": 1, "num_heads": 2}', "--data.img_size", "5"]
    argv += ["--batch_size", "3", "--epochs", "1", "--threads", "1", "--bf16", "true", "--device", "cpu"]
    argv += ["--pictures.every", "1", "--pictures.count", "9", "--output", str(tmp_path / "run")]
    assert script.main(argv) == 0
    ckpt = checkpoint.load(tmp_path / "run" / "last.pt")
    assert ckpt["data"]["input_size"] == [3, 5, 5] and ckpt["data"]["levels"] == 256 and ckpt["step"] == 2
    assert ckpt["metrics"]["bits_per_dim"] == pytest.approx(8, abs=0.2)
    assert ckpt["state_dict"]["head.weight"].dtype == torch.float32
    assert Image.open(tmp_path / "run" / "completions-0001.png").size[0] == 4 * (65 + 4) + 4  # all 4 test images


def test_recomputed_activations_train_the_same(tmp_path, monkeypatch):
    seen = []
    forward = PixelTransformer.forward
    monkeypatch.setattr(
        PixelTransformer, "forward", lambda self, x: seen.append(self.grad_checkpointing) or forward(self, x)
    )
    for recompute in ("true", "false"):
        argv = [*FAST, "--epochs", "1", "--model.args.drop_rate", "0.1", "--recompute", recompute]
        assert script.main([*argv, "--output", str(tmp_path / recompute)]) == 0
        assert set(seen) == {recompute == "true"}
        seen.clear()
    a, b = (checkpoint.load(tmp_path / name / "last.pt")["state_dict"] for name in ("true", "false"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_compiled_models_save_plain_names(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    argv = [*FAST, "--epochs", "1", "--compile", "true", "--optim.ema", "0.9", "--output", str(tmp_path)]
    assert script.main(argv) == 0
    assert compiled == ["PixelTransformer", "PixelTransformer"]
    assert "head.weight" in checkpoint.load(tmp_path / "last.pt")["ema"]


def test_a_loss_that_is_not_finite_ends_the_run_with_code_1(tmp_path, capsys):
    argv = [*FAST, "--epochs", "2", "--optim.lr", "1e30", "--optim.warmup_epochs", "0", "--output", str(tmp_path)]
    assert script.main(argv) == 1
    assert re.match(r"error: the (loss|gradient norm) is (nan|inf) at step", capsys.readouterr().err)


@pytest.mark.parametrize(
    "argv, named",
    [
        *REFUSED,
        (["--pictures.evry", "3"], "evry"),
        (["--data.crop_pct", "0.9"], "crop_pct"),
        (["--data.name", "digit"], "data.name must be digits, cifar10 or folder, got 'digit'"),
        (["--data.img_size", "9"], "data.img_size must be 8 for digits, whose pixels are counts, got 9"),
        (["--pictures.count", "0"], "pictures.count must be at least 1, got 0"),
        (["--pictures.temperature", "0"], "pictures.temperature must be positive, got 0.0"),
        (["--model.name", "pixel_digit"], "Unknown model (pixel_digit); similar names: pixel_digits"),
        (["--model.name", "cifar_resnet20", "--model.args", "{}"], "unexpected keyword argument"),
        (["--model.args.blocks", "dens"], "block='dens': no such block; nearest: dense"),
        (["--model.args.levels", "16"], "model.args.levels is 16, but digits has 17"),
        (["--model.args.img_size", "9"], "model.args.img_size is 9, but digits has 8"),
        (["--model.args.in_chans", "3"], "in_chans must be 1 (grey) for digits, got 3"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, named, tmp_path, capsys):
    assert named in refused("train_pixels", [*FAST, "--output", str(tmp_path / "run"), *argv], capsys)
    assert not (tmp_path / "run").exists()
