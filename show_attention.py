"""Draw where a trained model's attention blocks look, on images of its validation set.

    python show_attention.py --checkpoint runs/digits/best.pt --path runs/digits/attention.png

Exit code 0: done; 2: bad input, with one line that says what.
"""

import sys

import torch

import backbones
from training import command
from training.report import varied
from training.trained import open_trained


def show(path: str, checkpoint: str, count: int = 10, at: str = "*", dir: str | None = None) -> None:
    """Writes a PNG: a row for each image, a column for the image and for each block's map.

    Args:
        path: the PNG to write.
        checkpoint: a checkpoint of train_imagenet.py.
        count: images, of as many classes as can be; 1 or more.
        at: wildcard of the blocks to show, by module name.
        dir: where the images are, if not where they were in training.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be 1 or more")
    trained = open_trained(checkpoint, backbones, dir)
    images = trained.images
    few = min(len(images), 8 * count)
    tried = [i * len(images) // few for i in range(few)]
    labels = torch.tensor([images[index][1] for index in tried])
    chosen = [tried[place] for place in varied(labels, count)]
    pixels = trained.pixels(chosen)
    maps = backbones.attention_maps(trained.model, trained.normalised(pixels), at)
    with torch.no_grad():
        guesses = trained.model(trained.normalised(pixels)).argmax(dim=1)
    classes = trained.classes
    titles = [f"{classes[images[index][1]]}, says {classes[guess]}" for index, guess in zip(chosen, guesses)]
    print(backbones.draw_maps(pixels, maps, path, titles))


def main(argv: list[str] | None = None) -> int:
    return command.run(show, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
