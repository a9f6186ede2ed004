"""Batches that depend on (seed, epoch, index) alone, also from unreadable images and shards."""

import io

import numpy as np
import pytest
import torch
from pictures import MEAN, STD, STRONG, Pictures, make_folder, picture
from PIL import Image
from torchvision.transforms import functional as TF

from training.config import AugmentConfig, DataConfig
from training.datasets import create_datasets
from training.loader import BadImages, Batches, EpochSampler, Samples, as_mode
from training.transforms import eval_transform, train_transform


def loader(shuffle=True, seed=0, augment=STRONG, transform=None, **kwargs):
    transform = transform or train_transform(augment, (16, 16), MEAN, STD)
    return Batches(Samples(Pictures(), transform, seed=seed), 4, MEAN, STD, shuffle=shuffle, seed=seed, **kwargs)


def digest(batches, epoch=0, start=0):
    return [(images.clone(), targets.tolist()) for images, targets, _ in batches.epoch(epoch, start)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, u) and y == v for (x, y), (u, v) in zip(a, b))


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    expected = {epoch: digest(loader(), epoch) for epoch in (0, 1)}
    workers = loader(workers=2)
    assert same(digest(workers, 1), expected[1]) and same(digest(workers, 0), expected[0])
    torch.manual_seed(99)
    alone = Samples(Pictures(), train_transform(STRONG, (16, 16), MEAN, STD))
    image, targets = expected[1][2]
    assert torch.equal(alone[1, targets[3]][0], image[3])
    for start in (0, 2, 5):
        assert same(digest(workers, 1, start), expected[1][start:])
    assert not same(expected[0], expected[1]) and not same(digest(loader(seed=1)), expected[0])


