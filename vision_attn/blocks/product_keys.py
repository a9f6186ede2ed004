"""Product keys: each pixel reads a large memory of learned values, by the keys that are nearest to its query.

Lample et al. 2019, Large Memory Layers, https://arxiv.org/abs/1907.05242
    y_u = x_u + Σ_h Σ_{s ∈ I_h(u)} w_h(s) v_s      I_h(u) = the ``nearest`` slots s = (i, j) of the largest sums S_ij
    S_ij = q₁ · k_i + q₂ · k'_j      [q₁; q₂] = LayerNorm(W_h x_u)      w_h = softmax of S over I_h(u)
Cost: N heads (keys / 2 + nearest) d
Computed: 1 ×
There are keys² slots, of which each head looks at all by comparing its query with 2 keys half keys: the largest sums
are among those of the largest in each half, and of these the pair (a-th, b-th) can be left out where a b > ``nearest``.
That is exact. The values are shared by all heads; a query has d / 2 channels, at most 256.
A pixel looks at no other: what the layer buys is parameters, not a view of the image.
`Memory` alone, without x_u, takes the place of a ViT's MLP, which is where the paper has it, and trains about as fast:
``timm.create_model(name, mlp_layer=partial(Memory, keys=128))``. The paper trains the values by Adam at 10⁻³, above its
rate for the rest: what is seldom read learns little otherwise. `Memory.usage` tells what is.
Deviations: LayerNorm of the queries (the paper: BatchNorm, off in the code), which lets images be alone; 64² slots of
which 16 are read (the paper: 512² and 32).
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import check
from ..engines.selection import sums_of_rows
from ..gate import Gate
from ..leaf import Leaf
from ..precision import at_least_float32, outside_autocast
from ..traced import fixed


class Memory(Leaf):
    """Reads keys² learned values, position by position: what timm's slot ``mlp_layer`` of a ViT takes.

    Args:
        in_features: channels in and out.
        hidden_features, act_layer, norm_layer: of an MLP, given by hosts; a memory has no use for them.
        bias: of the projection to queries.
        drop: dropout on the output.
        keys: half keys of a head on each side; there are keys² slots.
        num_heads: queries of a position.
        nearest: slots that a query reads.
        key_dim: channels of a query, even. None: half of ``in_features``, from 2 to 256.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        act_layer: type[nn.Module] | None = None,
        norm_layer: type[nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
        *,
        keys: int = 64,
        num_heads: int = 4,
        nearest: int = 16,
        key_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check.positive_int("in_features", in_features)
        key_dim = max(2, min(in_features // 2, 256) // 2 * 2) if key_dim is None else key_dim
        for name, value in dict(keys=keys, num_heads=num_heads, nearest=nearest, key_dim=key_dim).items():
            check.positive_int(name, value)
        if nearest > keys**2:
            raise ValueError(f"nearest={nearest}: must be at most keys² = {keys**2}")
        if key_dim % 2:
            raise ValueError(f"key_dim={key_dim}: must be even, for the two halves of a query")
        check.boolean("bias", bias)
        check.rate("drop", drop)
        dd = dict(device=device, dtype=dtype)
        self.dim, self.side, self.num_heads, self.nearest = in_features, keys, num_heads, nearest
        self.query = nn.Linear(in_features, num_heads * key_dim, bias=bias, **dd)
        self.norm = nn.LayerNorm(key_dim, **dd)
        self.keys = nn.Parameter(torch.empty(num_heads, 2, keys, key_dim // 2, **dd))
        self.values = nn.Parameter(torch.empty(keys**2, in_features, **dd))
        self.drop = nn.Dropout(drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws half keys from U(±1), values from N(0, 1), each divided by the root of their channels."""
        bound = self.keys.shape[-1] ** -0.5
        nn.init.uniform_(self.keys, -bound, bound)
        nn.init.normal_(self.values, std=self.dim**-0.5)

    def forward(self, x: Float[Tensor, "*places dim"]) -> Float[Tensor, "*places dim"]:
        """What each place reads.

        Raises:
            ValueError: ``x`` has other than ``dim`` channels.
        """
        if fixed(x.shape[-1]) != self.dim:
            raise ValueError(f"x of shape {tuple(x.shape)}: must be (…, {self.dim})")
        weights, slots = (t.flatten(0, -3).flatten(1) for t in self.found(x))  # (places, heads · nearest)
        with outside_autocast(x):
            out = sums_of_rows(self.values.to(weights.dtype), slots, weights)
        return self.drop(out.reshape(x.shape).to(x.dtype))

    def found(
        self, x: Float[Tensor, "*places dim"]
    ) -> tuple[Float[Tensor, "*places heads nearest"], Int[Tensor, "*places heads nearest"]]:
        """Weights, in at least float32, and numbers i · keys + j of the slots that each place reads."""
        q, most = self.norm(self.query(x).unflatten(-1, (self.num_heads, -1))), min(self.nearest, self.side)
        keys = self.keys.to(wide := at_least_float32(x))
        with outside_autocast(x):
            halves = zip(q.to(wide).chunk(2, dim=-1), keys.unbind(1))
            best = [torch.einsum("...hc,hnc->...hn", half, key).topk(most, dim=-1) for half, key in halves]
        (a, i), (b, j) = best
        # the (m + 1)-th of one side goes with so many of the other: with more, `nearest` others are as large
        counts = [self.nearest // (m + 1) for m in range(most)]
        sums = torch.cat([a[..., m : m + 1] + b[..., :count] for m, count in enumerate(counts)], dim=-1)
        slots = torch.cat([i[..., m : m + 1] * self.side + j[..., :count] for m, count in enumerate(counts)], dim=-1)
        largest, at = sums.topk(self.nearest, dim=-1)
        return largest.softmax(dim=-1), slots.gather(-1, at)

    @torch.no_grad()
    def usage(self, x: Float[Tensor, "*places dim"]) -> Float[Tensor, "slots"]:
        """The share of all weights that each slot gets; 0: it is not read."""
        weights, slots = (t.flatten() for t in self.found(x))
        return weights.new_zeros(len(self.values)).index_add(0, slots, weights) / weights.sum()

    def extra_repr(self) -> str:
        return f"dim={self.dim}, keys={self.side}, num_heads={self.num_heads}, nearest={self.nearest}"


class Block(Gate):
    """Product-key memory.

    Args:
        dim: channels.
        keys: half keys of a head on each side; there are keys² slots.
        num_heads: queries of a pixel.
        nearest: slots that a query reads.
        key_dim: channels of a query, even. None: half of ``dim``, from 2 to 256.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "each pixel reads the memory alone, and looks at no other, earlier or later"

    def __init__(
        self,
        dim: int,
        *,
        keys: int = 64,
        num_heads: int = 4,
        nearest: int = 16,
        key_dim: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__(dim)
        options = dict(keys=keys, num_heads=num_heads, nearest=nearest, key_dim=key_dim)
        self.num_heads = num_heads
        self.memory = Memory(dim, **options, device=device, dtype=dtype)

    def gate(self, x):
        return x + rearrange(self.memory(rearrange(x, "B C H W -> B H W C")), "B H W C -> B C H W")

    def attention_map(self, x):
        """The largest weight of each pixel: near 1 where one slot is read, 1 / ``nearest`` where all alike are."""
        weights, _ = self.memory.found(rearrange(self.checked(x), "B C H W -> B H W C"))
        return weights.amax(dim=(-2, -1)).to(x.dtype)

    def reference(self, x):
        return torch.stack([self.reference_image(image) for image in x])

    def reference_image(self, image):
        """One image (C, H, W): all keys² sums of each head and pixel."""
        memory, pixels = self.memory, image.flatten(1).mT
        made = (pixels @ memory.query.weight.mT + memory.query.bias).chunk(self.num_heads, dim=1)
        out = pixels
        for q, (first, second) in zip(made, memory.keys):
            mean, variance = q.mean(dim=1, keepdim=True), q.var(dim=1, unbiased=False, keepdim=True)
            q = (q - mean) / (variance + memory.norm.eps).sqrt() * memory.norm.weight + memory.norm.bias
            one, other = q.chunk(2, dim=1)
            sums = (one @ first.mT)[:, :, None] + (other @ second.mT)[:, None, :]
            sums, slots = sums.flatten(1).topk(memory.nearest, dim=1)
            out = out + (sums.softmax(dim=1)[:, :, None] * memory.values[slots]).sum(dim=1)
        return out.mT.reshape(image.shape)
