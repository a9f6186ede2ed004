"""Train any timm model to classify images, or evaluate a checkpoint.

    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml
    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml --optim.lr 0.05 --output runs/slower
    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml --resume auto
    python train_imagenet.py --resume runs/digits/last.pt --epochs 20
    python train_imagenet.py --data.dir photos --data.val_share 0.2 --data.img_size 64 96 --batch-size 16
    python train_imagenet.py --data.dir photos --model.name resnet50 --model.pretrained --model.insert cbam \\
        --model.at 'layer[34].*' --optim.only '*attn_*' 'fc.*' --output runs/photos
    python train_imagenet.py --eval runs/photos/best.pt --data.img_size 96
    python train_imagenet.py --eval pretrained --model.name resnet50.a1_in1k --data.dir imagenet
    python train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml --dry-run
    torchrun --nproc-per-node 2 train_imagenet.py --config configs/digits_cifar_resnet20_cbam.yaml

A run that goes on takes its configuration from its checkpoint, but for its target and what is given anew.
Writes log.csv and checkpoints to the output folder: see training/checkpoint.py. SIGTERM or Ctrl-C ends a run within a
step, saved. Exit code 0: done, or stopped; 1: the loss was not finite, or top-1 accuracy stayed below target_top1;
2: bad input, with one line that says what.
"""

import sys

import backbones  # registers the named models
from training import run
from training.classification import Classification
from training.config import Config


def main(argv: list[str] | None = None) -> int:
    return run.main(Classification, Config, __doc__, argv, backbones)


if __name__ == "__main__":
    sys.exit(main())
