"""Residual logits: layers of attention, each of which adds its scores to those of the layers before.

He et al. 2021, RealFormer; Ying et al. 2021, LazyFormer, https://arxiv.org/abs/2012.11747
    S_l = q_l k_lᵀ d^-½ + S_{l-1}      S_0 = 0      A_l = softmax S_l v_l      x_l = x_{l-1} + proj_l A_l
Cost: 2 layers N² d
Computed: 1.5 ×
A sum of products is one product of joined channels: layer l is one flash call on [q_1 … q_l] and [k_1 … k_l], and no
N×N matrix of scores is kept for the next.
``share="scores"`` is LazyFormer's way: only the first layer has queries and keys, and all layers its scores, S_l = S_1.
Each has values of its own. Weights that flash attention never makes cannot be kept: what is saved are projections and
channels to compare, 2 N² d of a layer in place of (l + 1) N² d.
With ``causal=True`` a position looks at itself and at what comes before it in raster order; prefix tokens come first
of all and see only one another.
Deviations: the paper's chain runs through all layers of a network, with the rest of each layer between them. A block
knows only its own: the chain is of the ``layers`` of one block, each with projections of its own, and between them is
a residual connection and nothing else. The output is the update x_L - x_0; adding the input is the host's. The
authors' code can divide S_l by l, for networks of 30 layers and more: left out. So is LazyFormer's wider first layer.

>>> from vision_attn import Grid
>>> print(Past().draw(Grid(3, 5), 1, 3))
#####
###@-
-----
"""

from functools import partial
from typing import Literal

import torch
from einops import rearrange

from .. import check
from ..engines.cache import PatternCache
from ..grid import Grid
from ..mixer import PatternMixer, Sequence
from ..pattern import All, Past


class Block(Sequence):
    """Attention layers with residual logits.

    Args:
        layers: number of attention layers.
        share: "sums": layers add their scores to those before them; "scores": they take those of the first.
        causal: only what comes before in raster order, and itself.
        Others: those of `Mixer`, for every layer; without ``qk_norm`` where layers share scores.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        layers: int = 2,
        share: Literal["sums", "scores"] = "sums",
        causal: bool = False,
        **mixer,
    ):
        check.positive_int("layers", layers)
        check.one_of("share", share, ("sums", "scores"))
        check.boolean("causal", causal)
        pattern, later = Past() if causal else All(), PatternMixer if share == "sums" else ValueLayer
        kinds = [PatternMixer] + [later] * (layers - 1)
        super().__init__(*(kind(pattern, dim, num_heads, **mixer) for kind in kinds))
        self.causal = causal

    def run(self, x, grid, mixes, place=None):
        """The update of all layers, and what each mixes: its joined queries and keys, and its values.

        Of one pixel, ``x`` is that at raster index ``place`` of the grid.
        """
        update, queries, keys, mixed = 0, [], [], []
        for layer, mix in zip(self.chain, mixes):
            q, k, v = layer.heads(x + update, grid) if place is None else layer.heads_at(x + update, grid, place)
            if "q" in layer.projects:
                queries.append(q)
                keys.append(k)
            mixed.append((torch.cat(queries, dim=-1), torch.cat(keys, dim=-1), v))
            out = rearrange(mix(*mixed[-1]), "B n t d -> B t (n d)")
            update = update + layer.proj_drop(layer.proj(out))
        return update, mixed

    def forward(self, x, grid):
        grid = Grid.of(grid)
        return self.run(x, grid, [partial(layer.mix, grid=grid) for layer in self.chain])[0]

    def attention(self, x, grid):
        """What is reached through all layers: a mean over the ways through one or more of them, heads averaged.

        With values and projections of identity the update is 2^layers - 1 times this. Of a single layer: its weights.
        """
        grid = Grid.of(grid)
        _, mixed = self.run(x, grid, [partial(layer.mix, grid=grid) for layer in self.chain])
        seen = [layer.weights(q, k, grid) for layer, (q, k, _) in zip(self.chain, mixed)]
        if len(seen) == 1:
            return seen[0]
        reached = own = torch.eye(x.shape[1], dtype=seen[0].dtype, device=x.device)
        for weights in seen:
            reached = reached + weights.mean(dim=1, keepdim=True) @ reached
        return (reached - own) / (2 ** len(seen) - 1)

    def reference(self, x, grid):
        """The whole block by its definition: matrices of scores, added up from layer to layer."""
        grid, update, scores = Grid.of(grid), 0, 0
        for layer in self.chain:
            q, k, v = layer.heads(x + update, grid)
            scores = scores + layer.scale * q @ k.mT  # 0 of a layer that has no queries
            seen = layer.pattern.head_masks(1, grid, grid.prefix_of(x.shape[1]), x.device)
            weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
            update = update + layer.proj_drop(layer.proj((weights @ v).transpose(1, 2).flatten(2)))
        return update

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            raise ValueError("causal=False: pixel by pixel only a causal block can go on")
        return JoinedPast(self.chain, batch, Grid.of(grid), full, device, dtype)

    def step(self, x, place, cache):
        mixes = [partial(past.mix, place=place) for past in cache.layers]
        return self.run(x[:, None], cache.layers[0].grid, mixes, place)[0][:, 0]


class ValueLayer(PatternMixer):
    """A layer that makes no queries and keys, and attends by those of another, which may have turned them."""

    projects = "v"

    def __init__(self, *args, rotary=None, **mixer):
        super().__init__(*args, **mixer)


class LayerPast(PatternCache):
    """The past of one layer."""

    def mix(self, q, k, v, place):
        """`step`, of sequences of one token."""
        return self.step(q[:, :, 0], k[:, :, 0], v[:, :, 0], place)[:, :, None]


class JoinedPast:
    """Joined keys, and values, of each layer.

    Args:
        chain: the layers.
        batch: number of images.
        grid: of the image that is made.
        full: as of `PatternCache`.
    """

    def __init__(self, chain, batch: int, grid: Grid, full: bool, device=None, dtype=None):
        self.layers, keys = [], 0
        for layer in chain:
            (key, value), factory = layer.head_dims, layer.factory(device, dtype)
            keys += key * ("k" in layer.projects)
            dims = keys, value
            self.layers.append(
                LayerPast(layer.pattern, batch, layer.num_heads, grid, dims, layer.scale, full, **factory)
            )

    @property
    def nbytes(self) -> int:
        """Memory of what is kept, in bytes."""
        return sum(past.nbytes for past in self.layers)
