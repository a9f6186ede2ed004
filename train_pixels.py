"""Train a pixel-autoregressive model of images, and draw from it; or evaluate a checkpoint.

    python train_pixels.py --config configs/digits_pixels.yaml
    python train_pixels.py --config configs/digits_pixels.yaml --model.args.blocks dense --output runs/dense
    python train_pixels.py --config configs/digits_pixels.yaml --resume auto
    python train_pixels.py --eval runs/pixels/best.pt
    torchrun --nproc-per-node 2 train_pixels.py --config configs/digits_pixels.yaml

A run that goes on takes its configuration from its checkpoint, but for its target and what is given anew.
Writes log.csv, checkpoints (see training/checkpoint.py) and pictures to the output folder: samples-EPOCH.png, and
completions-EPOCH.png with what is given above, what the model makes of it in the middle, and the test images below.
SIGTERM or Ctrl-C ends a run within a step, saved. Exit code 0: done, or stopped; 1: the loss was not finite, or bits
per dimension stayed above target_bits; 2: bad input, with one line that says what.
"""

import sys

import backbones  # registers the named models
from training import run
from training.pixels import PixelConfig, Pixels


def main(argv: list[str] | None = None) -> int:
    return run.main(Pixels, PixelConfig, __doc__, argv, backbones)


if __name__ == "__main__":
    sys.exit(main())
