"""Pixel models: what a run is, images as integers, how well they are predicted, and pictures of what is drawn."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.utils import AverageMeter
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import Compose
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from training.config import DataConfig, ModelConfig, OptimConfig, _check
from training.datasets import Digits, create_datasets
from training.loader import Batches
from training.transforms import eval_transform

LEVELS = {"digits": 17, "cifar10": 256, "folder": 256}
SIZES = {"digits": 8, "cifar10": 32, "folder": None}


@dataclass
class ImageConfig:
    """Images.

    Args:
        name: digits (8×8, 17 levels), cifar10, or folder.
        dir: where the images are: the root of cifar10, or DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg.
        download: let cifar10 be downloaded into dir.
        img_size: side of the square that is modelled, in pixels; larger images are resized, and cut to their centre.
            null takes that of digits and cifar10, and for a folder the model's.
        workers: loader processes for training, and as many for testing; 0 loads in the main process.
    """

    name: str = "digits"
    dir: str | None = None
    download: bool = False
    img_size: int | None = None
    workers: int = 0

    def __post_init__(self):
        _check("data.name", self.name, self.name in LEVELS, "digits, cifar10 or folder")
        _check("data.img_size", self.img_size, self.img_size is None or self.img_size >= 1, "at least 1")
        if self.name == "digits":
            _check("data.img_size", self.img_size, self.img_size in (None, 8), "8 for digits, whose pixels are counts")
        _check("data.workers", self.workers, self.workers >= 0, "0 or more")


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
        _check("pictures.every", self.every, self.every >= 0, "0 or more")
        _check("pictures.count", self.count, self.count >= 1, "at least 1")
        _check("pictures.temperature", self.temperature, self.temperature > 0, "positive")
        _check("pictures.top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")


def _adamw() -> OptimConfig:
    return OptimConfig("adamw", lr=4e-3, weight_decay=0.01, args={"betas": [0.9, 0.95]}, warmup_epochs=3, clip_grad=1.0)


@dataclass
class PixelConfig:
    """The run.

    Args:
        model: the network; one with bits_per_dim and generate.
        data: the images.
        optim: optimizer and schedule.
        pictures: drawn while it trains.
        epochs: passes over the training images.
        batch_size: images of one optimizer step.
        seed: of everything random.
        device: auto (cuda if there is one), or a torch device such as cpu, cuda, cuda:1.
        threads: CPU threads of the main process; null leaves torch's choice.
        bf16: forward passes under bfloat16 autocast.
        compile: compile the model with torch.compile.
        recompute: compute activations again in the backward pass instead of keeping them.
        output: folder for log.csv, last.pt, best.pt and pictures.
        overwrite: allow a new run in an output folder that already holds one.
        resume: checkpoint to go on from, at the end of its epoch.
        eval: checkpoint to evaluate; trains nothing.
        target_bits: exit with code 1 if the best test bits per dimension stay above this.
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig("pixel_digits"))
    data: ImageConfig = field(default_factory=ImageConfig)
    optim: OptimConfig = field(default_factory=_adamw)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    epochs: int = 36
    batch_size: int = 96
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    bf16: bool = False
    compile: bool = False
    recompute: bool = False
    output: str = "runs/pixels"
    overwrite: bool = False
    resume: str | None = None
    eval: str | None = None
    target_bits: float | None = None

    def __post_init__(self):
        passes = self.optim.accumulate
        _check("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, "at least 1")
        allowed = f"a multiple of optim.accumulate = {passes}"
        _check("batch_size", self.batch_size, self.batch_size % passes == 0, allowed)
        if self.resume and self.eval:
            raise ValueError("resume and eval exclude each other")


def create_images(config: ImageConfig, in_chans: int) -> tuple[Dataset, Dataset]:
    """The training set and the test set, as pairs (PIL image, class index).

    Raises:
        ValueError: as `create_datasets`; in_chans is not 1 for digits.
    """
    if config.name == "digits":
        if in_chans != 1:
            raise ValueError(f"in_chans must be 1 (grey) for digits, got {in_chans}")
        return Digits(train=True, raw=True), Digits(train=False, raw=True)
    source = DataConfig(config.name, config.dir, config.download, workers=config.workers)
    train, test, _ = create_datasets(source, in_chans)
    return train, test


def integers(img_size: int) -> Compose:
    """Transform of a PIL image to int64 (C, img_size, img_size), values as they are; larger images are averaged."""
    return Compose([*eval_transform((img_size, img_size), "box").transforms, torch.Tensor.long])


@torch.no_grad()
def evaluate_bits(model: torch.nn.Module, batches: Batches, autocast=nullcontext()) -> dict[str, float]:
    """Mean bits per dimension over all images: {'bits_per_dim'}.

    Raises:
        FloatingPointError: if they are not finite.
    """
    model.eval()
    meter = AverageMeter()
    with tqdm(total=batches.num_images, desc="evaluate", unit=" images", leave=False, disable=None) as bar:
        for images, _ in batches.epoch():
            with autocast:
                bits = model.bits_per_dim(images)
            meter.update(bits.item(), len(images))
            bar.update(len(images))
    if not math.isfinite(meter.avg):
        raise FloatingPointError(f"the loss is {meter.avg} on the test images")
    return {"bits_per_dim": meter.avg}


def save_pictures(path: Path, rows: list[Tensor], levels: int, side: int = 64):
    """Write a PNG of rows of images, enlarged to at least ``side`` pixels with hard edges.

    Args:
        rows: each (columns, C, H, W), integers in 0..levels - 1.
    """
    images = torch.cat(rows).float().cpu() / (levels - 1)
    times = math.ceil(side / images.shape[-1])
    images = images.repeat_interleave(times, dim=-2).repeat_interleave(times, dim=-1)
    save_image(make_grid(images, nrow=len(rows[0]), padding=4, pad_value=0.5), path)
