"""Loaders: batches of normalised images on the device, the same for any number of loader processes.

What a sample is depends on (seed, epoch, index) alone, so a loader can start anywhere in an epoch. An image that can't
be read is replaced by another of the epoch, chosen by the same key, and told of in `Batch.faults`.
"""

import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from training.distributed import Processes
from training.seeding import permutation, seed_cpu, seed_of
from training.shards import Shards
from training.signals import ignore_signals

TRIES = 8  # images tried in place of an unreadable one
IN_A_ROW = 1000  # unreadable images of a stream, before black ones stand in


class BadImages(ValueError):
    """Images of a run can't be used."""


class Batch(NamedTuple):
    """images (B, C, H, W), targets (B,), and a line for each image that could not be read: 'its name: the reason'."""

    images: Tensor
    targets: Tensor
    faults: list[str]


class Samples(Dataset):
    """A dataset indexed by (epoch, index); what its transform draws depends on (seed, epoch, index) alone.

    Gives (tensor, class index, faults). Where no image can be read a black one stands in.

    Args:
        dataset: gives (PIL image, class index), and has name(index).
        transform: from PIL image to tensor.
        in_chans: 3 converts images to colour, 1 to grey.
    """

    def __init__(self, dataset: Dataset, transform, in_chans: int = 3, seed: int = 0):
        self.dataset = dataset
        self.transform = transform
        self.mode = "L" if in_chans == 1 else "RGB"
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, list[str]]:
        epoch, index = key
        faults = []
        for attempt in range(1 + TRIES):
            try:
                image, target = self.dataset[index]
                seed_cpu("sample", self.seed, epoch, key[1])
                return self.transform(as_mode(image, self.mode)), target, faults
            except MemoryError:
                raise
            except Exception as error:  # of damaged files readers raise nearly everything
                faults.append(f"{self.dataset.name(index)}: {one_line(error)}")
                index = seed_of("instead", self.seed, epoch, key[1], attempt) % len(self.dataset)
        return self.transform(Image.new(self.mode, (32, 32))), 0, faults

    def __len__(self) -> int:
        return len(self.dataset)


