"""What pixel models share: images as integers in raster order, their likelihood, and sampling.

Child et al. 2019, Sparse Transformer, https://arxiv.org/abs/1904.10509
    p(image) = Π_i softmax(f(values before i)) over rows, columns, channels; position (y, x, c) is (y, x·C + c) of
    Grid(H, W·C). The input at i is the embedding of value i - 1 (at the first: a learned start) plus learned embeddings
    of row, column and channel of i. Pre-norm blocks x + attn(LN x), x + mlp(LN x); GELU x·σ(1.702 x).

Initialisation as published: weights N(0, 0.125 / fan-in), those that end a residual branch times (2 · depth)^-½;
standard deviation 0.125 · dim^-½ of value embeddings and 0.125 · (3 · dim)^-½ of each of the three position embeddings;
logits and biases 0.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp, get_act_layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from vision_attn import Grid, Mixer, check

from .reversible import Half, in_chunks


class ResidualBlock(nn.Module):
    """x + attn(norm x), then x + mlp(norm x), with dropout at the end of both branches.

    Args:
        attn: a causal mixer.
        mlp_ratio: hidden channels of the MLP, as a multiple of the mixer's ``dim``.
        drop_rate: of the dropout.
        mlp_chunks: parts of the tokens that the MLP runs on one after the other.
    """

    def __init__(
        self,
        attn: Mixer,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        mlp_chunks: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.mlp_chunks = mlp_chunks
        self.norm1 = nn.LayerNorm(attn.dim, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(attn.dim, **dd)
        self.mlp = Mlp(attn.dim, int(mlp_ratio * attn.dim), act_layer=get_act_layer("quick_gelu"), **dd)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, H·W, dim) → (B, H·W, dim)."""
        x = x + self.attend(x, grid)
        return x + in_chunks(self.transform, x, self.mlp_chunks)

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        """The first branch."""
        return self.drop(self.attn(self.norm1(x), grid))

    def transform(self, x: Tensor, *_) -> Tensor:
        """The second branch, in which each token is on its own."""
        return self.drop(self.mlp(self.norm2(x)))

    def halves(self) -> tuple[Half, Half]:
        """The branches as those of a reversible layer."""
        attend = Half(self.attend, (self.norm1, self.attn))
        return attend, Half(self.transform, (self.norm2, self.mlp), self.mlp_chunks)

    def step(self, x: Tensor, place: int, cache) -> Tensor:
        """The token (B, dim) at raster index ``place``, after all before it went through ``cache``."""
        x = x + self.attend_step(x, place, cache)
        return x + self.transform(x)

    def attend_step(self, x: Tensor, place: int, cache) -> Tensor:
        """What the first branch gives for the token (B, dim) at raster index ``place``."""
        return self.drop(self.attn.step(self.norm1(x), place, cache))


