"""Transforms from PIL images to tensors: timm's, with a crop for small images.

They give uint8 tensors (C, H, W), which the loader normalises on the device; with random erasing, which acts on
normalised values, float32 tensors that are normalised already.
"""

from itertools import chain

from PIL import ImageOps
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, RandomCrop, Resize

from training.config import AugmentConfig


def train_transform(
    config: AugmentConfig,
    img_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str = "bicubic",
) -> Compose:
    """What a training image goes through. Draws from random, numpy and torch's CPU generator.

    Args:
        img_size: height and width of the result, in pixels.
        mean, std: of each channel, in 0..1; fill colour of auto_augment, and normalisation where erase is on.

    Raises:
        ValueError: if timm does not know the policy auto_augment.
    """
    try:
        crop, change, finish = create_transform(
            img_size,
            is_training=True,
            scale=(config.min_area, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=config.erase,
            re_mode="pixel",
            normalize=config.erase > 0,
            separate=True,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"augment.auto_augment is not a policy timm knows: {config.auto_augment!r}") from error
    resize = Resize(img_size, InterpolationMode(interpolation))
    if config.crop == "pad":
        crop.transforms[0] = Compose([resize, RandomCrop(img_size, padding=max(img_size) // 8)])
    elif config.crop == "centre":
        height, width = img_size
        cover = Resize(height, InterpolationMode(interpolation))
        if height != width:
            cover = ResizeKeepRatio(img_size, longest=0.0, interpolation=interpolation)
        crop.transforms[0] = Compose([cover, CenterCrop(img_size)])
    for policy in change.transforms:
        _keep_a_bit(policy)
    return Compose(crop.transforms + change.transforms + finish.transforms)


def eval_transform(img_size: tuple[int, int], interpolation: str = "bicubic", crop_pct: float = 1.0) -> Compose:
    """Resize the shorter side to img_size / crop_pct, then cut out the centre; gives uint8 tensors (C, H, W)."""
    return create_transform(img_size, interpolation=interpolation, crop_pct=crop_pct, normalize=False)


def _keep_a_bit(policy):
    """Make the posterize operations of a timm policy keep at least one bit: Pillow 13 refuses to keep none."""
    operations = chain(getattr(policy, "ops", ()), *getattr(policy, "policy", ()))
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image, bits, **_):
    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))
