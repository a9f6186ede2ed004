"""ViTs with attention: ``<vit>_<block>`` for every block of the zoo, for example ``vit_small_patch16_224_criss_cross``.

Mixers take the place of self-attention and inherit its qkv and proj; gates act on the patch grid behind every
block, beside the stock attention, but for the last block where only a class token is read after it. The grid comes
from the patch embedding of the very call, so rectangular and dynamic sizes work.
"""

from functools import partial

from timm.layers import HybridEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.models.vision_transformer_hybrid import ConvStem

from vision_attn import Gate
from vision_attn.zoo import block_class

from .cifar_resnet import CIFAR_MEAN, CIFAR_STD
from .insert import insert
from .named import register_stock
from .replace import replace

__all__ = []
STOCK = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_tiny_patch4_32",
    "vit_tiny_conv2_32",
)
FEATURES = dict(out_indices=3, feature_cls="getter")

SMALL = dict(
    url="",
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=None,
    fixed_input_size=True,
    crop_pct=1.0,
    interpolation="bicubic",
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
    classifier="head",
)

default_cfgs = generate_default_cfgs(
    {
        "vit_tiny_patch4_32.untrained": dict(SMALL, first_conv="patch_embed.proj"),
        "vit_tiny_conv2_32.untrained": dict(SMALL, first_conv="patch_embed.backbone.0.conv"),
    }
)


@register_model
def vit_tiny_patch4_32(pretrained=False, **kwargs) -> VisionTransformer:
    """ViT-Tiny for 32×32 images: 8×8 patches of 4×4 pixels, width 192, depth 12, 3 heads."""
    args = dict(img_size=32, patch_size=4, embed_dim=192, depth=12, num_heads=3)
    return build_model_with_cfg(
        VisionTransformer, "vit_tiny_patch4_32", pretrained, feature_cfg=dict(FEATURES),
        pretrained_filter_fn=checkpoint_filter_fn, **{**args, **kwargs},
    )  # fmt: skip


@register_model
def vit_tiny_conv2_32(pretrained=False, **kwargs) -> VisionTransformer:
    """ViT-Tiny for 32×32 images behind three convolutions in place of patches (Xiao et al. 2021,
    https://arxiv.org/abs/2106.14881): 16×16 tokens, of 11×11 pixels each, width 192, depth 12, 3 heads."""
    args = dict(img_size=32, patch_size=1, embed_dim=192, depth=12, num_heads=3) | kwargs
    width, of_weights = args["embed_dim"], {key: kwargs[key] for key in ("device", "dtype") if key in kwargs}
    stem = ConvStem(kwargs.get("in_chans", 3), 3, (width // 4, width // 2, width), stride=(2, 1, 1), **of_weights)
    return build_model_with_cfg(
        VisionTransformer, "vit_tiny_conv2_32", pretrained, feature_cfg=dict(FEATURES),
        pretrained_filter_fn=checkpoint_filter_fn, embed_layer=partial(HybridEmbed, backbone=stem, proj=False), **args,
    )  # fmt: skip


def add_attention(
    model: VisionTransformer, block: str, at: str | list[str] | None = None, **options
) -> VisionTransformer:
    """Replaces the self-attention of a ViT by a mixer, or adds a gate behind its blocks.

    Args:
        model: any of timm's ViTs.
        block: one of `vision_attn.list_blocks`.
        at: wildcards of ViT blocks ("blocks.[6-9]"), or several. None: all.
        options: of the block.

    Raises:
        ValueError: ``at`` matches no block; an option is out of range.
    """
    if issubclass(block_class(block), Gate):
        return insert(model, block, at, **options)
    return replace(model, block, at, **options).model


for stock in STOCK:
    register_stock(stock, add_attention, __name__, FEATURES, checkpoint_filter_fn)
