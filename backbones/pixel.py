"""Pixel-autoregressive transformers: images as integers in raster order, each predicted from all before it.

Child et al. 2019, Sparse Transformer, https://arxiv.org/abs/1904.10509: see `pixel_model`, which has what both share.
Ho et al. 2019, Axial Transformer, https://arxiv.org/abs/1912.12180: see `TwoStreamPixelTransformer`.

Deviations: the published CIFAR-10 model splits heads between *layers* (three local, one column); the named models split
the heads of each layer, which gave the best bits per dimension on digits.
"""

import warnings

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vision_attn import Grid, Mixer, check, create_block
from vision_attn.mixer import PatternMixer
from vision_attn.pattern import BlindSpot, Column, Row, blind_spot

from .pixel_model import PixelModel, ResidualBlock
from .reversible import refuse_statistics, two_streams

__all__ = ["PixelTransformer", "TwoStreamPixelTransformer"]

STRIDED = {"name": "strided", "split_heads": True}


class PixelTransformer(PixelModel):
    """A stack of causal blocks of the zoo over all values of an image.

    Args:
        img_size: height and width, or one integer for both.
        in_chans: channels C of the image.
        levels: number of values; images hold integers in 0 … levels - 1.
        dim: channels of the tokens.
        depth: layers.
        num_heads: heads of each; divides ``dim``.
        blocks: a causal block by name; or a dict of its name and options, {"name": "strided", "part": "local"}; or a
            list of these that the layers cycle through.
        mlp_ratio: hidden channels of the MLPs, as a multiple of ``dim``.
        drop_rate: dropout at the end of each residual branch.
        reversible: layers are those of `reversible.two_streams`: another function, whose training keeps no activations
            of them. Gradient checkpointing changes nothing then.
        mlp_chunks: parts of the tokens that MLPs run on one after the other, and again in the backward pass: less
            memory for their hidden channels, and in layers that are not reversible a second forward pass.

    Raises:
        ValueError: an argument is out of range; a block is unknown or can't be causal; a block counts what passes
            through it, and would do so twice (``reversible``).
        TypeError: an option the block does not have.

    Warns:
        BlindSpot: some of the past stays unseen at any depth.

    Cost: that of the blocks for H × (W·C) tokens.
    """

    caches = ("pattern", "full", None)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 8,
        in_chans: int = 1,
        levels: int = 17,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        blocks: str | dict | list[str | dict] = STRIDED,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        reversible: bool = False,
        mlp_chunks: int = 1,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        super().__init__(img_size, in_chans, levels, dim, **dd)
        check.positive_int("depth", depth)
        check.positive("mlp_ratio", mlp_ratio)
        check.rate("drop_rate", drop_rate)
        check.boolean("reversible", reversible)
        check.positive_int("mlp_chunks", mlp_chunks)
        self.reversible = reversible
        mixers = create_cycle(blocks, depth, dim, num_heads=num_heads, **dd)
        self.blocks = nn.ModuleList(ResidualBlock(mixer, mlp_ratio, drop_rate, mlp_chunks, **dd) for mixer in mixers)
        if reversible:
            refuse_statistics("reversible", self.blocks)
        self.init_weights()

    def logits(self, values: Tensor) -> Tensor:
        """Values (B, H·W·C) in raster order → logits (B, H·W·C, levels)."""
        start = self.start.expand(len(values), 1, -1)
        x = torch.cat([start, self.value(values[:, :-1])], dim=1) + self.positions().flatten(0, 1)
        if self.reversible:
            x = two_streams([block.halves() for block in self.blocks], x, self.grid)
        else:
            x = self.run(self.blocks, x, self.grid)
        return self.head(self.norm(x))

    def new_caches(self, batch: int, full: bool = False) -> list:
        """One empty cache for each block, for ``batch`` images; ``full`` keeps all keys and values."""
        more = dict(full=True) if full else {}
        like = dict(device=self.start.device, dtype=self.start.dtype)
        return [block.attn.new_cache(batch, self.grid, **like, **more) for block in self.blocks]

    def step(self, value: Tensor, place: int, caches: list) -> Tensor:
        """Logits (B, levels) of the value at raster index ``place``, after `step` was called for all places before it.

        Args:
            value: (B,), that of the place before; at place 0 only its length matters.
            place: 0 … H·W·C - 1.
            caches: those of `new_caches`.
        """
        pixel, channel = divmod(place, self.in_chans)
        y, x = divmod(pixel, self.img_size[1])
        token = self.value(value) if place else self.start.expand(len(value), -1)
        token = token + (self.row[y] + self.column[x] + self.channel[channel])
        if self.reversible:
            first = second = token
            for block, cache in zip(self.blocks, caches):
                first = first + block.attend_step(second, place, cache)
                second = second + block.transform(first)
            token = (first + second) / 2
        else:
            for block, cache in zip(self.blocks, caches):
                token = block.step(token, place, cache)
        return self.head(self.norm(token))

    def predictor(self, values: Tensor, first: int, cache: str | None):
        if cache is None:
            return super().predictor(values, first, cache)
        caches = self.new_caches(len(values), full=cache == "full")

        def predict(place):
            return self.step(values[:, place - 1], place, caches)

        for place in range(first):
            predict(place)
        return predict