class StreamSamples(IterableDataset):
    """The same for shards, which are read in order: a sample depends on its place in the order, and the next readable
    image takes the place of an unreadable one."""

    def __init__(self, shards: Shards, transform, in_chans: int = 3, seed: int = 0):
        self.dataset = shards
        self.transform = transform
        self.mode = "L" if in_chans == 1 else "RGB"
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, int, list[str]]]:
        places, faults = [], []
        for place, name, read in self.dataset:
            places.append(place)
            try:
                image, target = read()
                image = as_mode(image, self.mode)
            except MemoryError:
                raise
            except Exception as error:
                faults.append(f"{name}: {one_line(error)}")
                if len(places) < IN_A_ROW:
                    continue
                image, target = Image.new(self.mode, (32, 32)), 0
            yield from self._finish(places, image, target, faults)
            places, faults = [], []
        yield from self._finish(places, Image.new(self.mode, (32, 32)), 0, faults)

    def _finish(self, places, image, target, faults):
        for place in places:
            seed_cpu("sample", self.seed, self.dataset.epoch, *place)
            yield self.transform(image), target, faults
            faults = []


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image upright, its pixels in `mode`, L or RGB: 16-bit grey is scaled to 8 bits, transparency dropped."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion cuts off all above 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def one_line(error: Exception) -> str:
    """What an error says, in one line; the same in every run, so without addresses of objects."""
    text = " ".join(re.sub(r"<[^<>]* at 0x[0-9a-f]+>", "", str(error)).split())
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def collate(samples: list[tuple[Tensor, int, list[str]]]) -> Batch:
    """A batch of samples."""
    images, targets, faults = zip(*samples)
    return Batch(default_collate(list(images)), default_collate(list(targets)), sum(faults, []))


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """This process's lists of (epoch, index): the permutation of (seed, epoch) in full batches, or all in order.

    Each batch is divided among the processes, so the images of a step do not depend on their number.

    Args:
        length: number of samples.
        batch_size: samples of one list.
        shuffle: False gives all samples in order, the last list shorter; over all processes each sample once.
        multiple: the number of shuffled lists is a multiple of this; the samples left over wait for another epoch.
        rank, size: this process and their number.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        shuffle: bool = False,
        multiple: int = 1,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
    ):
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.multiple = multiple
        self.seed = seed
        self.rank = rank
        self.size = size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0):
        """Give lists number start, start + 1, … of that epoch."""
        self.epoch, self.start = epoch, start

    def order(self, epoch: int) -> list[int] | range:
        """The indices of all processes in the order they are used in."""
        return permutation(self.length, "order", self.seed, epoch) if self.shuffle else range(self.length)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, together = self.order(self.epoch), self.batch_size * self.size
        for number in range(self.start, self.lists):
            first = number * together + self.rank * self.batch_size
            indices = order[first : min(first + self.batch_size, (number + 1) * together)]
            if indices:
                yield [(self.epoch, index) for index in indices]

    @property
    def lists(self) -> int:
        """Lists of a whole epoch."""
        if self.shuffle:
            return self.length // (self.batch_size * self.size * self.multiple) * self.multiple
        return math.ceil(self.length / (self.batch_size * self.size))

    def __len__(self) -> int:
        return self.lists - self.start


class Batches:
    """Batches of one epoch at a time: images (B, C, H, W) float32, normalised; targets (B,) int64; both on `device`.

    Args:
        samples: Samples or StreamSamples.
        batch_size: images of one batch of this process.
        mean, std: of each channel, in 0..1.
        shuffle: True for training; False gives every sample once, in order.
        multiple: a shuffled epoch has a multiple of this many batches, all of them full.
        num_classes: targets are 0..num_classes - 1.
        processes: which share the samples; their device is where the batches go.
        memory_format: of the images.

    Raises:
        ValueError: if there are too few training images for an epoch.
    """

    def __init__(
        self,
        samples: Samples | StreamSamples,
        batch_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        shuffle: bool = False,
        multiple: int = 1,
        seed: int = 0,
        workers: int = 0,
        num_classes: int | None = None,
        processes: Processes = Processes(torch.device("cpu")),
        memory_format: torch.memory_format = torch.contiguous_format,
    ):
        self.samples = samples
        self.batch_size = batch_size
        self.multiple = multiple
        self.num_classes = num_classes
        self.processes = processes
        self.device = processes.device
        self.memory_format = memory_format
        self.mean = 255 * torch.tensor(mean, device=self.device).view(-1, 1, 1)
        self.std = 255 * torch.tensor(std, device=self.device).view(-1, 1, 1)

        length = len(samples.dataset)
        self.sampler = EpochSampler(length, batch_size, shuffle, multiple, seed, processes.rank, processes.size)
        if shuffle and self.sampler.lists == 0:
            most, given = f"the {length} training images", batch_size * processes.size * multiple
            raise ValueError(f"batch_size must be at most {most}, got {given}")
        self.num_batches = self.sampler.lists if shuffle else None
        self.num_images = self.sampler.lists * batch_size * processes.size if shuffle else length
        common = dict(
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=ignore_signals,
        )
        self.stream = isinstance(samples, StreamSamples)
        if self.stream:
            samples.dataset.share(processes.rank, processes.size, max(workers, 1), batch_size, endless=shuffle)
            self.loader = DataLoader(samples, batch_size, drop_last=shuffle, **common)
        else:
            self.loader = DataLoader(samples, batch_sampler=self.sampler, persistent_workers=workers > 0, **common)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch number `epoch`, from batch number `start` on.

        Raises:
            BadImages: if a target is not a class.
        """
        (self.samples.dataset if self.stream else self.sampler).set_epoch(epoch, start)
        count = self.num_batches and self.num_batches - start  # an endless stream would go on
        for number, (images, targets, faults) in enumerate(islice(self.loader, count), start):
            self._check(targets, epoch, number)
            yield self._ready(images, targets, faults)

    def blank(self) -> Batch:
        """A batch of one image that stands for nothing."""
        image = self.samples.transform(Image.new(self.samples.mode, (32, 32)))
        return self._ready(image[None], torch.zeros(1, dtype=torch.int64), [])

    def names(self, epoch: int, step: int) -> list[str]:
        """What the images of a step, of all processes, are called; of shards nothing is known ahead."""
        if self.stream:
            return []
        size = self.batch_size * self.sampler.size * self.multiple
        return [self.samples.dataset.name(i) for i in self.sampler.order(epoch)[step * size : (step + 1) * size]]

    def _ready(self, images: Tensor, targets: Tensor, faults: list[str]) -> Batch:
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.float().sub_(self.mean).div_(self.std)
        return Batch(images.contiguous(memory_format=self.memory_format), targets, faults)

    def _check(self, targets: Tensor, epoch: int, number: int):
        if self.num_classes is None or not len(targets):
            return
        wrong = ((targets < 0) | (targets >= self.num_classes)).nonzero().flatten().tolist()
        if wrong:
            label, name = targets[wrong[0]].item(), f"image {wrong[0]} of batch {number}"
            if not self.stream:
                self.sampler.set_epoch(epoch, number)
                name = self.samples.dataset.name(next(iter(self.sampler))[wrong[0]][1])
            raise BadImages(f"{name} has the label {label}, but labels are 0..{self.num_classes - 1}")
