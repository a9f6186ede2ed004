"""Pixel models as a task: images as integers, bits per dimension, and pictures of what is drawn."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import Compose
from torchvision.utils import make_grid, save_image

from training.config import DataConfig, ModelConfig, OptimConfig, RunConfig, check, complete_source
from training.datasets import Digits, create_datasets
from training.distributed import Processes
from training.seeding import seed_of
from training.task import Task
from training.transforms import eval_transform

LEVELS = {"digits": 17, "cifar10": 256, "folder": 256}
SIZES = {"digits": 8, "cifar10": 32, "folder": None}


@dataclass
class ImageConfig:
    """Images.

    Args:
        name: digits (8×8, 17 levels), cifar10, or folder; null takes folder if dir is given, else digits.
        dir: where the images are: the root of cifar10, or of DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE.
        download: let cifar10 be downloaded into dir.
        img_size: side of the square that is modelled, in pixels; larger images are resized, and cut to their centre.
            null takes that of digits and cifar10, and for a folder the model's.
        workers: loader processes for training, and as many for testing; 0 loads in the main process.
    """

    name: str | None = None
    dir: str | None = None
    download: bool = False
    img_size: int | None = None
    workers: int = 0

    def __post_init__(self):
        complete_source(self)
        check("data.name", self.name, self.name in LEVELS, "digits, cifar10 or folder")
        check("data.img_size", self.img_size, self.img_size is None or self.img_size >= 1, "at least 1")
        if self.name == "digits":
            check("data.img_size", self.img_size, self.img_size in (None, 8), "8 for digits, whose pixels are counts")
        check("data.workers", self.workers, self.workers >= 0, "0 or more")


@dataclass
class PicturesConfig:
    """Pictures drawn from the model while it trains: PNGs of samples, and of test images with the lower half completed.

    Args:
        every: epochs from one to the next, the last epoch always among them; 0 draws none.
        count: images of each.
        temperature: divides the logits; below 1 prefers what is likely.
        top_k: draw each value from the k likeliest only; null from all.
    """

    every: int = 0
    count: int = 16
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self):
        check("pictures.every", self.every, self.every >= 0, "0 or more")
        check("pictures.count", self.count, self.count >= 1, "at least 1")
        check("pictures.temperature", self.temperature, self.temperature > 0, "positive")
        check("pictures.top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")


def _adamw() -> OptimConfig:
    return OptimConfig("adamw", lr=4e-3, weight_decay=0.01, args={"betas": [0.9, 0.95]}, warmup_epochs=3, clip_grad=1.0)


@dataclass
class PixelConfig(RunConfig):
    """A run that trains a pixel model: a network with values (images as integers in the order it models them).

    Args:
        data: the images.
        pictures: drawn while it trains.
        recompute: compute activations again in the backward pass instead of keeping them.
        target_bits: exit with code 1 if the best test bits per dimension stay above this.
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig("pixel_digits"))
    optim: OptimConfig = field(default_factory=_adamw)
    epochs: int = 36
    batch_size: int = 96
    output: str = "runs/pixels"
    data: ImageConfig = field(default_factory=ImageConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    recompute: bool = False
    target_bits: float | None = None


class Pixels(Task):
    """Images as integers, each value predicted from those before it; the best checkpoint has the fewest bits."""

    best_of, sign = "bits_per_dim", -1

    def __init__(self, config: PixelConfig, processes: Processes, saved: dict | None = None):
        self.config, self.processes = config, processes
        inserted = config.model.insert
        check("model.insert", inserted, inserted is None, "left out: model.args.blocks names a pixel model's own")
        self.levels, self.notes = LEVELS[config.data.name], []
        if saved and saved["model_args"].get("levels") != self.levels:
            has = f"{config.data.name} has {self.levels}"
            raise ValueError(f"{config.eval} holds a model of {saved['model_args'].get('levels')} levels, {has}")
        if saved and config.data.img_size not in (None, saved["model_args"]["img_size"]):
            has = saved["model_args"]["img_size"]
            raise ValueError(f"data.img_size is {config.data.img_size}, but {config.eval} holds a model of {has}")
        self.model_args = saved["model_args"] | config.model.args if saved else complete_model_args(config)

        def create():
            return create_images(config.data, self.model_args["in_chans"], self.notes.append)

        self.train_set, self.val_set = processes.main_first(create) if config.data.download else create()

    def prepare(self, model: nn.Module):
        """Recompute activations, if so configured."""
        model.set_grad_checkpointing(self.config.recompute)

    def data(self, model: nn.Module) -> dict:
        """Size and levels; mean and std leave integers as they are."""
        channels, size = self.model_args["in_chans"], self.model_args["img_size"]
        scale = dict(mean=[0.0] * channels, std=[1.0] * channels)
        return dict(input_size=[channels, size, size], levels=self.levels, **scale)

    def transforms(self, data: dict) -> tuple:
        size = data["input_size"][-1]
        return integers(size), integers(size)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Bits per dimension."""
        return model.bits_per_dim(images)

    def measure(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"bits_per_dim": model.bits_per_dim(images)}

    def columns(self, train_loss: float, metrics: dict[str, float]) -> dict[str, float]:
        return {"train_bits": train_loss, "test_bits": metrics["bits_per_dim"]}

    def title(self, data: dict) -> str:
        return f"{self.levels} levels"

    def told(self, row: dict) -> str:
        return f"train {row['train_bits']:.3f}  test {row['test_bits']:.3f} bits/dim"

    def missed(self, best: float) -> str | None:
        target = self.config.target_bits
        if target is None or best <= target:
            return None
        return f"{best:.3f} bits per dimension are above the target {target:.3f}"

    def draw(self, run):
        """Write samples and completions; what is drawn depends on (seed, epoch) alone."""
        pictures, epoch = self.config.pictures, run.epoch
        if not pictures.every or (epoch % pictures.every and epoch != self.config.epochs):
            return
        model, device = run.whole_model(), self.processes.device
        generator = torch.Generator(device).manual_seed(seed_of("draw", self.config.seed, epoch))
        progress = self.processes.main and sys.stderr.isatty()
        options = dict(temperature=pictures.temperature, top_k=pictures.top_k, generator=generator, progress=progress)
        samples = model.generate(pictures.count, **options)

        count = min(pictures.count, len(self.val_set))
        whole = torch.stack([run.val_batches.samples[0, i][0] for i in range(count)]).to(device)
        rows = whole.shape[-2] // 2
        given = whole.clone()
        given[..., rows:, :] = self.levels // 2
        done = model.generate(whole, rows, **options)
        if self.processes.main:
            save_pictures(run.output / f"samples-{epoch:04d}.png", list(samples.split(8)), self.levels)
            save_pictures(run.output / f"completions-{epoch:04d}.png", [given, done, whole], self.levels)


def complete_model_args(config: PixelConfig) -> dict:
    """The arguments of timm.create_model: those of the configuration, and what follows from the data."""
    data = config.data
    published = timm.get_pretrained_cfg(config.model.name)
    size = data.img_size or SIZES[data.name] or (published and published.input_size[-1])
    follows = {"img_size": size, "levels": LEVELS[data.name]}
    args = {"in_chans": 1 if data.name == "digits" else 3} | follows | config.model.args
    for key, value in follows.items():
        if args[key] != value:
            raise ValueError(f"model.args.{key} is {args[key]}, but {data.name} has {value}")
    return args


def create_images(
    config: ImageConfig, in_chans: int, tell: Callable[[str], None] = lambda line: None
) -> tuple[Dataset, Dataset]:
    """The training set and the test set, as pairs (PIL image, class index); `tell` as in `create_datasets`.

    Raises:
        ValueError: as `create_datasets`; in_chans is not 1 for digits.
    """
    if config.name == "digits":
        if in_chans != 1:
            raise ValueError(f"in_chans must be 1 (grey) for digits, got {in_chans}")
        return Digits(train=True, raw=True), Digits(train=False, raw=True)
    source = DataConfig(config.name, config.dir, config.download, workers=config.workers)
    train, test, _ = create_datasets(source, in_chans, tell=tell)
    return train, test


def integers(img_size: int) -> Compose:
    """Transform of a PIL image to int64 (C, img_size, img_size), values as they are; larger images are averaged."""
    return Compose([*eval_transform((img_size, img_size), "box").transforms, torch.Tensor.long])


def save_pictures(path: Path, rows: list[Tensor], levels: int, side: int = 64):
    """Write a PNG of rows of images, enlarged to at least ``side`` pixels with hard edges.

    Args:
        rows: each (columns, C, H, W), integers in 0..levels - 1.
    """
    images = torch.cat(rows).float().cpu() / (levels - 1)
    times = math.ceil(side / images.shape[-1])
    images = images.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)
    save_image(make_grid(images, nrow=len(rows[0]), padding=4, pad_value=0.5), path)
