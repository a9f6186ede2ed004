"""Mixer: tokens on a grid exchange information. qkv → heads → mix → proj."""

import warnings
from functools import reduce
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from . import check
from .engines.cache import PatternCache, RemixedPast
from .engines.union import attend
from .grid import Grid
from .leaf import Leaf
from .pattern import BlindSpot, Pattern, blind_spot
from .precision import weight_of
from .rotary import Rotary
from .traced import fixed


class Mixer(Leaf):
    """Multi-head attention over the tokens of a grid.

    A subclass says its mechanism twice, sharing no code: ``weights`` is the definition, the matrix as the paper
    writes it; ``mix`` is the fast path. ``mix(q, k, v, grid) == weights(q, k, grid) @ v``.

    The parameters are named ``qkv`` and ``proj`` as in timm's ViT, so its weights load strictly.

    Args:
        dim: channels in and out.
        num_heads: heads; divides ``dim`` and ``key_dim``. None: as many as leave a head ≥ 32 channels.
        key_dim: channels of all queries (and of all keys) together. None: ``dim``.
        qkv_bias, proj_bias: biases of the two projections.
        qk_norm: normalises each head's queries and keys by ``norm_layer`` (default LayerNorm).
        rotary: turns queries and keys by their places, after their norms: "axial", "mixed" (learned frequencies) or
            "dinov3" (coordinates from -1 to 1), as `rotary.Rotary` tells; refused where scores are not of a query and a
            key at two places. None: not at all.
        scale: factor on q·k. None: (key_dim / num_heads)^-½.
        attn_drop: dropout on the attention weights; proj_drop: dropout on the output.

    Raises:
        ValueError: an argument is out of range; it is named with its value.
    """

    recurrence = 1  # times that OnMap applies the block, with shared weights
    not_causal = ""  # why causal=True is refused, where it is
    not_rotary = ""  # why rotary positions are refused, where it is not for want of queries and keys
    causal = False  # whether nothing is seen that comes later in raster order
    averages = True  # whether weights are ≥ 0 and each token's sum to 1
    undecayed: tuple[str, ...] = ()  # parameters that weight decay leaves alone: learned tokens, tables over positions
    projects = "qkv"  # what is made of the input; what is not, `mix` and `weights` get without channels

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        *,
        key_dim: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        norm_layer: type[nn.Module] | None = None,
        rotary: Literal["axial", "mixed", "dinov3"] | None = None,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        proj_bias: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        check.positive_int("dim", dim)
        key_dim = dim if key_dim is None else key_dim
        check.positive_int("key_dim", key_dim)
        if num_heads is None:
            num_heads = max(n for n in range(1, max(1, dim // 32) + 1) if dim % n == key_dim % n == 0)
        check.positive_int("num_heads", num_heads)
        for name, value in (("dim", dim), ("key_dim", key_dim)):
            if value % num_heads:
                raise ValueError(f"num_heads={num_heads}: must divide {name}={value}")
        if scale is not None:
            check.positive("scale", scale)
        if norm_layer is not None and not callable(norm_layer):
            raise ValueError(f"norm_layer={norm_layer!r}: must be a class of modules")
        for name, value in (("qkv_bias", qkv_bias), ("qk_norm", qk_norm), ("proj_bias", proj_bias)):
            check.boolean(name, value)
        if qk_norm and not {"q", "k"} <= set(self.projects):
            raise ValueError(f"qk_norm={qk_norm!r}: must be False: there are no queries and keys to compare")
        self.check_rotary(rotary)
        check.rate("attn_drop", attn_drop)
        check.rate("proj_drop", proj_drop)
        self.dim, self.key_dim, self.num_heads = dim, key_dim, num_heads
        self.scale = (key_dim // num_heads) ** -0.5 if scale is None else scale
        self.attn_drop = attn_drop
        norm = (norm_layer or nn.LayerNorm) if qk_norm else None
        widths = {"q": key_dim, "k": key_dim, "v": dim}
        self.widths = [widths[part] * (part in self.projects) for part in "qkv"]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=qkv_bias, **dd)
        self.q_norm = norm(key_dim // num_heads, **dd) if norm else nn.Identity()
        self.k_norm = norm(key_dim // num_heads, **dd) if norm else nn.Identity()
        self.rotary = None if rotary is None else Rotary(rotary, num_heads, key_dim // num_heads, **dd)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def check_rotary(self, rotary) -> None:
        """Raises ValueError for rotary positions where they are refused."""
        if rotary is not None and self.rotary_refusal:
            name = type(self).__module__.rpartition(".")[2]
            raise ValueError(f"rotary={rotary!r}: must be None, {name} has no rotary positions: {self.rotary_refusal}")

    @property
    def rotary_refusal(self) -> str:
        """Why rotary positions are refused; empty where they are not."""
        both = {"q", "k"} <= set(self.projects)
        return self.not_rotary or ("" if both else "there are no queries and keys to turn")

    def mix(
        self,
        q: Float[Tensor, "B heads tokens dk"],
        k: Float[Tensor, "B heads tokens dk"],
        v: Float[Tensor, "B heads tokens dv"],
        grid: Grid,
    ) -> Float[Tensor, "B heads tokens dv"]:
        """The fast path."""
        raise NotImplementedError(f"{type(self).__name__} has no mix of its own: see its steps")

    def weights(
        self, q: Float[Tensor, "B heads tokens dk"], k: Float[Tensor, "B heads tokens dk"], grid: Grid
    ) -> Float[Tensor, "B heads tokens tokens"]:
        """The definition: how much each token (row) takes from each token (column)."""
        raise NotImplementedError(f"{type(self).__name__} has no weights of its own: see its steps")

    def forward(self, x: Float[Tensor, "B tokens dim"], grid: Grid) -> Float[Tensor, "B tokens dim"]:
        """Mixes tokens (B, P + H·W, dim) on ``grid`` = (H, W); the first P ≥ 0 are prefix tokens.

        Raises:
            ValueError: ``x`` is not (B, tokens, dim), or ``grid`` has more positions than there are tokens.
        """
        q, k, v = self.heads(x, grid)
        out = rearrange(self.mix(q, k, v, Grid.of(grid)), "B n t d -> B t (n d)")
        return self.proj_drop(self.proj(out))

    def heads(self, x: Float[Tensor, "B tokens dim"], grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x``, each (B, heads, tokens, d)."""
        if x.ndim != 3 or fixed(x.shape[-1]) != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be (B, P + H·W, dim={self.dim})")
        grid = Grid.of(grid)
        prefix = grid.prefix_of(x.shape[1])
        if torch.jit.is_tracing():  # for this number of prefix tokens: others are an error where the graph runs
            x = x.reshape(x.shape[0], prefix + grid.size, self.dim)
        return self.heads_at(x, grid)

    def heads_at(self, x: Float[Tensor, "B tokens dim"], grid: Grid, place: int | None = None) -> tuple:
        """`heads` of tokens that are known to fit ``grid``, or of one token, at raster index ``place`` of it."""
        q, k, v = (rearrange(part, "B t (n d) -> B n t d", n=self.num_heads) for part in self.projected(x))
        return *self.turned(self.q_norm(q), self.k_norm(k), grid, place), v

    def turned(self, q: Tensor, k: Tensor, grid: Grid, place: int | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned by their places if they are to be."""
        return (q, k) if self.rotary is None else self.rotary(q, k, grid, place)

    def projected(self, x: Float[Tensor, "B tokens dim"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of ``x``, those of all heads side by side, each (B, tokens, channels)."""
        return self.qkv(x).split(self.widths, dim=-1)

    def attention(self, x: Float[Tensor, "B tokens dim"], grid: Grid) -> Float[Tensor, "B heads tokens tokens"]:
        """The weights for an input: what attends to what. Cost N²: for looking, not for training."""
        q, k, _ = self.heads(x, grid)
        return self.weights(q, k, Grid.of(grid))

    def new_cache(self, batch: int, grid: Grid, *, full: bool = False, device=None, dtype=None):
        """What `step` keeps of the past while ``batch`` images of ``grid`` are made pixel by pixel.

        ``full=True`` keeps and reads everything, for comparison. Type and device are those of the weights unless given.
        A mixer that knows no better keeps everything and mixes it anew at every step.

        Raises:
            ValueError: the mixer is not causal.
        """
        if not self.causal:
            raise ValueError("causal=False: pixel by pixel only a causal block can go on")
        widths = [width // self.num_heads for width in self.widths]
        return RemixedPast(self.mix, batch, self.num_heads, Grid.of(grid), widths, **self.factory(device, dtype))

    def factory(self, device=None, dtype=None) -> dict:
        """Keyword arguments that make a tensor: device and type of the weights unless given."""
        weight = weight_of(self.qkv)
        return dict(device=device or weight.device, dtype=dtype or weight.dtype)

    @property
    def head_dims(self) -> tuple[int, int]:
        """Channels of a head's keys and of its values."""
        return self.key_dim // self.num_heads, self.dim // self.num_heads

    def step(self, x: Float[Tensor, "B dim"], place: int, cache) -> Float[Tensor, "B dim"]:
        """What `forward` gives at raster index ``place``, all earlier indices having been stepped through."""
        return self.proj_drop(self.proj(cache.step(*self.heads_of_pixel(x, place, cache), place).flatten(1)))

    def heads_of_pixel(self, x: Float[Tensor, "B dim"], place: int, cache) -> list[Tensor]:
        """Queries, keys and values of the pixel at raster index ``place``, each (B, heads, d).

        Where they are turned, ``cache.grid`` tells its row and column.
        """
        grid = Grid(1, 1) if self.rotary is None else cache.grid
        return [t[:, :, 0] for t in self.heads_at(x[:, None], grid, place)]

    @property
    def steps(self) -> tuple["Mixer", ...]:
        """The mixers it is made of: itself, or the parts of a `Sequence`."""
        return (self,)

    @property
    def dropout(self) -> float:
        """The attention dropout in force now."""
        return self.attn_drop if self.training else 0.0

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, scale={self.scale:.4g}"


class PatternMixer(Mixer):
    """Softmax attention over what a `Pattern` allows.

    Args:
        pattern: who sees whom.
        Others: those of `Mixer`; ``num_heads`` must give each pattern of a `PerHead` at least one head.

    Raises:
        ValueError: fewer heads than patterns.

    Warns:
        BlindSpot: a causal pattern leaves part of the past unreached at any depth.
    """

    def __init__(self, pattern: Pattern, dim: int, num_heads: int | None = None, **mixer):
        check.positive_int("dim", dim)
        least = len(pattern.by_head())
        num_heads = heads_for(least, dim, mixer.get("key_dim")) if num_heads is None else num_heads
        super().__init__(dim, num_heads, **mixer)
        if self.num_heads < least:
            raise ValueError(f"num_heads={self.num_heads}: must be ≥ {least}, one head for each pattern")
        self.pattern = pattern
        warn_of_blind_spot(self)

    @property
    def causal(self):
        return self.pattern.causal

    def mix(self, q, k, v, grid):
        return attend(q, k, v, grid, self.pattern, scale=self.scale, dropout=self.dropout)

    def weights(self, q, k, grid):
        mask = self.pattern.head_masks(q.shape[1], grid, grid.prefix_of(q.shape[2]), q.device)
        return softmax_over(mask, q, k, self.scale)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.pattern.causal:
            return super().new_cache(batch, grid)
        factory = self.factory(device, dtype)
        return PatternCache(
            self.pattern, batch, self.num_heads, Grid.of(grid), self.head_dims, self.scale, full, **factory
        )


class Sequence(Mixer):
    """Mixers one after the other, each with its own projections. Its definition is their composition."""

    def __init__(self, *steps: Mixer):
        nn.Module.__init__(self)  # the projections are those of the steps
        self.dim = steps[0].dim
        self.chain = nn.ModuleList(steps)

    def forward(self, x: Float[Tensor, "B tokens dim"], grid: Grid) -> Float[Tensor, "B tokens dim"]:
        return reduce(lambda x, step: step(x, grid), self.chain, x)

    def attention(self, x: Float[Tensor, "B tokens dim"], grid: Grid) -> Float[Tensor, "B 1 tokens tokens"]:
        """Product of the steps' weights, heads averaged: what is reached through all steps."""
        reached = None
        for step in self.chain:
            seen = step.attention(x, grid).mean(dim=1, keepdim=True)
            reached = seen if reached is None else seen @ reached
            x = step(x, grid)
        return reached

    @property
    def steps(self) -> tuple[Mixer, ...]:
        return tuple(self.chain)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def heads_for(patterns: int, dim: int, key_dim: int | None = None) -> int | None:
    """At least one for each pattern, more where a head would be wider than 32 channels; None if no number divides."""
    if patterns > 1:
        key_dim = dim if key_dim is None else key_dim
        check.positive_int("key_dim", key_dim)
        return next((n for n in range(max(patterns, dim // 32), dim + 1) if dim % n == key_dim % n == 0), None)


def warn_of_blind_spot(mixer: Mixer, pattern: Pattern | None = None) -> None:
    """Warns if the pattern of a mixer (None: its own) is causal and leaves part of the past unreached at any depth."""
    pattern = mixer.pattern if pattern is None else pattern
    if pattern.causal and (missing := blind_spot([pattern])):
        name = type(mixer).__module__.rpartition(".")[2]
        warnings.warn(
            f"causal {name} alone leaves {missing} of 903 past pairs on a 6×7 grid unreached at any depth: "
            "other heads or layers must reach them",
            BlindSpot,
            stacklevel=5,
        )


def softmax_over(
    mask: Bool[Tensor, "*#images #heads tokens tokens"] | None,
    q: Float[Tensor, "B heads tokens dk"],
    k: Float[Tensor, "B heads tokens dk"],
    scale: float,
) -> Float[Tensor, "B heads tokens tokens"]:
    """softmax(scale · q kᵀ) over the keys that ``mask`` lets through: the plain N×N matrix.

    A token that sees nothing takes nothing.
    """
    scores = scale * torch.einsum("bnid,bnjd->bnij", q, k)
    if mask is None:
        return scores.softmax(dim=-1)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0)
