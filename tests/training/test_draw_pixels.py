"""draw_pixels.py: what a pixel model draws, and how it completes images of one's own."""

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image
from scripts import PIXELS, load, options, refused

import backbones
from training import checkpoint
from training.setup import restore_model


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    output = tmp_path_factory.mktemp("pixels")
    assert load("train_pixels").main([*PIXELS, *options(epochs=1, pictures__every=0, output=output)]) == 0
    return output / "best.pt"


def values(path, columns, side=64, size=8, levels=17):
    """The integers in a picture of images (rows, columns, size, size)."""
    pixels, times = np.asarray(Image.open(path))[..., 0].astype(float), side // size
    tiles = []
    for top in range(4, pixels.shape[0] - 4, side + 4):
        for left in range(4, 4 + columns * (side + 4), side + 4):
            tiles.append(pixels[top : top + side : times, left : left + side : times])
    return np.round(np.stack(tiles) * (levels - 1) / 255).astype(int).reshape(-1, columns, size, size)


def test_what_is_drawn_is_what_the_model_draws(best, tmp_path, capsys):
    argv = options(checkpoint=best, count=8, seed=5, temperature=0.7, side=64, device="cpu")
    assert load("draw_pixels").main([*argv, *options(path=tmp_path / "new" / "s.png")]) == 0
    model = restore_model(best, checkpoint.load(best), backbones)
    expected = model.generate(8, temperature=0.7, generator=torch.Generator().manual_seed(5))
    assert np.array_equal(values(tmp_path / "new" / "s.png", 8)[0], expected[:, 0].numpy())
    assert load("draw_pixels").main(options(checkpoint=best, count=11, device="cpu")) == 0
    assert capsys.readouterr().out.split()[-1] == str(best.with_name("samples.png"))
    assert Image.open(best.with_name("samples.png")).size == (8 * 132 + 4, 2 * 132 + 4)


def test_images_are_completed_below_the_rows_given(best, tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey).save(tmp_path / "a.png")
    picture(37, 53).save(tmp_path / "b.jpg")
    names = ["--complete", str(tmp_path / "a.png"), str(tmp_path / "b.jpg")]
    argv = options(checkpoint=best, rows=3, count=2, side=64, path=tmp_path / "c.png", device="cpu")
    assert load("draw_pixels").main([*argv, *names]) == 0
    found = values(tmp_path / "c.png", 4)
    assert found.shape == (2, 4, 8, 8)
    expected = np.round(grey * (16 / 255)).astype(int)
    assert np.array_equal(found[0, 3], expected) and not np.array_equal(found[1, 3], expected)
    for row in found:
        assert all(np.array_equal(each[:3], row[3, :3]) for each in row) and (row[0, 3:] == 8).all()
        assert not np.array_equal(row[1, 3:], row[2, 3:])


@pytest.mark.parametrize(
    "given, named",
    [
        (dict(rows=3), "rows=3: must be left out without complete"),
        (dict(rows=9, complete="HERE"), "rows=9: must be in 0..8"),
        (dict(count=0), "count=0: must be 1 or more"),
        (dict(complete="nowhere.png"), "nowhere.png"),
        (dict(temperature=0), "temperature=0"),
        (dict(checkpoint="nowhere.pt"), "there is no checkpoint nowhere.pt"),
        (dict(row=3), "unknown option --row; nearest: --rows"),
    ],
)
def test_what_cannot_be_drawn_is_said(given, named, best, tmp_path, capsys):
    picture().save(tmp_path / "photo.png")
    given = {name: str(value).replace("HERE", str(tmp_path / "photo.png")) for name, value in given.items()}
    line = refused("draw_pixels", options(**{"checkpoint": best, "path": tmp_path / "p.png"} | given), capsys)
    assert named in line and not (tmp_path / "p.png").exists()


def test_a_classifier_draws_nothing(tmp_path, capsys):
    argv = options(model__name="cifar_resnet20", data__img_size=8, threads=1, epochs=1, data__train_images=128)
    assert load("train_imagenet").main([*argv, *options(output=tmp_path)]) == 0
    line = refused("draw_pixels", options(checkpoint=tmp_path / "best.pt"), capsys)
    assert line == f"error: {tmp_path}/best.pt is not a pixel model's checkpoint"
