"""Talking heads: scores are mixed over the heads before the softmax, and weights after it.

Shazeer et al. 2020, Talking-Heads Attention, https://arxiv.org/abs/2003.02436
    J_h = q_h k_hᵀ d^-½      L_l = Σ_h P_l[h, l] J_h      W_l = softmax L_l
    U_h = Σ_l P_w[l, h] W_l      o_h = U_h v_h
Cost: 2 N² d + 2 N² heads²
Computed: 1 ×
P_l and P_w (heads × heads) are learned and start as the identity: dense attention, until trained. U may be negative
and its rows need not sum to 1. With ``mixing_bias=True`` every U_h has a learned number b_w[h] more, for each pair that
is seen: CaiT's bias of the second mixture. A bias of the first would be a constant to the softmax, which sees none.
The softmax of one head needs the scores of all, so that no flash kernel of single heads computes it: rows are taken in
chunks, and computed anew in the backward. A compiled or exported graph, whose sizes are free, holds the N×N matrix.
With ``causal=True`` a position looks at itself and at what comes before it in raster order; prefix tokens come first
of all and see only one another. What is not seen is masked between P_l and the softmax.
Deviations: the heads of q and k, of the softmax and of v are as many (the paper: three numbers that may differ).
``attn_drop`` acts on U, as in CaiT.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .. import check
from ..engines import by_rows
from ..grid import Grid
from ..mixer import Mixer
from ..pattern import Past


class Block(Mixer):
    """Talking-heads attention.

    Args:
        causal: only what comes before in raster order, and itself.
        mixing_bias: whether the second mixture has a bias for each head.
        Others: those of `Mixer`.

    Raises:
        ValueError: an argument is out of range.
    """

    averages = False  # P_w may do anything

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        causal: bool = False,
        mixing_bias: bool = False,
        device=None,
        dtype=None,
        **mixer,
    ):
        check.boolean("causal", causal)
        check.boolean("mixing_bias", mixing_bias)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        self.causal = causal
        self.p_l = nn.Parameter(torch.empty(self.num_heads, self.num_heads, device=device, dtype=dtype))
        self.p_w = nn.Parameter(torch.empty(self.num_heads, self.num_heads, device=device, dtype=dtype))
        self.b_w = nn.Parameter(torch.empty(self.num_heads, device=device, dtype=dtype)) if mixing_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets both mixtures to the identity, without a bias."""
        nn.init.eye_(self.p_l)
        nn.init.eye_(self.p_w)
        if self.b_w is not None:
            nn.init.zeros_(self.b_w)

    def talk(self, prefix):
        """The function from scores of some rows to their weights."""
        p_l, p_w, b_w, causal, dropout = self.p_l, self.p_w, self.b_w, self.causal, self.dropout

        def weights_of(scores, rows):
            mixed = torch.einsum("bhij,hl->blij", scores, p_l.to(scores.dtype))
            if causal:
                columns = torch.arange(scores.shape[3], device=scores.device)
                row, column = ((t - prefix).clamp(min=-1) for t in (rows, columns))  # all prefix tokens are at -1
                unseen = column > row[:, None]
                mixed = mixed.masked_fill(unseen, -torch.inf)
            weights = torch.einsum("blij,lh->bhij", mixed.softmax(dim=-1), p_w.to(scores.dtype))
            if b_w is not None:
                weights = weights + b_w.to(scores.dtype)[:, None, None]
                weights = weights.masked_fill(unseen, 0) if causal else weights
            return F.dropout(weights, dropout)

        return weights_of

    def mix(self, q, k, v, grid):
        return by_rows.attend(q, k, v, self.talk(grid.prefix_of(q.shape[2])), scale=self.scale)

    def weights(self, q, k, grid):
        heads, unseen = range(self.num_heads), None
        if self.causal:
            unseen = ~Past().mask(grid, grid.prefix_of(q.shape[2]), q.device)
        scores = [self.scale * q[:, h] @ k[:, h].mT for h in heads]
        mixed = [sum(self.p_l[h, l] * scores[h] for h in heads) for l in heads]
        shares = [(m if unseen is None else m.masked_fill(unseen, -torch.inf)).softmax(dim=-1) for m in mixed]
        bias = torch.zeros_like(self.p_w[0]) if self.b_w is None else self.b_w
        seen = 1 if unseen is None else ~unseen
        return torch.stack([sum(self.p_w[l, h] * shares[l] for l in heads) + bias[h] * seen for h in heads], dim=1)

    def new_cache(self, batch, grid, *, full=False, device=None, dtype=None):
        if not self.causal:
            return super().new_cache(batch, grid)
        factory = self.factory(device, dtype)
        return by_rows.RowPast(
            self.talk(0), self.scale, batch, self.num_heads, Grid.of(grid), self.head_dims, **factory
        )