class PixelModel(nn.Module):
    """What pixel models share: embeddings, head, likelihood and sampling. A subclass has ``logits``, ``predictor``
    and an initialisation of its blocks.

    Args:
        img_size: height and width, or one integer for both.
        in_chans: channels C of the image.
        levels: number of values; images hold integers in 0 … levels - 1.
        dim: channels of the tokens.

    Raises:
        ValueError: an argument is out of range; it is named with its value.
    """

    caches = (None,)  # what generate's cache may be

    def __init__(self, img_size, in_chans: int, levels: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.img_size = check.pair("img_size", img_size)
        check.positive_int("in_chans", in_chans)
        check.positive_int("levels", levels)
        check.positive_int("dim", dim)
        height, width = self.img_size
        self.in_chans, self.levels, self.dim = in_chans, levels, dim
        self.num_classes, self.num_features = levels, dim  # timm's names
        self.grid = Grid(height, width * in_chans)
        self.grad_checkpointing = False
        self.value = nn.Embedding(levels, dim, **dd)
        self.start = nn.Parameter(torch.empty(dim, **dd))
        self.row = nn.Parameter(torch.empty(height, dim, **dd))
        self.column = nn.Parameter(torch.empty(width, dim, **dd))
        self.channel = nn.Parameter(torch.empty(in_chans, dim, **dd))
        self.norm = nn.LayerNorm(dim, **dd)
        self.head = nn.Linear(dim, levels, **dd)

    def init_weights(self) -> None:
        """The paper's initialisation: see the top of the file. Parameters a mixer has beside its projections stay."""
        blocks = [module for module in self.modules() if isinstance(module, ResidualBlock)]
        for linear in (module for block in blocks for module in block.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=math.sqrt(0.125 / linear.in_features))
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for last in (last for block in blocks for last in (block.mlp.fc2, *(m.proj for m in block.attn.steps))):
                last.weight.mul_((2 * len(blocks)) ** -0.5)
        for embedding in (self.value.weight, self.start):
            nn.init.normal_(embedding, std=0.125 * self.dim**-0.5)
        for embedding in (self.row, self.column, self.channel):
            nn.init.normal_(embedding, std=0.125 * (3 * self.dim) ** -0.5)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the activations of each block in the backward pass: memory for a second forward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Embeddings: the optimizer leaves them undecayed, as it does biases and norms."""
        return {"value.weight", "start", "row", "column", "channel"}

    def values(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of integers → their values in raster order (B, H·W·C), int64.

        Raises:
            ValueError: another shape, not integers, or a value outside 0 … levels - 1. That is found out without a
                wait on a CUDA device, which stops then with an assertion of its own.
        """
        shape = (self.in_chans, *self.img_size)
        if images.ndim != 4 or images.shape[1:] != shape:
            raise ValueError(f"images of shape {tuple(images.shape)}: must be (B, C, H, W) with (C, H, W) = {shape}")
        if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
            raise ValueError(f"images of {images.dtype}: must be integers in 0..{self.levels - 1}")
        values = self.in_raster_order(images)
        if not torch.compiler.is_compiling() and values.numel():  # a compiled graph would break here
            least, most = values.aminmax()
            allowed = f"must be integers in 0..{self.levels - 1}"
            if values.device.type != "cpu":
                torch._assert_async((least >= 0) & (most < self.levels), f"images: {allowed}")
            elif least < 0 or most >= self.levels:
                raise ValueError(f"images with values {least}..{most}: {allowed}")
        return values

    @staticmethod
    def in_raster_order(images: Tensor) -> Tensor:
        """`values` of images that were checked."""
        return rearrange(images.long(), "B C H W -> B (H W C)")

    def images(self, values: Tensor) -> Tensor:
        """The inverse of `values`."""
        height, width = self.img_size
        return rearrange(values, "B (H W C) -> B C H W", H=height, W=width)

    def positions(self) -> Tensor:
        """What each place is, (H, W·C, dim): the sum of its row, column and channel embeddings."""
        place = self.row[:, None, None] + self.column[None, :, None] + self.channel
        return place.flatten(1, 2)

    def run(self, blocks: nn.ModuleList, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, H·W, dim) through ``blocks``, recomputed in the backward pass where that is set."""
        for block in blocks:
            recompute = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpoint(block, x, grid, use_reentrant=False) if recompute else block(x, grid)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) of integers → logits (B, H·W·C, levels) of each value, given all before it.

        Raises:
            ValueError: as `values`.
        """
        return self.logits(self.values(images))

    def logits(self, values: Tensor) -> Tensor:
        """Values (B, H·W·C) in raster order → logits (B, H·W·C, levels)."""
        raise NotImplementedError(f"{type(self).__name__} has no logits")

    def bits_per_dim(self, images: Tensor) -> Tensor:
        """Mean negative log-likelihood of the values of images (B, C, H, W), in bits; a scalar that has a gradient."""
        logits = self(images).float()
        return F.cross_entropy(logits.flatten(0, 1), self.in_raster_order(images).flatten()) / math.log(2)

    @torch.no_grad()
    def generate(
        self,
        start: int | Tensor,
        rows: int = 0,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        cache: str | None = "pattern",
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draws images, or completes the lower part of given ones. Runs in eval mode.

        Args:
            start: how many images to draw, or images (B, C, H, W) of integers to complete.
            rows: of given images, how many rows from the top are kept, 0 … H.
            temperature: divides the logits; below 1 prefers what is likely.
            top_k: draw from the k likeliest values only. None: from all.
            cache: "pattern" keeps what later places can still see, "full" all keys and values; None recomputes
                everything for every value, the slow definition.
            generator: of the draws; on the model's device.
            progress: show a progress bar.

        Returns:
            Images (B, C, H, W), int64.

        Raises:
            ValueError: an argument is out of range; it is named with its value.

        Cost: H·W·C steps one after the other; with ``cache=None`` each is a forward pass over the whole image.
        """
        check.positive("temperature", temperature)
        if top_k is not None:
            check.one_of("top_k", top_k, range(1, self.levels + 1))
        check.one_of("cache", cache, self.caches)
        if isinstance(start, Tensor):
            check.one_of("rows", rows, range(self.img_size[0] + 1))
            # checked where they are; of one channel they are a view of the images
            values = self.values(start).to(self.start.device, copy=True)
        else:
            check.positive_int("start", start)
            check.one_of("rows", rows, (0,))
            values = torch.zeros(start, self.grid.size, dtype=torch.long, device=self.start.device)
        first = rows * self.grid.width
        values[:, first:] = 0

        was_training = self.training
        self.eval()
        try:
            predict = self.predictor(values, first, cache)
            for place in tqdm(range(first, self.grid.size), unit=" values", leave=False, disable=not progress):
                logits, levels = (predict(place).float() / temperature).topk(top_k or self.levels)
                drawn = logits.softmax(dim=-1).multinomial(1, generator=generator)
                values[:, place] = levels.gather(1, drawn)[:, 0]
        finally:
            self.train(was_training)
        return self.images(values)

    def predictor(self, values: Tensor, first: int, cache: str | None):
        """A function from a place to the logits (B, levels) of its value, to be called for first, first + 1, … in turn.

        Args:
            values: (B, H·W·C); the caller fills in each value before it asks for the next place.
            first: the beginning of a row.
            cache: one of ``caches``.
        """
        return lambda place: self.logits(values)[:, place]
