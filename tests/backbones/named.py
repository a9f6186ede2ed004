"""Models with a block, by name, for tests."""

import pytest
import timm
import torch
from conftest import in_turn

import backbones  # noqa: F401  registers them
from vision_attn import Mixer, list_blocks
from vision_attn.layout import Residual

RESNETS = ["resnet18", "resnet50", "resnet101", "cifar_resnet20", "cifar_resnet32", "cifar_resnet56"]
VITS = [f"vit_{size}_patch16_224" for size in ("tiny", "small", "base")] + ["vit_tiny_patch4_32", "vit_tiny_conv2_32"]
# arguments that make a stock model small, where its width is not the question
NARROW = dict(channels=(16, 24, 40, 56))  # a ResNet
THIN = dict(depth=2, embed_dim=96)  # a ViT
# stock model, its arguments, and the size of an image it takes
SMALL = [
    pytest.param("resnet18", NARROW, (67, 43), id="resnet18"),
    pytest.param("cifar_resnet20", {}, (29, 37), id="cifar_resnet20"),
    pytest.param("vit_tiny_patch4_32", dict(THIN, img_size=(28, 44)), (28, 44), id="vit"),
]
CIFAR_AND_VIT = SMALL[1:]

small_models = in_turn({"block": list_blocks(), "stock, args, size": SMALL})
smallest_models = in_turn({"block": list_blocks(), "stock, args, size": CIFAR_AND_VIT})


def made(stock, block, args=None, **more):
    return timm.create_model(f"{stock}_{block}", **{"num_classes": 7, **(args or {}), **more})


def images(size, batch=2, channels=3):
    return torch.randn(batch, channels, *size)


def blocks_in(model):
    """Names of the layers with a block, and of the mixers that stand for a ViT's attention."""
    found = [name for name, m in model.named_modules() if isinstance(m, (Residual, Mixer))]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
