"""Global memory: a few learned tokens read the whole image, and each pixel looks at them and at its own chunk.

Gupta & Berant 2020, GMAT, https://arxiv.org/abs/2006.03274
    G_m = softmax over all tokens j of μ_m · k_j d^-½
    A_u = softmax over {v : v in the chunk of u} ∪ {memory m} of q_u · (k_v or κ_m + G_m k) d^-½
Cost: 2 N c² d + 5 N memory d
Computed: 1 ×
``memory`` tokens m with a learned query μ and a learned part κ of their key; chunks are c × c pixels, c = ``chunk``.
What a pixel takes from a memory token is what that one has read, so every pixel reaches every other.
Deviations: in the paper the memory goes along from layer to layer as tokens of their own, and is read one layer after
it is written; a block knows one layer, so it writes first and is read then, and the memory starts anew in each. It
reads the image alone (the paper: itself as well). Chunks
of a line of text become squares. No code was published.

>>> from vision_attn import Grid
>>> print(Block(32, chunk=(2, 3)).chunk.draw(Grid(5, 7), 2, 4))
-------
-------
---#@#-
---###-
-------
"""

import torch
from torch import nn

from .. import check
from ..engines.union import attend, flash
from ..mixer import Mixer
from ..pattern import Tile


class Block(Mixer):
    """Global memory with local chunks.

    Args:
        memory: number of memory tokens.
        chunk: pixels of a chunk, an integer or (height, width).
        Others: those of `Mixer`, but ``attn_drop``: what memory has read is no weight to drop.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "the memory reads the whole image"
    not_rotary = "memory has no place, and asks for keys as they are"
    undecayed = ("memory",)

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        memory: int = 16,
        chunk: int | tuple[int, int] = 8,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.positive_int("memory", memory)
        chunk = check.pair("chunk", chunk)
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        size = (2, self.num_heads, memory, self.key_dim // self.num_heads)
        self.chunk, self.memory = Tile(chunk), nn.Parameter(torch.empty(size, device=device, dtype=dtype))  # μ, κ
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the memory's queries and keys from N(0, 1)."""
        nn.init.normal_(self.memory)

    def mix(self, q, k, v, grid):
        queries, keys = (t.to(q.dtype).expand(q.shape[0], -1, -1, -1) for t in self.memory.unbind())
        known = flash(queries, k, torch.cat([k, v], dim=-1), scale=self.scale)
        read_keys, read_values = known.split([k.shape[-1], v.shape[-1]], dim=-1)
        # memory goes before the prefix tokens, which all see
        k, v = torch.cat([keys + read_keys, k], dim=2), torch.cat([read_values, v], dim=2)
        return attend(q, k, v, grid, self.chunk, scale=self.scale)

    def weights(self, q, k, grid):
        queries, keys = self.memory.to(q.dtype)
        reads = (torch.einsum("nmd,bnjd->bnmj", queries, k) * self.scale).softmax(dim=-1)
        to_memory = torch.einsum("bnid,bnmd->bnim", q, keys + reads @ k)
        to_tokens = torch.einsum("bnid,bnjd->bnij", q, k)
        to_tokens = to_tokens.masked_fill(~self.chunk.mask(grid, grid.prefix_of(q.shape[2]), q.device), -torch.inf)
        weights = (torch.cat([to_memory, to_tokens], dim=-1) * self.scale).softmax(dim=-1)
        to_memory, to_tokens = weights.split([queries.shape[1], q.shape[2]], dim=-1)
        return to_tokens + to_memory @ reads