class TwoStreamPixelTransformer(PixelModel):
    """The Axial Transformer: rows and columns that see all of the past, in two streams.

    Ho et al. 2019, https://arxiv.org/abs/1912.12180
        h = embedding of the values; u = shift down by a row (outer(h + position)); inner(shift right(h) + u + position)
        outer: unmasked rows, then masked columns, in pairs; inner: masked rows.
    What a place gets through u is all rows above it; the inner rows add its own row, up to the value before. A learned
    start stands before each row; above the first row u is 0.
    Deviations: the values of a pixel's channels lie side by side in a grid of H × (W·C), instead of one slice of the
    image for each channel with an encoder of the slices before; MLPs and initialisation are as in `PixelTransformer`.

    Args:
        img_size, in_chans, levels, dim, num_heads, mlp_ratio, drop_rate: as `PixelTransformer`.
        depth: layers of the inner stream.
        outer_depth: pairs of layers (a row, a column) of the outer stream.

    Raises:
        ValueError: an argument is out of range; it is named with its value.

    Cost: 2 N W·C d for a row layer, 2 N H d for a column layer, N = H·W·C. `generate` computes the outer stream once
    for each row and one inner row for each value.
    """

    caches = ("pattern", None)

    def __init__(
        self,
        img_size: int | tuple[int, int] = 8,
        in_chans: int = 1,
        levels: int = 17,
        dim: int = 64,
        depth: int = 2,
        outer_depth: int = 1,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        super().__init__(img_size, in_chans, levels, dim, **dd)
        check.positive_int("depth", depth)
        check.positive_int("outer_depth", outer_depth)
        check.positive("mlp_ratio", mlp_ratio)
        check.rate("drop_rate", drop_rate)

        def stream(*patterns):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BlindSpot)  # of one layer: the two streams together reach all
                mixers = [PatternMixer(pattern, dim, num_heads, **dd) for pattern in patterns]
            return nn.ModuleList(ResidualBlock(mixer, mlp_ratio, drop_rate, **dd) for mixer in mixers)

        self.outer = stream(*[Row(), Column(past=True)] * outer_depth)
        self.inner = stream(*[Row(past=True)] * depth)
        self.init_weights()

    def logits(self, values: Tensor) -> Tensor:
        """Values (B, H·W·C) in raster order → logits (B, H·W·C, levels)."""
        positions = self.positions()
        above = F.pad(self.outer_stream(values, positions)[:, :-1], (0, 0, 0, 0, 1, 0))
        return self.inner_stream(values, above, positions)

    def outer_stream(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values (B, R·W·C) of R whole rows, positions (R, W·C, dim) → (B, R, W·C, dim): each row and all above it."""
        rows, width, _ = positions.shape
        x = self.value(values) + positions.flatten(0, 1)
        return rearrange(self.run(self.outer, x, Grid(rows, width)), "B (R w) d -> B R w d", R=rows)

    def inner_stream(self, values: Tensor, above: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, R·W·C, levels) of R rows, each from its own values and from ``above`` (B, R, W·C, dim)."""
        rows, width, dim = positions.shape
        h = rearrange(self.value(values), "B (R w) d -> B R w d", R=rows)
        start = self.start.expand(len(values), rows, 1, dim)
        r = torch.cat([start, h[:, :, :-1]], dim=2) + above + positions
        return self.head(self.norm(self.run(self.inner, r.flatten(1, 2), Grid(rows, width))))

    def predictor(self, values: Tensor, first: int, cache: str | None):
        if cache is None:
            return super().predictor(values, first, cache)
        positions, width = self.positions(), self.grid.width
        above = positions.new_zeros(len(values), 1, width, self.dim)

        def predict(place):
            nonlocal above
            y, x = divmod(place, width)
            if x == 0 and y > 0:
                above = self.outer_stream(values[:, : y * width], positions[:y])[:, -1:]
            return self.inner_stream(values[:, y * width : (y + 1) * width], above, positions[y : y + 1])[:, x]

        return predict


def create_cycle(blocks: str | dict | list[str | dict], depth: int, dim: int, **options) -> list[Mixer]:
    """``depth`` causal mixers that cycle through ``blocks``; warns with BlindSpot if they miss some of the past.

    Args:
        blocks: names, or dicts of name and options; as `PixelTransformer`.
        depth: mixers to make.
        dim, options: of all of them.
    """
    cycle = blocks if isinstance(blocks, (list, tuple)) else [blocks]
    cycle = [dict(name=entry) if isinstance(entry, str) else entry for entry in cycle]
    if not cycle or not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in cycle):
        raise ValueError(f"blocks={blocks!r}: must be a block's name, a dict with a name, or a list of these")
    if len(cycle) > depth:
        raise ValueError(f"blocks={blocks!r}: must be at most as many as depth={depth}")
    cycle = [dict(causal=True) | options | entry for entry in cycle]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BlindSpot)  # of one block: another of the cycle may see what it misses
        mixers = [create_block(dim=dim, **cycle[layer % len(cycle)]) for layer in range(depth)]
    patterns = [getattr(mixer, "pattern", None) for mixer in mixers[: len(cycle)]]
    missed = blind_spot(patterns, Grid(6, 7)) if None not in patterns else 0  # one without a pattern sees it all
    if missed:
        message = f"blocks={blocks!r}: {missed} of the 903 past pairs on a 6×7 grid are unreached at any depth"
        warnings.warn(message, BlindSpot, stacklevel=3)
    return mixers