def test_an_epoch_has_full_batches_in_multiples_and_evaluation_has_everything():
    assert [len(targets) for _, targets in digest(loader())] == [4] * 5
    assert len(digest(loader(multiple=2))) == 4 and loader(multiple=2).num_images == 16
    seen = [target for _, targets in digest(loader(shuffle=False)) for target in targets]
    assert seen == list(range(23))
    assert list(EpochSampler(5, 2)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    with pytest.raises(ValueError, match="batch_size must be at most the 23 training images, got 24"):
        loader(multiple=6)


def test_images_are_normalised_once():
    expected = torch.stack([TF.normalize(TF.to_tensor(picture(16, 16, seed=i)), MEAN, STD) for i in range(4)])
    for transform in (
        eval_transform((16, 16)),
        train_transform(AugmentConfig(crop="centre", erase=1e-9), (16, 16), MEAN, STD),
    ):
        images, targets = digest(loader(shuffle=False, transform=transform))[0]
        assert images.dtype == torch.float32 and torch.allclose(images, expected, atol=1e-6)
    channels_last = loader(shuffle=False, memory_format=torch.channels_last)
    assert next(channels_last.epoch())[0].is_contiguous(memory_format=torch.channels_last)


def test_grey_images():
    samples = Samples(Pictures(), eval_transform((16, 16)), in_chans=1)
    assert torch.equal(samples[0, 0][0], TF.pil_to_tensor(picture(16, 16).convert("L")))


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_each_batch_and_evaluate_each_image_once(size):
    def part(rank, shuffle):
        sampler = EpochSampler(23, 12 // size if shuffle else 4, shuffle, seed=3, rank=rank, size=size)
        sampler.set_epoch(1)
        return [[index for _, index in keys] for keys in sampler]

    alone = EpochSampler(23, 12, shuffle=True, seed=3)
    alone.set_epoch(1)
    shared = [sum(lists, []) for lists in zip(*(part(rank, True) for rank in range(size)))]
    assert shared == [[index for _, index in keys] for keys in alone]
    assert sorted(index for rank in range(size) for keys in part(rank, False) for index in keys) == list(range(23))


def loader_of(root, **kwargs):
    train, _, _ = create_datasets(DataConfig(name="folder", dir=str(root)))
    return Batches(Samples(train, eval_transform((16, 16)), seed=7), 4, MEAN, STD, shuffle=True, seed=7, **kwargs)


def test_unreadable_images_are_named_and_replaced_by_the_same_others(tmp_path):
    make_folder(tmp_path, images=6)
    cat, dog = tmp_path / "train" / "cat" / "2.png", tmp_path / "train" / "dog" / "5.png"
    cat.write_text("a dog")
    dog.write_bytes(dog.read_bytes()[:200])
    batches = [list(loader_of(tmp_path, workers=workers).epoch(3)) for workers in (0, 2)]
    for (images, targets, faults), (same_images, same_targets, same_faults) in zip(*batches):
        assert torch.equal(images, same_images) and torch.equal(targets, same_targets) and faults == same_faults
    faults = sorted(fault for *_, faults in batches[0] for fault in faults)
    assert faults[0].startswith(f"{cat}: UnidentifiedImageError: cannot identify image file")
    assert any(fault.startswith(f"{dog}: ") for fault in faults)


def test_when_nothing_can_be_read_a_black_image_stands_in(tmp_path):
    make_folder(tmp_path, images=2)
    for path in tmp_path.glob("train/*/*.png"):
        path.write_text("nothing")
    ((images, _, faults),) = loader_of(tmp_path).epoch()
    assert len(faults) == 4 * 9 and len(set(faults)) == 4
    assert torch.allclose(images, TF.normalize(torch.zeros(4, 3, 16, 16), MEAN, STD))


def test_names_are_those_of_a_step_s_images(tmp_path):
    make_folder(tmp_path, images=8)
    batches = loader_of(tmp_path, multiple=2)
    sizes = [batches.names(epoch, step) for epoch in (0, 1) for step in (0, 1)]
    assert all(len(names) == 8 for names in sizes)
    assert sorted(sizes[0] + sizes[1]) == sorted(map(str, tmp_path.glob("train/*/*.png")))
    assert sizes[0] != sizes[2]
    labels = [0 if "/cat/" in name else 1 for name in sizes[1]]
    assert labels == [label for _, targets, _ in list(batches.epoch(0, 2)) for label in targets.tolist()]


def test_a_label_that_is_no_class_is_named():
    batches = loader(num_classes=20)
    with pytest.raises(BadImages, match=r"picture 2[012] has the label 2[012], but labels are 0\.\.19"):
        digest(batches)


def rotated(image):
    """The image as a camera held sideways writes it: turned by 90°, with a mark that says so."""
    exif = image.getexif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(file := io.BytesIO(), "PNG", exif=exif)
    return Image.open(file)


def test_every_kind_of_image_is_read_as_what_it_shows():
    rgb, grey = picture(), picture().convert("L")
    pixels = np.asarray(grey)
    sixteen = [
        Image.fromarray(pixels.astype(np.uint16) * 257),
        Image.fromarray(pixels.astype(np.int32) * 257),
    ]
    for image in sixteen:
        assert image.mode.startswith("I")
        assert np.array_equal(as_mode(image, "L"), pixels)
        assert np.array_equal(as_mode(image, "RGB"), grey.convert("RGB"))
    assert np.array_equal(as_mode(rotated(rgb), "RGB"), rgb)
    palette = rgb.quantize(16)
    palette.info["transparency"] = 0
    assert np.array_equal(as_mode(palette, "RGB"), palette.convert("RGBA").convert("RGB"))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "F"):
        source = grey if mode in ("LA", "F") else rgb
        for wanted in ("L", "RGB"):
            image = as_mode(source.convert(mode), wanted)
            assert image.mode == wanted and image.size == rgb.size
    assert as_mode(rgb.resize((1, 1)), "RGB").size == (1, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_images_of_extreme_shape_come_out_in_the_size_asked(size):
    for transform in (eval_transform((16, 16)), train_transform(STRONG, (16, 16), MEAN, STD)):
        for crop in ("pad", "resized", "centre"):
            transform = train_transform(AugmentConfig(crop=crop), (16, 16), MEAN, STD)
            assert transform(picture(*size)).shape == (3, 16, 16)
    assert eval_transform((16, 16))(picture(*size)).shape == (3, 16, 16)


def test_a_decompression_bomb_is_an_unreadable_image(tmp_path, monkeypatch):
    make_folder(tmp_path, images=2)
    picture(100, 100).save(tmp_path / "train" / "cat" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    ((_, _, faults),) = loader_of(tmp_path).epoch()
    assert len(faults) >= 1 and all("cat/1.png: DecompressionBombError: Image size (10000 pixels)" in f for f in faults)
