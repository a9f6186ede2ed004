"""Inducing points: a few learned points look at the whole image, think over what they saw, and pixels look at them.

Lee et al. 2019, Set Transformer, https://arxiv.org/abs/1810.00825
    ISAB(X) = MAB(X, MAB(I, X))    MAB(Q, K) = O + relu(W O)    O = Q + softmax(Q W_k Kᵀ d^-½) W_v K
Cost: 4 N points d
Computed: 1 ×
I are ``points`` learned points. MAB(I, X) is whole here: attention, the points themselves beside it, and a layer that
joins the heads; keys and values of the second attention are projections of what comes out. Of the second MAB, Q and
relu(W O) beside the attention are the residual and the MLP of the host. `attention` shows the product of both
attentions, heads averaged. The order of positions does not matter; prefix tokens are ordinary.
Deviations: a point has a query and a value of its own (the code: one projection of I is both). The scale is that of a
head's width (the code: of all heads together). Its LayerNorms, which are off unless asked for, are left out.
"""

import torch
from einops import rearrange
from torch import nn

from .. import check
from ..engines.union import flash
from ..grid import Grid
from ..mixer import Mixer
from ..precision import is_slow, outside_autocast


class Block(Mixer):
    """Inducing points.

    Args:
        points: number of inducing points.
        Others: those of `Mixer`, but ``attn_drop``: what points make of the image is no weight to drop.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "the points look at the whole image"
    not_rotary = "the points have no place, and are what queries and keys are compared with"
    undecayed = ("queries", "points")

    def __init__(
        self, dim, num_heads=None, *, points: int = 32, attn_drop: float = 0.0, device=None, dtype=None, **mixer
    ):
        check.positive_int("points", points)
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        dd = dict(device=device, dtype=dtype)
        self.queries = nn.Parameter(torch.empty(self.num_heads, points, self.key_dim // self.num_heads, **dd))
        self.points = nn.Parameter(torch.empty(points, dim, **dd))
        self.thought = nn.Linear(dim, dim, **dd)
        self.told = nn.Linear(dim, self.key_dim + dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the points' queries and values from N(0, 1). The linear layers reset themselves."""
        nn.init.normal_(self.queries)
        nn.init.normal_(self.points)

    @property
    def steps(self):
        return ()  # more than weights times values: see `reference`

    def forward(self, x, grid):
        q, k, v = self.heads(x, grid)
        queries = self.queries.to(q.dtype).expand(q.shape[0], -1, -1, -1)
        seen = self.points + rearrange(self.look(queries, k, v), "B n m d -> B m (n d)")
        seen = seen + self.thought(seen).relu()
        keys, values = (
            rearrange(t, "B m (n d) -> B n m d", n=self.num_heads)
            for t in self.told(seen).split([self.key_dim, self.dim], dim=-1)
        )
        return self.proj_drop(self.proj(rearrange(self.look(q, keys, values), "B n t d -> B t (n d)")))

    def look(self, q, k, v):
        """Attention, outside the range of float16 where that is slow anyway."""
        if is_slow(v):
            with outside_autocast(v):
                return flash(q.float(), k.float(), v.float(), scale=self.scale).half()
        return flash(q, k, v, scale=self.scale)

    def reference(self, x, grid):
        _, to_points, values = self.both(x, grid)
        outs = [weights @ value for weights, value in zip(to_points.unbind(dim=1), values)]
        return self.proj_drop(self.proj(torch.cat(outs, dim=-1)))

    def attention(self, x, grid):
        to_image, to_points, _ = self.both(x, grid)
        return to_points.mean(dim=1, keepdim=True) @ to_image.mean(dim=1, keepdim=True)

    def both(self, x, grid):
        """Weights of points on tokens and of tokens on points, and what each head of the points tells."""
        q, k, v = self.heads(x, Grid.of(grid))
        to_image = torch.einsum("nmd,bnjd->bnmj", self.queries.to(q.dtype), k) * self.scale
        to_image = to_image.softmax(dim=-1)
        told = []
        for point, own in enumerate(self.points):
            seen = torch.cat([to_image[:, head, point, None] @ v[:, head] for head in range(self.num_heads)], dim=-1)
            seen = own + seen[:, 0]
            told.append(self.told(seen + self.thought(seen).clamp(min=0)))
        keys, values = torch.stack(told, dim=1).split([self.key_dim, self.dim], dim=-1)  # (B, points, ·)
        scores = [q[:, head] @ key.mT for head, key in enumerate(keys.chunk(self.num_heads, dim=-1))]
        to_points = (torch.stack(scores, dim=1) * self.scale).softmax(dim=-1)
        return to_image, to_points, values.chunk(self.num_heads, dim=-1)

    def extra_repr(self):
        return f"{super().extra_repr()}, points={len(self.points)}"
