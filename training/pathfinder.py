"""Pathfinder: do two dots lie on one dashed curve? Images that are drawn, each a function of its number.

After Linsley et al. 2018, https://arxiv.org/abs/1805.08315, and the task of the Long Range Arena (Tay et al. 2021,
https://arxiv.org/abs/2011.04006); drawn otherwise, so that nothing near the dots tells the answer.

Two long dashed curves of one law are drawn. A fair coin says which of them lacks some dashes in its middle, another
one which has dots at both ends. The label is 1 where the curve with the dots is whole. The coins know neither the scene
nor one another, so the picture without dots says nothing, nor does the picture with them as far as it does not show
whether that curve is broken. Before the coins are thrown, scenes are thrown away in which a place that may be broken
lies near an end of a curve (``clear``). Marks on one curve or on two, which is the obvious way to draw it, leaks: where
the end of a curve points tells whether the other dot is its other end.
What is left to a model that does not follow the curve: ink between the dots, for a curve does not go far from the
straight line between its ends. Boosted trees on sums of ink in bands along that line and in ellipses around it are
right in 78 % of the easy images and in 57 % of the hard ones, whose curves are longer; on counts, on distances and on
what lies near the dots, in 49 to 54 %.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

STEP = 3.0  # pixels from dash to dash
DASH = 0.6  # of a step that is drawn
GAP = 3.2  # pixels between curves, at least
DOT = 1.6  # radius
WALKS = 48  # curves that are tried at once
SHORT = 3  # dashes of a distractor


@dataclass(frozen=True)
class Level:
    """How hard it is. A model that sees less than 2 · ``clear`` pixels at once can only guess.

    Args:
        size: of the image, in pixels a side.
        dashes: of a long curve.
        missing: dashes that the broken curve lacks.
        whole: dashes at each end that are never missing; more than ``clear`` pixels long.
        distractors: short curves, at most.
        turn: standard deviation of the change of direction from dash to dash, in radians.
        clear: pixels around each end that show nothing of where a curve is broken.
    """

    size: int = 32
    dashes: int = 9
    missing: int = 2
    whole: int = 3
    distractors: int = 4
    turn: float = 0.3
    clear: float = 7.0


LEVELS = {
    "easy": Level(),
    "hard": Level(dashes=12, whole=4, distractors=6),
    "64": Level(size=64, dashes=20, distractors=10),
}


def sample(seed: int, index: int, level: Level = Level(), twin: bool = False) -> tuple[np.ndarray, int]:
    """The image (size, size) of a number, in 0..1, and its label. ``twin``: the same scene with the other label."""
    rng = np.random.default_rng([seed, index])
    while (scene := _scene(rng, level)) is None:
        pass
    curves, first_missing = scene
    dotted, broken = rng.integers(2, size=2)
    label = int(dotted != broken)
    if twin:
        broken, label = 1 - broken, 1 - label
    lines, there = list(curves), [np.ones(level.dashes, dtype=bool) for _ in curves]
    there[broken][first_missing[broken] : first_missing[broken] + level.missing] = False
    for _ in range(level.distractors):
        short = _walk(rng, level, SHORT, np.concatenate(lines))
        if short is not None:
            lines.append(short)
            there.append(np.ones(SHORT, dtype=bool))
    there = np.concatenate(there)
    dashes = np.concatenate([_dashes(line) for line in lines])[there]
    contrast = rng.uniform(0.6, 0.8, len(there))[there]
    return _drawn(level.size, dashes, contrast, curves[dotted][[0, -1]]), label


def _scene(rng, level: Level):
    """Two curves (dashes + 1, 2) and the first dash of each that would be missing; None if they don't fit."""
    curves = []
    for _ in range(2):
        curve = _walk(rng, level, level.dashes, np.concatenate([np.zeros((0, 2)), *curves]))
        if curve is None:
            return None
        curves.append(curve)
    first = rng.integers(level.whole, level.dashes - level.whole - level.missing + 1, size=2)
    ends = np.concatenate([curve[[0, -1]] for curve in curves])
    places = np.concatenate([curve[at : at + level.missing + 1] for curve, at in zip(curves, first)])
    far = _nearest(places, ends) >= level.clear
    for number, curve in enumerate(curves):  # dots are wider than lines
        others = np.delete(ends, [2 * number, 2 * number + 1], axis=0)
        far &= _nearest(curve, others) >= GAP + DOT and np.linalg.norm(curve[0] - curve[-1]) >= GAP + 2 * DOT
    return (curves, first) if far else None


def _nearest(points: np.ndarray, others: np.ndarray) -> float:
    """The smallest distance between points of two lists."""
    return np.linalg.norm(points[:, None] - others, axis=-1).min()


