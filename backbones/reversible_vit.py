"""Reversible ViTs, for example ``reversible_vit_tiny_patch16_224``: stock parts in two streams.

They take timm's arguments and `backbones.replace`, but not the stock models' weights, which are of another function.
"""

from collections.abc import Iterator

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from vision_attn import Grid, Mixer, check

from .cifar_resnet import CIFAR_MEAN, CIFAR_STD
from .reversible import Half, refuse_statistics, two_streams

__all__ = ["ReversibleViT"]


class ReversibleViT(VisionTransformer):
    """timm's ViT with layers as those of `reversible.two_streams`: no activations of them are kept in training.

    Args:
        args, vit: those of `VisionTransformer`.
        mlp_chunks: parts of the tokens that MLPs run on one after the other.

    Raises:
        ValueError: ``mlp_chunks`` is out of range; patches are to be dropped, or whole MLPs beside ``mlp_chunks``; a
            layer counts what passes through it.
    """

    def __init__(self, *args, mlp_chunks: int = 1, patch_drop_rate: float = 0.0, drop_path_rate: float = 0.0, **vit):
        check.positive_int("mlp_chunks", mlp_chunks)
        if patch_drop_rate:
            raise ValueError(f"patch_drop_rate={patch_drop_rate!r}: must be 0: layers need every patch in its place")
        if drop_path_rate and mlp_chunks > 1:
            raise ValueError(
                f"drop_path_rate={drop_path_rate!r}: must be 0 with mlp_chunks={mlp_chunks}, it drops images"
            )
        super().__init__(*args, drop_path_rate=drop_path_rate, **vit)
        self.mlp_chunks = mlp_chunks
        refuse_statistics("reversible", self.blocks)

    def layers(self, grid: Grid) -> Iterator[tuple[Half, Half]]:
        """Attention and MLP of each block."""
        for block in self.blocks:
            yield halves(block, grid, self.mlp_chunks)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As that of timm's, without masks."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal: a reversible ViT takes neither")
        grid = Grid(*self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        return self.norm(two_streams(list(self.layers(grid)), x))

    def forward_intermediates(self, *args, **options):
        """Refused: between its layers there are two streams."""
        raise NotImplementedError("forward_intermediates: between the layers of a reversible ViT there are two streams")


def halves(block: Block, grid: Grid, mlp_chunks: int) -> tuple[Half, Half]:
    """What a block adds by its attention and by its MLP."""

    def attend(x):
        x = block.norm1(x)
        x = block.attn(x, grid) if isinstance(block.attn, Mixer) else block.attn(x)
        return block.drop_path1(block.ls1(x))

    def transform(x):
        return block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    return (
        Half(attend, (block.norm1, block.attn, block.ls1)),
        Half(transform, (block.norm2, block.mlp, block.ls2), mlp_chunks),
    )


def _cfg(size: int, classes: int, **more) -> dict:
    shared = dict(url="", num_classes=classes, input_size=(3, size, size), pool_size=None, fixed_input_size=True)
    more = dict(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.9) | more
    return {**shared, **more, "interpolation": "bicubic", "first_conv": "patch_embed.proj", "classifier": "head"}


SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
default_cfgs = generate_default_cfgs(
    {f"reversible_vit_{name}_patch16_224.untrained": _cfg(224, 1000) for name in SIZES}
    | {"reversible_vit_tiny_patch4_32.untrained": _cfg(32, 10, mean=CIFAR_MEAN, std=CIFAR_STD, crop_pct=1.0)}
)


def _create(variant: str, size: str, pretrained: bool, kwargs: dict, **shape) -> ReversibleViT:
    dim, heads = SIZES[size]
    args = dict(embed_dim=dim, depth=12, num_heads=heads) | shape
    return build_model_with_cfg(ReversibleViT, variant, pretrained, **{**args, **kwargs})


@register_model
def reversible_vit_tiny_patch16_224(pretrained=False, **kwargs) -> ReversibleViT:
    """ViT-Tiny in two streams: 14×14 patches, width 192, depth 12, 3 heads."""
    return _create("reversible_vit_tiny_patch16_224", "tiny", pretrained, kwargs)


@register_model
def reversible_vit_small_patch16_224(pretrained=False, **kwargs) -> ReversibleViT:
    """ViT-Small in two streams: 14×14 patches, width 384, depth 12, 6 heads."""
    return _create("reversible_vit_small_patch16_224", "small", pretrained, kwargs)


@register_model
def reversible_vit_base_patch16_224(pretrained=False, **kwargs) -> ReversibleViT:
    """ViT-Base in two streams: 14×14 patches, width 768, depth 12, 12 heads."""
    return _create("reversible_vit_base_patch16_224", "base", pretrained, kwargs)


@register_model
def reversible_vit_tiny_patch4_32(pretrained=False, **kwargs) -> ReversibleViT:
    """ViT-Tiny in two streams for 32×32 images: 8×8 patches, width 192, depth 12, 3 heads."""
    return _create("reversible_vit_tiny_patch4_32", "tiny", pretrained, kwargs, img_size=32, patch_size=4)
