"""train_imagenet.py, run as a user runs it: small images and few epochs, but real data and the whole road."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from scripts import REFUSED, finish, load, log_of, refused, start
from timm.data import Mixup
from torch import nn

from training import checkpoint
from training.classification import Classification, complete_model_args
from training.config import AugmentConfig, Config
from training.distributed import Processes
from training.seeding import seed_all
from training.setup import create_model

ROOT = Path(__file__).parents[2]
script = load("train_imagenet")

FAST = ["--model.name", "cifar_resnet20", "--data.img_size", "8", "--batch_size", "96", "--threads", "1"]


def test_digits_in_a_process_of_its_own(tmp_path):
    output = tmp_path / "run"
    config = tmp_path / "c.yaml"
    config.write_text("epochs: 5\noptim:\n  lr: 0.2\n  ema: 0.9\n")
    argv = ["--config", str(config), *FAST, "--epochs", "2", "--output", str(output)]
    code, out, err = finish(start("train_imagenet", argv, cwd=tmp_path))
    assert code == 0, err
    lines = out.splitlines()
    assert "10 classes" in lines[0] and "1344 images an epoch" in lines[0]
    assert lines[1].startswith("epoch 1/2 ") and lines[2].startswith("epoch 2/2 ") and len(lines) == 4
    assert "images/s]" not in err  # no progress bar away from a terminal

    log = log_of(output)
    assert [row["epoch"] for row in log] == ["1", "2"] and [row["step"] for row in log] == ["14", "28"]
    assert float(log[1]["train_loss"]) < float(log[0]["train_loss"]) < 2.6
    for file in ("last.pt", "best.pt"):
        ckpt = checkpoint.load(output / file)
        model = timm.create_model(ckpt["model"], **ckpt["model_args"])
        model.load_state_dict(ckpt["ema"] or ckpt["state_dict"])
        assert ckpt["model_args"] == {"num_classes": 10, "in_chans": 3}
        assert ckpt["data"]["input_size"] == [3, 8, 8] and ckpt["data"]["class_names"] == list("0123456789")
        assert len(ckpt["data"]["mean"]) == len(ckpt["data"]["std"]) == 3
    assert checkpoint.load(output / "last.pt")["epoch"] == 2
    assert {path.name for path in output.iterdir() if path.suffix != ".sha256"} == {
        "best.pt",
        "best.safetensors",
        "config.json",
        "last.pt",
        "log.csv",
        "step-00000014.pt",
        "step-00000028.pt",
    }
    best = checkpoint.load(output / "best.pt")
    loaded = timm.create_model(
        "cifar_resnet20", num_classes=10, checkpoint_path=str(output / "best.safetensors")
    ).state_dict()
    assert all(torch.equal(value, best["ema"][name]) for name, value in loaded.items())


def test_evaluation_repeats_the_accuracy_of_the_checkpoint(tmp_path, capsys):
    run = [
        *FAST,
        "--epochs",
        "1",
        "--optim.ema",
        "0.5",
        "--output",
        str(tmp_path / "run"),
        "--model.args.in_chans",
        "1",
    ]
    assert script.main(run) == 0
    path = tmp_path / "run" / "best.pt"
    metrics = checkpoint.load(path)["metrics"]
    capsys.readouterr()
    assert script.main(["--eval", str(path), "--output", str(tmp_path / "none"), "--batch_size", "77"]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    assert f"top1 {metrics['top1']:.4f}" in printed and f"top5 {metrics['top5']:.4f}" in printed
    assert not (tmp_path / "none").exists()

    assert script.main(["--eval", str(path), "--target_top1", "99.9"]) == 1
    assert f"top-1 accuracy {metrics['top1']:.2f} % is below the target 99.90 %" in capsys.readouterr().err
    assert script.main(["--eval", str(path), "--target_top1", f"{metrics['top1'] - 1e-6}"]) == 0

    again = refused("train_imagenet", run, capsys)
    assert "holds a run already: go on with --resume auto" in again and "--overwrite" in again


def test_folder_of_another_size_grey_and_with_three_classes(tmp_path):
    for split, images in (("train", 4), ("val", 2)):
        for name in ("ant", "bee", "cow"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = np.random.default_rng(i).integers(0, 256, (19, 23), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.jpg")
    argv = [
        "--model.name",
        "cifar_resnet20",
        "--data.name",
        "folder",
        "--data.dir",
        str(tmp_path / "data"),
        "--data.img_size",
        "11",
        "--data.crop_pct",
        "0.9",
        "--model.args.in_chans",
        "1",
        "--augment.crop",
        "resized",
        "--optim.name",
        "adamw",
        "--optim.args.betas",
        "[0.9, 0.95]",
        "--optim.lr",
        "0.001",
        "--bf16",
        "true",
        "--batch_size",
        "5",
        "--epochs",
        "1",
        "--threads",
        "1",
        "--output",
        str(tmp_path / "run"),
    ]
    assert script.main(argv) == 0
    ckpt = checkpoint.load(tmp_path / "run" / "last.pt")
    assert ckpt["data"]["class_names"] == ["ant", "bee", "cow"] and ckpt["data"]["input_size"] == [1, 11, 11]
    assert ckpt["model_args"] == {"num_classes": 3, "in_chans": 1} and len(ckpt["data"]["mean"]) == 1
    assert ckpt["metrics"]["top5"] == 100 and ckpt["step"] == 2
    assert ckpt["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert ckpt["state_dict"]["conv1.weight"].dtype == torch.float32


def test_a_model_of_fixed_size_gets_the_size_of_the_images():
    config = Config()
    config.model.name, config.data.img_size = "vit_tiny_patch16_224", 48
    args = complete_model_args(config, 10, 3)
    assert args == {"num_classes": 10, "in_chans": 3, "img_size": 48}
    assert create_model("vit_tiny_patch16_224", args).patch_embed.grid_size == (3, 3)
    config.model.name = "resnet18"
    assert complete_model_args(config, 10, 3) == {"num_classes": 10, "in_chans": 3}


def test_losses_are_those_of_torch_and_timm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    images, targets = torch.randn(6, 3, 4, 4), torch.tensor([1, 2, 3, 4, 5, 6])

    def loss(**augment):
        config = Config(augment=AugmentConfig(**augment))
        return Classification(config, Processes(torch.device("cpu"))).loss(model, images.clone(), targets)

    expected = 0.8 * F.cross_entropy(model(images), targets) - 0.2 * F.log_softmax(model(images), -1).mean()
    assert torch.allclose(loss(label_smoothing=0.2), expected)

    seed_all("somewhere")
    mixed = loss(label_smoothing=0.2, mixup=0.4)
    seed_all("somewhere")
    mixed_images, soft = Mixup(mixup_alpha=0.4, label_smoothing=0.2, num_classes=10)(images.clone(), targets)
    assert torch.allclose(soft.sum(1), torch.ones(6)) and not torch.equal(mixed_images, images)
    assert torch.allclose(mixed, -(soft * F.log_softmax(model(mixed_images), -1)).sum(1).mean())


def test_compiled_models_save_plain_names(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    argv = [*FAST, "--epochs", "1", "--compile", "true", "--optim.ema", "0.9", "--output", str(tmp_path)]
    assert script.main(argv) == 0
    assert compiled == ["CifarResNet", "CifarResNet"]
    assert "conv1.weight" in checkpoint.load(tmp_path / "last.pt")["ema"]


def test_a_loss_that_is_not_finite_ends_the_run_with_code_1(tmp_path, capsys):
    argv = [*FAST, "--epochs", "3", "--optim.lr", "1e30", "--output", str(tmp_path)]
    assert script.main(argv) == 1
    error = capsys.readouterr().err.strip()
    assert re.fullmatch(
        r"error: the (loss|gradient norm) is (nan|inf) at step \d+, epoch \d+; its images are digits \d+, digits \d+, "
        rf"digits \d+ … 96 in {tmp_path}/not_finite.txt; there is no checkpoint yet",
        error,
    )
    assert len((tmp_path / "not_finite.txt").read_text().splitlines()) == 96


@pytest.mark.parametrize(
    "argv, named",
    [
        *REFUSED,
        (["--model.name", "cifar_resnt20"], "Unknown model (cifar_resnt20); similar names: cifar_resnet20"),
        (["--model.args.num_classes", "7"], "model.args.num_classes is 7, but digits has 10 classes"),
        (["--data.name", "folder", "--data.dir", "/nowhere"], "data.dir /nowhere is not a directory"),
        (["--data.mean", "[0.5, 0.5]"], "data.mean must have 3 values, one per channel, got [0.5, 0.5]"),
        (["--model.args.in_chans", "4"], "in_chans must be 1 (grey) or 3 (colour) for images, got 4"),
        (["--augment.auto_augment", "brand"], "augment.auto_augment is not a policy timm knows: 'brand'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(argv, named, tmp_path, capsys):
    assert named in refused("train_imagenet", [*FAST, "--output", str(tmp_path / "run"), *argv], capsys)
    assert not (tmp_path / "run").exists()


def test_exit_codes_reach_the_shell(tmp_path):
    code, out, err = finish(start("train_imagenet", ["--data.name", "folder"], cwd=tmp_path))
    assert (code, out, err) == (2, "", "error: data.dir must be given for data.name folder\n")


def test_a_dry_run_says_what_an_epoch_takes_and_writes_nothing(tmp_path, capsys):
    argv = [*FAST, "--epochs", "3", "--optim.lr", "0.05", "--output", str(tmp_path / "run"), "--dry-run"]
    assert script.main(argv) == 0
    out = capsys.readouterr().out
    config = yaml.safe_load(out.partition("cifar_resnet20: 0.27 M parameters")[0])
    assert config["optim"]["lr"] == 0.05 and config["epochs"] == 3 and config["data"]["img_size"] == 8
    assert re.search(r"14 steps an epoch, \S+ s each after \S+ s for the first: about \d+ s an epoch", out)
    assert re.search(r"at most \d+ MiB of this process", out)
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_log(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert script.main([*FAST, "--epochs", "2", "--output", str(tmp_path), "--tensorboard"]) == 0
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    log = log_of(tmp_path)
    for name in ("train_loss", "top1", "lr"):
        written = [(scalar.step, scalar.value) for scalar in events.Scalars(name)]
        assert written == [(int(row["step"]), pytest.approx(float(row[name]), rel=1e-5)) for row in log]


def test_the_accuracy_before_training_is_that_of_the_weights_given(tmp_path, capsys):
    """A plain network trained, then a block inserted: the same answers until it is trained on."""
    plain = [*FAST, "--epochs", "1", "--output", str(tmp_path / "plain")]
    assert script.main(plain) == 0
    trained = checkpoint.load(tmp_path / "plain" / "best.pt")
    capsys.readouterr()
    overlay = {"file": str(tmp_path / "plain" / "best.safetensors"), "num_classes": 10}
    argv = [*plain[:-1], str(tmp_path / "cbam"), "--eval-first", "--model.pretrained", "true"]
    argv += ["--model.name", "cifar_resnet20_cbam", "--model.args.pretrained_cfg_overlay", json.dumps(overlay)]
    assert script.main(argv) == 0
    (before,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("before training")]
    metrics = trained["metrics"]
    assert before == "before training  " + "  ".join(f"{name} {metrics[name]:.4f}" for name in ("loss", "top1", "top5"))


def test_a_shortened_run_may_miss_the_target_of_its_configuration(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("epochs: 2\ntarget_top1: 99.5\n")
    argv = [*FAST, "--config", str(tmp_path / "c.yaml"), "--data.train_images", "192"]
    short = [*argv, "--epochs", "1", "--output", str(tmp_path / "short")]
    assert script.main(short) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("note: top-1 accuracy ") and last.endswith("which was set for 2 epochs; these were 1")
    assert script.main(["--resume", str(tmp_path / "short" / "last.pt"), "--epochs", "2"]) == 0  # has no target
    for more in (["--epochs", "1", "--target_top1", "99.5"], []):  # a target of one's own, and all epochs
        assert script.main([*argv, *more, "--output", str(tmp_path / f"{len(more)}")]) == 1
        assert "is below the target 99.50 %" in capsys.readouterr().err
