"""Draw where a trained model's attention blocks look, on images of its validation set.

    python show_attention.py --checkpoint runs/digits/best.pt --path runs/digits/attention.png

Exit code 0: done; 2: bad input, with one line that says what.
"""

import sys
from collections import Counter

import timm
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import Dataset

import backbones
from training import checkpoint
from training.config import DataConfig
from training.datasets import create_datasets
from training.transforms import eval_transform


def show(path: str, checkpoint_path: str, count: int = 10, at: str = "*", dir: str | None = None) -> None:
    """Writes a PNG: a row for each image, a column for the image and for each block's map.

    Args:
        path: the PNG to write.
        checkpoint_path: a checkpoint of train_imagenet.py.
        count: images, of as many classes as can be; 1 or more.
        at: wildcard of the blocks to show, by module name.
        dir: where the images are, if not where they were in training.
    """
    if count < 1:
        raise ValueError(f"count={count}: must be 1 or more")
    saved = checkpoint.load(checkpoint_path)
    data = saved["data"]
    channels, *size = data["input_size"]
    source = DataConfig(**saved["config"]["data"] | ({"dir": dir} if dir else {}))
    _, images, classes = create_datasets(source, channels)
    model = timm.create_model(saved["model"], **saved["model_args"])
    model.load_state_dict(saved["ema"] or saved["state_dict"])

    transform = eval_transform(tuple(size), data["interpolation"], data["crop_pct"])
    chosen = varied(images, count)
    pixels = torch.stack([transform(image.convert("L" if channels == 1 else "RGB")) for image, _ in chosen]) / 255
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    maps = backbones.attention_maps(model, (pixels - mean) / std, at)
    with torch.no_grad():
        guesses = model.eval()((pixels - mean) / std).argmax(dim=1)
    titles = [f"{classes[label]}, says {classes[guess]}" for (_, label), guess in zip(chosen, guesses)]
    print(backbones.draw_maps(pixels, maps, path, titles))


def varied(images: Dataset, count: int) -> list[tuple[Image.Image, int]]:
    """``count`` images and labels from all over the data set, of as many classes as can be."""
    tried = min(len(images), 8 * count)
    found = [images[i * len(images) // tried] for i in range(tried)]
    seen, turn = Counter(), []
    for place, (_, label) in enumerate(found):
        turn.append((seen[label], label, place))  # the first of each class go before the second
        seen[label] += 1
    return [found[place] for *_, place in sorted(turn)[:count]]


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_function_arguments(show, skip={"checkpoint_path"})
    parser.add_argument("--checkpoint", type=str, required=True, help="a checkpoint of train_imagenet.py")
    arguments = vars(parser.parse_args(argv))
    try:
        show(checkpoint_path=arguments.pop("checkpoint"), **arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
