"""Classifiers to use: a checkpoint, alone or with the images it is evaluated on; published weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset

from training import checkpoint
from training.config import DataConfig, source_of
from training.datasets import create_datasets
from training.loader import BadImages, Batches, Samples, as_mode
from training.published import class_names, published_cfg
from training.setup import Blocks, create_model, restore_model
from training.transforms import eval_transform


@dataclass
class Classifier:
    """A model in eval mode, how it sees images (`data` as in a checkpoint), and the names of its classes."""

    model: nn.Module
    data: dict
    classes: list[str]

    @property
    def transform(self):
        """From PIL image to a uint8 tensor (C, H, W), as the model is evaluated."""
        return eval_transform(tuple(self.data["input_size"][1:]), self.data["interpolation"], self.data["crop_pct"])

    @property
    def channels(self) -> int:
        return self.data["input_size"][0]

    def seen(self, images: Iterable[Image.Image]) -> Tensor:
        """PIL images as (B, C, H, W), values in 0..1."""
        mode = "L" if self.channels == 1 else "RGB"
        return torch.stack([self.transform(as_mode(image, mode)) for image in images]) / 255

    def normalised(self, pixels: Tensor) -> Tensor:
        """The same as the model takes them."""
        mean, std = (torch.tensor(self.data[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (pixels - mean) / std

    @torch.no_grad()
    def probabilities(self, pixels: Tensor) -> Tensor:
        """(B, classes) for images as `seen` gives them; on the CPU."""
        device = next(self.model.parameters()).device
        return self.model(self.normalised(pixels).to(device)).float().softmax(dim=1).cpu()


@dataclass
class Trained(Classifier):
    """What `open_trained` gives: also the images it is evaluated on."""

    images: Dataset

    def pixels(self, indices: Iterable[int]) -> Tensor:
        """Images (B, C, H, W), values in 0..1."""
        return self.seen(self.images[index][0] for index in indices)

    @torch.no_grad()
    def answers(self, batch_size: int = 128) -> tuple[Tensor, Tensor]:
        """Probabilities (N, classes) and targets (N,) of all images, in order; BadImages if one can't be read."""
        samples = Samples(self.images, self.transform, self.channels)
        batches = Batches(samples, batch_size, self.data["mean"], self.data["std"], num_classes=len(self.classes))
        parts = []
        for images, targets, faults in batches.epoch():
            if faults:
                raise BadImages(f"an image to evaluate can't be read: {faults[0]}")
            parts.append((self.model(images).float().softmax(dim=1), targets))
        return tuple(map(torch.cat, zip(*parts)))


def check_classifier(path: str | Path, saved: dict):
    """ValueError if the checkpoint is no classifier's."""
    if "class_names" not in saved["data"]:
        raise ValueError(f"{path} is not a classifier's checkpoint")


def open_classifier(path: str | Path, blocks: Blocks) -> Classifier:
    """The checkpoint at `path`, of train_imagenet.py, without the images it was trained on.

    Args:
        blocks: the package that has the blocks of its model.

    Raises:
        ValueError, OSError: if the checkpoint can't be used.
    """
    saved = checkpoint.load(path)
    check_classifier(path, saved)
    return Classifier(restore_model(path, saved, blocks).eval(), saved["data"], saved["data"]["class_names"])


def published_classifier(name: str, args: dict, pretrained: bool = True) -> Classifier:
    """timm's model of that name with its published weights; classes that have no names are called by their numbers.

    Raises:
        ValueError: if there is no such model, or there are no weights of it.
    """
    model = create_model(name, args, pretrained).eval()
    data, cfg = resolve_data_config(model=model), published_cfg(name, args)
    data["input_size"] = (args.get("in_chans", 3), *data["input_size"][1:])
    known = class_names(cfg, readable=True) if cfg.get("num_classes") == model.num_classes else None
    return Classifier(model, data, known or [str(number) for number in range(model.num_classes)])


def open_trained(path: str | Path, blocks: Blocks, dir: str | None = None) -> Trained:
    """The checkpoint at `path`, of train_imagenet.py.

    Args:
        blocks: the package that has the blocks of its model.
        dir: where the images are, if not where they were in training; instead of shards, a folder of images.

    Raises:
        ValueError, OSError: if the checkpoint or the images can't be used.
    """
    saved = checkpoint.load(path)
    check_classifier(path, saved)
    source, known = source_of(saved), saved["data"]["class_names"]
    if source["name"] == "wds":  # which can only be read in order
        if dir is None:
            raise ValueError(f"the images of {path} are shards: give a folder of images with dir")
        source = {"name": "folder"}
    source = DataConfig(**source | ({"dir": dir} if dir else {}))
    seed = saved["config"].get("seed", 0)
    _, images, classes = create_datasets(source, saved["data"]["input_size"][0], seed, known=known)
    return Trained(restore_model(path, saved, blocks).eval(), saved["data"], classes, images)