def _create(cls, variant, pretrained, defaults, kwargs):
    args = {**defaults, **kwargs}
    classes, levels = args.pop("num_classes", None), args["levels"]
    if classes not in (None, levels):  # timm gives it when it loads what save_for_hf wrote
        raise ValueError(f"num_classes={classes!r}: a pixel model has none; its number of values is levels={levels}")
    return build_model_with_cfg(cls, variant, pretrained, kwargs_filter=("num_classes",), **args)


def _cfg(in_chans, size, levels):
    return {
        "url": "",
        "num_classes": levels,
        "input_size": (in_chans, size, size),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.0,) * in_chans,
        "std": (1.0,) * in_chans,
        "first_conv": None,
        "classifier": None,
        "license": "apache-2.0",
        "paper_ids": "arXiv:1904.10509",
    }


DATA = {"digits": (1, 8, 17), "cifar10": (3, 32, 256), "imagenet32": (3, 32, 256), "imagenet64": (3, 64, 256)}
default_cfgs = generate_default_cfgs(
    {f"pixel_{data}{kind}.untrained": _cfg(*sizes) for data, sizes in DATA.items() for kind in ("", "_axial")}
)


@register_model
def pixel_digits(pretrained=False, **kwargs) -> PixelTransformer:
    """For scikit-learn's 8×8 digits: 4 layers, width 64, 0.20 M parameters; trains in two minutes on one CPU core."""
    args = dict(levels=17, dim=64, depth=4, num_heads=4)
    return _create(PixelTransformer, "pixel_digits", pretrained, args, kwargs)


@register_model
def pixel_cifar10(pretrained=False, **kwargs) -> PixelTransformer:
    """For CIFAR-10: 12 layers, width 256, 4 heads, 9.6 M parameters.

    Sized for ten minutes on one H200, an estimate: 6 · 9.6 M operations for each of 3,072 values are 0.18 TFLOP an
    image, so 150 TFLOP/s of bfloat16 see about 0.5 M images, ten epochs. The published 59 M parameters (128 layers)
    are made for 120 epochs. Heads are 64 wide, what flash kernels are fastest at.
    """
    args = dict(levels=256, dim=256, depth=12, num_heads=4)
    return _create(PixelTransformer, "pixel_cifar10", pretrained, args, kwargs)


@register_model
def pixel_imagenet32(pretrained=False, **kwargs) -> PixelTransformer:
    """For ImageNet at 32×32: 24 layers, width 512, 8 heads, 76 M parameters; half the depth of the 64×64 model."""
    args = dict(levels=256, dim=512, depth=24, num_heads=8)
    return _create(PixelTransformer, "pixel_imagenet32", pretrained, args, kwargs)


@register_model
def pixel_imagenet64(pretrained=False, **kwargs) -> PixelTransformer:
    """For ImageNet at 64×64: 48 layers, width 512, 16 heads, 152 M parameters, as published."""
    args = dict(levels=256, dim=512, depth=48, num_heads=16)
    return _create(PixelTransformer, "pixel_imagenet64", pretrained, args, kwargs)


@register_model
def pixel_digits_axial(pretrained=False, **kwargs) -> TwoStreamPixelTransformer:
    """``pixel_digits`` in two streams: 2 outer and 2 inner layers."""
    args = dict(levels=17, dim=64, depth=2, outer_depth=1, num_heads=4)
    return _create(TwoStreamPixelTransformer, "pixel_digits_axial", pretrained, args, kwargs)


@register_model
def pixel_cifar10_axial(pretrained=False, **kwargs) -> TwoStreamPixelTransformer:
    """``pixel_cifar10`` in two streams: 8 outer and 4 inner layers."""
    args = dict(levels=256, dim=256, depth=4, outer_depth=4, num_heads=4)
    return _create(TwoStreamPixelTransformer, "pixel_cifar10_axial", pretrained, args, kwargs)


@register_model
def pixel_imagenet32_axial(pretrained=False, **kwargs) -> TwoStreamPixelTransformer:
    """``pixel_imagenet32`` in two streams: 16 outer and 8 inner layers."""
    args = dict(levels=256, dim=512, depth=8, outer_depth=8, num_heads=8)
    return _create(TwoStreamPixelTransformer, "pixel_imagenet32_axial", pretrained, args, kwargs)


@register_model
def pixel_imagenet64_axial(pretrained=False, **kwargs) -> TwoStreamPixelTransformer:
    """``pixel_imagenet64`` in two streams: 32 outer and 16 inner layers."""
    args = dict(levels=256, dim=512, depth=16, outer_depth=16, num_heads=16)
    return _create(TwoStreamPixelTransformer, "pixel_imagenet64_axial", pretrained, args, kwargs)