def _walk(rng, level: Level, dashes: int, taken: np.ndarray) -> np.ndarray | None:
    """Points (dashes + 1, 2) of a smooth curve away from the border, from itself and from points ``taken``."""
    border = DOT + 0.5
    kicks, bend = rng.normal(0, level.turn, (WALKS, dashes)), rng.normal(0, level.turn / 2, WALKS)
    bends = np.empty((WALKS, dashes))
    for i in range(dashes):
        bends[:, i] = bend = 0.6 * bend + kicks[:, i]
    angles = rng.uniform(-math.pi, math.pi, (WALKS, 1)) + bends.cumsum(axis=1)
    steps = STEP * np.stack([np.sin(angles), np.cos(angles)], axis=-1)
    start = rng.uniform(border, level.size - border, (WALKS, 1, 2))
    walks = np.concatenate([start, start + steps.cumsum(axis=1)], axis=1)
    walks = walks[((walks >= border) & (walks <= level.size - border)).all(axis=(1, 2))]
    i, j = np.triu_indices(dashes + 1, 2)
    apart = np.square(walks[:, i] - walks[:, j]).sum(-1), np.square(walks[:, :, None] - taken).sum(-1)
    fit = walks[(apart[0] >= GAP**2).all(axis=1) & (apart[1] >= GAP**2).all(axis=(1, 2))]
    return fit[0] if len(fit) else None


def _dashes(curve: np.ndarray) -> np.ndarray:
    """Both ends of each dash, (dashes, 2, 2)."""
    middle, half = (curve[1:] + curve[:-1]) / 2, (curve[1:] - curve[:-1]) * (DASH / 2)
    return np.stack([middle - half, middle + half], axis=1)


def _drawn(size: int, dashes: np.ndarray, contrast: np.ndarray, dots: np.ndarray) -> np.ndarray:
    """Lines of one pixel's width and dots with soft borders, the brightest of all at each pixel."""
    centres = np.stack(np.mgrid[:size, :size], axis=-1) + 0.5
    image = np.zeros((size, size), dtype=np.float32)
    for line, value, radius in [
        *zip(dashes, contrast, [0.5] * len(dashes)),
        *((np.stack([d, d]), 1.0, DOT) for d in dots),
    ]:
        (top, left), (bottom, right) = (
            np.floor(line.min(0) - radius).astype(int),
            np.ceil(line.max(0) + radius + 1).astype(int),
        )
        here = slice(max(0, top), bottom), slice(max(0, left), right)
        along, away = line[1] - line[0], centres[here] - line[0]
        share = np.clip(away @ along / max(along @ along, 1e-9), 0, 1)
        distance = np.linalg.norm(away - share[..., None] * along, axis=-1)
        image[here] = np.maximum(image[here], np.clip(radius + 0.5 - distance, 0, 1) * value)
    return image


class Pathfinder(Dataset):
    """Grey images of a level; images of training and test have no scene in common.

    An image takes milliseconds to draw, so it is drawn once and kept, which takes size² + 1 bytes.

    Args:
        train: 50,000 images to train on, or 2,000 to test on.
        level: a name in `LEVELS`.
        dir: a folder to keep drawn images in, for other processes and the next run; made where it is not there. None:
            each process keeps its own.

    Raises:
        OSError: ``dir`` is no folder that can be written to.
    """

    classes = ["two curves", "one curve"]

    def __init__(self, train: bool, level: str = "easy", dir: str | Path | None = None):
        self.level, self.seed, self.count = level, 0 if train else 1, 50_000 if train else 2_000
        self.file = None if dir is None else Path(dir, f"pathfinder-{level}-{'train' if train else 'test'}.bin")
        self.shape = self.count, LEVELS[level].size ** 2 + 1
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab") as file:
                file.truncate(math.prod(self.shape))  # zeros, which take no place until they are written

    @cached_property
    def drawn(self) -> np.ndarray:
        """(count, size² + 1): the pixels of each image and 1 + its label, 0 where it is not drawn yet."""
        return np.memmap(self.file, np.uint8, "r+", shape=self.shape) if self.file else np.zeros(self.shape, np.uint8)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index}: must be in 0..{self.count - 1}")
        level, row = LEVELS[self.level], self.drawn[index]
        if not row[-1]:
            image, label = sample(self.seed, index, level)
            row[:-1] = np.round(255 * image).ravel()
            row[-1] = 1 + label  # last: other processes read it, too
        return Image.fromarray(row[:-1].reshape(level.size, level.size).copy()), int(row[-1]) - 1

    def __len__(self) -> int:
        return self.count

    def __getstate__(self) -> dict:
        """Without the images: a process that is started opens the file anew."""
        return {name: value for name, value in self.__dict__.items() if name != "drawn"}

    def name(self, index: int) -> str:
        return f"pathfinder {self.level} {index}"
