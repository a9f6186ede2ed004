"""Pathfinder: fair coins, images that depend on their number alone, and nothing near the dots that tells the answer."""

import hashlib
import pickle
from functools import cache

import numpy as np
import pytest
from scipy.ndimage import label as components

from training.config import DataConfig
from training.datasets import create_datasets
from training.pathfinder import LEVELS, Level, Pathfinder, sample

COUNTS = {"easy": 400, "hard": 60, "64": 60}
every_level = pytest.mark.parametrize("name", list(LEVELS))


@cache
def drawn(name: str) -> list[tuple[np.ndarray, int]]:
    return [sample(0, index, LEVELS[name]) for index in range(COUNTS[name])]


def dots(image: np.ndarray) -> np.ndarray:
    """Where the two discs are, which alone are as bright as can be."""
    parts, count = components(image > 0.95)
    assert count == 2
    return np.stack([np.argwhere(parts == number).mean(axis=0) for number in (1, 2)])


def filled(image: np.ndarray) -> int:
    """The label, by what can be reached from a dot through pixels that are not black."""
    parts, _ = components(image > 0.1, np.ones((3, 3)))
    one, other = (parts[tuple(np.round(place).astype(int))] for place in dots(image))
    return int(one == other)


def from_dots(image: np.ndarray) -> np.ndarray:
    """Distance of each pixel from the nearer dot."""
    pixels = np.stack(np.mgrid[tuple(map(slice, image.shape))], axis=-1)
    return np.linalg.norm(pixels[..., None, :] - dots(image), axis=-1).min(axis=-1)


@every_level
def test_following_the_curve_gives_the_label(name):
    right = [filled(image) == label for image, label in drawn(name)]
    assert np.mean(right) >= 0.98


@every_level
def test_both_labels_are_as_frequent(name):
    labels = [label for _, label in drawn(name)]
    assert abs(np.mean(labels) - 0.5) < 2.5 * 0.5 / len(labels) ** 0.5


@every_level
def test_a_twin_is_the_same_but_for_the_middle_of_the_curves(name):
    """So what is near the dots, where they are and how many dashes there are says nothing."""
    level = LEVELS[name]
    for index in range(12):
        (image, label), (other, opposite) = (sample(5, index, level, twin) for twin in (False, True))
        assert label + opposite == 1 and image.shape == (level.size, level.size) and image.dtype == np.float32
        assert np.array_equal(dots(image), dots(other))
        differs = image != other
        assert differs.any() and from_dots(image)[differs].min() > level.clear - 2  # a line is two pixels wide
        middles, count = components(differs, np.ones((3, 3)))
        assert 2 <= count <= 2 * level.missing  # both gaps, or their dashes
        lengths = [np.minimum(part / 0.7, 1).sum() for part in (image, other)]
        assert abs(lengths[0] - lengths[1]) < 0.1 * lengths[0]


def test_images_are_drawn_once_and_kept_for_others(tmp_path, monkeypatch):
    """Also for a process that is started later, and for one beside it."""
    first, beside = (Pathfinder(False, "easy", tmp_path / "new" / "kept") for _ in range(2))
    copied, in_memory = pickle.loads(pickle.dumps(first)), Pathfinder(False)
    wanted = [(np.round(255 * image).astype(np.uint8), label) for image, label in (sample(1, i) for i in (7, 0, 1999))]
    for number, index in enumerate((7, 0, 1999)):
        assert np.array_equal(first[index][0], wanted[number][0]) and first[index][1] == wanted[number][1]
        assert np.array_equal(in_memory[index][0], wanted[number][0])
    monkeypatch.setattr("training.pathfinder.sample", None)  # nothing is left to draw
    for images in (first, beside, copied, in_memory, pickle.loads(pickle.dumps(beside))):
        if images is not in_memory:
            assert images.file.stat().st_size == 2000 * (32 * 32 + 1)
        for (image, label), index in zip(wanted, (7, 0, 1999)):
            assert np.array_equal(images[index][0], image) and images[index][1] == label
    with pytest.raises(TypeError):
        first[8]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="data.dir .*file can't keep the images of pathfinder: "):
        create_datasets(DataConfig(name="pathfinder", dir=str(tmp_path / "file")))


