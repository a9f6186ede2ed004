"""Draw where a trained model's attention blocks look, on images of its validation set or on one of your own.

    python show_attention.py --checkpoint runs/digits/best.pt --path runs/digits/attention.png
    python show_attention.py --checkpoint runs/digits/best.pt --image photo.jpg

Exit code 0: done; 2: bad input, with one line that says what.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import backbones
from training import command
from training.published import readable
from training.report import varied
from training.trained import Trained, open_classifier, open_trained


def show(
    checkpoint: str,
    path: str | None = None,
    image: list[str] | None = None,
    count: int = 10,
    at: str = "*",
    dir: str | None = None,
) -> None:
    """Writes a PNG: a row for each image, a column for the image and for each block's map.

    Args:
        checkpoint: a checkpoint of train_imagenet.py.
        path: the PNG to write; null: attention.png beside the checkpoint.
        image: one image file, or several, instead of those of the validation set.
        count: images of the validation set, of as many classes as can be; 1 or more.
        at: wildcard of the blocks to show, by module name.
        dir: where the images of the validation set are, if not where they were in training.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be 1 or more")
    if image and dir is not None:
        raise ValueError(f"dir={dir}: must be left out with image, which is not of the validation set")
    if image:
        found = open_classifier(checkpoint, backbones)
        pixels, known = found.seen(map(Image.open, image)), [Path(name).name for name in image]
    else:
        found = open_trained(checkpoint, backbones, dir)
        chosen = choose(found, count)
        pixels, known = found.pixels(chosen), [readable(found.classes)[found.images[index][1]] for index in chosen]
    maps = backbones.attention_maps(found.model, found.normalised(pixels), at)
    guesses = found.probabilities(pixels).argmax(dim=1)
    names = readable(found.classes)
    titles = [f"{name},\nsays {names[guess]}" for name, guess in zip(known, guesses)]
    print(backbones.draw_maps(pixels, maps, path or Path(checkpoint).with_name("attention.png"), titles))


def choose(trained: Trained, count: int) -> list[int]:
    """Indices of images of as many classes as can be, out of eight times as many from all over."""
    images = trained.images
    few = min(len(images), 8 * count)
    tried = [i * len(images) // few for i in range(few)]
    labels = torch.tensor([images[index][1] for index in tried])
    return [tried[place] for place in varied(labels, count)]


def main(argv: list[str] | None = None) -> int:
    return command.run(show, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
