"""Draw images from a trained pixel model, or complete images of your own from their upper rows.

    python draw_pixels.py --checkpoint runs/pixels/best.pt
    python draw_pixels.py --checkpoint runs/pixels/best.pt --complete photo.png --rows 3 --path completed.png

Writes a PNG with hard edges, enlarged for the eye. Of a completed image a row: what is given above, what the model
makes of it, and the whole image. Exit code 0: done; 2: bad input, with one line that says what.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

import backbones
from training import command
from training.checkpoint import load
from training.loader import as_mode
from training.pixels import integers, save_pictures
from training.setup import find_device, restore_model


def draw(
    checkpoint: str,
    path: str | None = None,
    complete: list[str] | None = None,
    rows: int | None = None,
    count: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    side: int = 128,
    device: str = "auto",
) -> None:
    """Writes a PNG of images.

    Args:
        checkpoint: a checkpoint of train_pixels.py; its moving average draws if it has one.
        path: the PNG to write; null: samples.png or completions.png beside the checkpoint.
        complete: images to complete, resized to the model's size and cut to their centre; null draws whole ones.
        rows: of complete, how many rows from the top are given; null: half of them.
        count: images to draw, or ways to complete each; 1 or more.
        temperature: divides the logits; below 1 prefers what is likely.
        top_k: draw each value from the k likeliest only; null from all.
        seed: of what is drawn.
        side: pixels that each image is enlarged to, at least.
        device: auto (cuda if there is one), or a torch device.
    """
    for name, value in (("count", count), ("side", side)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be 1 or more")
    if rows is not None and not complete:
        raise ValueError(f"rows={rows}: must be left out without complete")
    saved = load(checkpoint)
    if "levels" not in saved["data"]:
        raise ValueError(f"{checkpoint} is not a pixel model's checkpoint")
    model = restore_model(checkpoint, saved, backbones).eval().to(at := find_device(device))
    channels, size = saved["data"]["input_size"][0], saved["data"]["input_size"][1]
    levels = saved["data"]["levels"]
    generator = torch.Generator(at).manual_seed(seed)
    options = dict(temperature=temperature, top_k=top_k, generator=generator, progress=sys.stderr.isatty())
    if not complete:
        pictures = list(model.generate(count, **options).split(8))
    else:
        rows = size // 2 if rows is None else rows
        if not 0 <= rows <= size:
            raise ValueError(f"rows={rows}: must be in 0..{size}")
        whole = torch.stack([given(name, size, channels, levels) for name in complete]).to(at)
        above = whole.clone()
        above[..., rows:, :] = levels // 2
        done = model.generate(whole.repeat_interleave(count, dim=0), rows, **options).unflatten(0, (-1, count))
        pictures = [torch.cat([a[None], *d[None], w[None]]) for a, d, w in zip(above, done, whole)]
    target = Path(path) if path else Path(checkpoint).with_name("completions.png" if complete else "samples.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    save_pictures(target, pictures, levels, side)
    print(target)


def given(name: str, size: int, channels: int, levels: int) -> torch.Tensor:
    """An image file as integers (C, size, size) in 0..levels - 1."""
    pixels = integers(size)(as_mode(Image.open(name), "L" if channels == 1 else "RGB"))
    return (pixels * ((levels - 1) / 255)).round().long()


def main(argv: list[str] | None = None) -> int:
    return command.run(draw, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