def test_images_are_what_they_were():
    """Any order, any process: a sample is a function of its seed and number."""
    images = [sample(seed, index) for seed, index in ((0, 0), (0, 1), (1, 0), (7, 123_456_789))]
    assert len({image.tobytes() for image, _ in images}) == 4
    again = [sample(seed, index) for seed, index in ((7, 123_456_789), (1, 0), (0, 1), (0, 0))][::-1]
    for (one, label), (other, same) in zip(images, again):
        assert np.array_equal(one, other) and label == same
    kept = hashlib.sha256(b"".join(np.round(16 * image).astype(np.uint8).tobytes() for image, _ in images))
    assert kept.hexdigest()[:16] == "8687e2d5bd1396bd"


def test_brightness_is_what_a_configuration_may_say():
    images = np.stack([image for image, _ in drawn("easy")])
    assert images.min() == 0 and images.max() == 1
    assert images.mean() == pytest.approx(0.062, abs=0.002) and images.std() == pytest.approx(0.171, abs=0.003)


def test_levels_are_data_sets():
    train, val, classes = create_datasets(DataConfig(name="pathfinder", train_images=11))
    assert (len(train), len(val), classes) == (11, 2000, ["two curves", "one curve"])
    image, label = train[3]
    assert image.mode == "L" and image.size == (32, 32) and label == sample(0, 3)[1]
    assert np.array_equal(np.asarray(image), np.round(255 * sample(0, 3)[0]).astype(np.uint8))
    assert val[3][0] != image and val.name(3) == "pathfinder easy 3"
    train, val, _ = create_datasets(DataConfig(name="pathfinder/64"))
    assert len(train) == 50_000 and val[0][0].size == (64, 64)
    with pytest.raises(IndexError, match="index 2000: must be in 0..1999"):
        Pathfinder(train=False)[2000]


@pytest.mark.parametrize("name", ["pathfinder/32", "pathfinder/easy/2"])
def test_other_levels_are_refused(name):
    with pytest.raises(ValueError, match=f"data.name must be pathfinder/LEVEL, with easy, hard, 64, got '{name}'"):
        create_datasets(DataConfig(name=name))
    with pytest.raises(ValueError, match="data.val_split must be left out with data.name pathfinder"):
        DataConfig(name="pathfinder", val_split="somewhere")


def statistics(image: np.ndarray) -> list[float]:
    """What is near the dots, counts, and distances."""
    places, pixels = dots(image), np.stack(np.mgrid[tuple(map(slice, image.shape))], axis=-1)
    found = [image.sum(), (image > 0.1).sum(), (image > 0.5).sum(), components(image > 0.1, np.ones((3, 3)))[1]]
    found += [*places.flatten(), np.linalg.norm(places[0] - places[1])]
    for place, other in (places, places[::-1]):
        away, ahead = pixels - place, (other - place) / np.linalg.norm(other - place)
        distance = np.linalg.norm(away, axis=-1)
        for inner in (2, 4):
            ring = image * ((distance >= inner) & (distance < inner + 2.5))
            towards = away @ ahead / np.maximum(distance, 1e-9)
            found += [ring.sum(), (ring * towards).sum(), (ring * np.abs(towards)).sum()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["easy", "hard"])
def test_what_is_learned_of_counts_distances_and_the_dots_surroundings_is_nothing(name):
    from sklearn.ensemble import HistGradientBoostingClassifier

    images, labels = zip(*(sample(2, index, LEVELS[name]) for index in range(4000)))
    known = np.array([statistics(image) for image in images])
    trees = HistGradientBoostingClassifier(max_iter=100, max_leaf_nodes=12, random_state=0)
    assert trees.fit(known[:2500], labels[:2500]).score(known[2500:], labels[2500:]) <= 0.55


def test_a_level_has_sizes_that_fit_it():
    for level in (Level(), *LEVELS.values()):
        assert level.whole * 3 > level.clear and 2 * level.whole + level.missing <= level.dashes
