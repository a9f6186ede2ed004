"""Global-local attention: each window has a global token; pixels look at what is near and at all global tokens.

Ainslie et al. 2020, ETC, https://arxiv.org/abs/2004.08483
    G_w = softmax over global tokens w' and tokens j of (γ_w U₁ γ_w' + a_{w'-w}, γ_w U₂ k_j + b_{w(j)-w}) d^-½
    A_u = softmax over pixels v near u and global tokens w of (q_u k_v + c_{v-u}, q_u U₃ (G k)_w + e_{w-w(u)}) d^-½
Cost: 2 N (k² + 4 windows²) d
Computed: 1.6 ×
The four pieces are the paper's: global to global, global to local, local to global, and local to local within a
window of k × k pixels around each. Each has a bilinear form of its own (U; the identity for local to local) and a
learned number a head for each relative position, here in two dimensions: of pixels, or of windows. A block has no
global tokens of its own to keep, so they are made anew: the image is cut into G = ``windows`` × ``windows`` parts,
whatever its size, and token w starts as the mean γ of its window's queries, keys and values, then reads, and is read.
Deviations: those; ETC's labels are vectors that meet the query, here they are added to its scores; values have one
projection for all pieces, and U acts within a head, so that the output stays weights @ v. Prefix tokens look at all
tokens and all look at them, without labels. ETC's pretraining is not here.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn

from .. import check
from ..engines.route import is_small, note, takes_dense
from ..engines.union import flash
from ..grid import Grid
from ..kept import kept
from ..key_set import Neighbours, rows_and_columns
from ..mixer import Mixer
from ..precision import at_least_float32, outside_autocast

LARGEST_DENSE = 14  # pixels a side, up to which all are scored: tiles with their rims hold as many


class Block(Mixer):
    """Global-local attention.

    Args:
        windows: number of windows with a global token, an integer or (down, right).
        kernel_size: pixels that a pixel sees around it, one odd integer or (height, width).
        Others: those of `Mixer`, but ``attn_drop``: what global tokens have read is no weight to drop.

    Raises:
        ValueError: an argument is out of range.
    """

    not_causal = "the global tokens read the whole image"
    not_rotary = "windows' queries and keys are averaged over pixels at many places"
    undecayed = ("forms", "of_windows", "of_pixels")

    def __init__(
        self,
        dim,
        num_heads=None,
        *,
        windows: int | tuple[int, int] = 4,
        kernel_size: int | tuple[int, int] = 7,
        attn_drop: float = 0.0,
        device=None,
        dtype=None,
        **mixer,
    ):
        windows = check.pair("windows", windows)
        radius = tuple(size // 2 for size in check.odd_pair("kernel_size", kernel_size))
        check.no_attn_drop(attn_drop)
        super().__init__(dim, num_heads, device=device, dtype=dtype, **mixer)
        dd, heads, d = dict(device=device, dtype=dtype), self.num_heads, self.key_dim // self.num_heads
        self.windows, self.near = windows, Neighbours(radius)
        self.forms = nn.Parameter(torch.empty(3, heads, d, d, **dd))  # global to global, to local, local to global
        self.of_windows = nn.Parameter(torch.empty(3, heads, *(2 * n - 1 for n in windows), **dd))
        self.of_pixels = nn.Parameter(torch.empty(heads, *(2 * r + 1 for r in radius), **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forms: the identity. Labels: N(0, 0.02²)."""
        with torch.no_grad():
            self.forms.copy_(torch.eye(self.forms.shape[-1]))
        nn.init.normal_(self.of_windows, std=0.02)
        nn.init.normal_(self.of_pixels, std=0.02)

    def mix(self, q, k, v, grid):
        wide = at_least_float32(v)
        with outside_autocast(v):
            return self.read_and_look(q.to(wide), k.to(wide), v.to(wide), grid).to(v.dtype)

    def read_and_look(self, q, k, v, grid):
        """What pixels take once the global tokens have read."""
        prefix, wide, near = grid.prefix_of(q.shape[2]), v.dtype, self.near.ready(grid, v.device)
        forms, of_windows = self.forms.to(wide), self.of_windows.to(wide)
        owner, size = self.owners(grid, q.device)
        share = F.one_hot(owner, size.shape[0]).to(wide).transpose(-2, -1) / size.clamp(min=1)[:, None]  # (G, N)
        known = torch.cat([k, v], dim=-1)
        # global tokens read
        means_q, means = share @ q[:, :, prefix:], share @ known[:, :, prefix:]
        down, right = self.offsets(q.device)
        labels = [of[:, down, right] for of in of_windows.unbind()]  # (heads, G, G), from row to column
        empty = torch.zeros_like(size, dtype=wide).masked_fill(size == 0, torch.finfo(wide).min)
        to_global = means_q @ forms[0] @ means[..., : k.shape[-1]].transpose(-2, -1) + labels[0]
        to_local = means_q @ forms[1] @ k.transpose(-2, -1) + F.pad(labels[1].index_select(2, owner), (prefix, 0))
        scores = torch.cat([to_global * self.scale + empty, to_local * self.scale], dim=-1)
        to_global, to_local = scores.softmax(dim=-1).split([size.shape[0], q.shape[2]], dim=-1)
        read = to_global @ means + to_local @ known
        read_k, read_v = read.split([k.shape[-1], v.shape[-1]], dim=-1)
        # pixels look
        pixels = q[:, :, prefix:]
        to_global = pixels @ forms[2] @ read_k.transpose(-2, -1) + labels[2].index_select(1, owner)
        scores = [to_global * self.scale + empty, self.scale * (pixels @ k[:, :, :prefix].transpose(-2, -1))]
        k_pixels, v_pixels, dense = (
            k[:, :, prefix:],
            v[:, :, prefix:],
            takes_dense(is_small(grid, q.device, LARGEST_DENSE)),
        )
        if dense:
            note("dense")
            scores.append(self.scores_of_all(pixels, k_pixels, grid))
        else:
            scores.append(self.near_scores(near, pixels, k_pixels, grid))
        sizes = [score.shape[-1] for score in scores]
        to_global, to_prefix, to_near = torch.cat(scores, dim=-1).softmax(dim=-1).split(sizes, dim=-1)
        out = to_global @ read_v + to_prefix @ v[:, :, :prefix]
        out = out + (to_near @ v_pixels if dense else self.near_values(near, to_near, v_pixels, grid))
        first = flash(q[:, :, :prefix], k, v, scale=self.scale)
        return torch.cat([first, out], dim=2)

    def owners(self, grid, device):
        """The window of each pixel (N,), and the number of pixels of each window (G,)."""
        (down, right), (height, width) = self.windows, grid
        y, x = torch.arange(height, device=device) * down // height, torch.arange(width, device=device) * right // width
        rows, columns = (
            (torch.arange(n, device=device)[:, None] == at).sum(dim=1) for n, at in ((down, y), (right, x))
        )
        return (y[:, None] * right + x).flatten(), (rows[:, None] * columns).flatten()

    def offsets(self, device):
        """Where in a table of labels the offset from window to window is, (G, G) down and right."""
        (down, right), window = self.windows, torch.arange(self.windows[0] * self.windows[1], device=device)
        y, x = window // right, window % right
        return y[None] - y[:, None] + down - 1, x[None] - x[:, None] + right - 1

    def scores_of_all(self, q, k, grid):
        """Scores of all pixels, those that are not near hidden, (B, heads, N, N)."""
        (which,) = kept(labels_of_all, self.near.radius, grid, device=q.device)
        table = F.pad(self.scale * self.of_pixels.to(q.dtype).flatten(1), (0, 1), value=torch.finfo(q.dtype).min / 2)
        labels = table.index_select(1, which.flatten()).unflatten(1, which.shape)
        return self.scale * q @ k.transpose(-2, -1) + labels

    def near_scores(self, near, q, k, grid):
        """Scores of the pixels near each, in the order of its tile's keys, (B, heads, N, keys)."""
        queries, keys = near.queries(grid.maps(q)), near.keys(grid.maps(k))
        scores = rearrange(queries @ keys.transpose(-2, -1), "(B n) t q k -> B n t q k", n=self.num_heads)
        scores = scores + self.pixel_labels(q)[:, None]
        seen = near.mask(grid, q.device)
        scores = (scores * self.scale).masked_fill(~seen, torch.finfo(q.dtype).min)
        return rearrange(near.place(scores.flatten(0, 1), grid), "(B n) H W k -> B n (H W) k", n=self.num_heads)

    def pixel_labels(self, q):
        """Labels of each query of a tile and each key of the tile and its rim, (heads, queries, keys)."""
        at = []
        for radius, tile in zip(self.near.radius, self.near.tile(q.device)):
            offset = (
                torch.arange(-radius, tile + radius, device=q.device) - torch.arange(tile, device=q.device)[:, None]
            )
            at.append(offset.clamp(-radius, radius) + radius)  # what is farther is masked
        table = self.of_pixels.to(q.dtype)[:, at[0][:, None, :, None], at[1][None, :, None, :]]
        return table.flatten(3).flatten(1, 2)

    def near_values(self, near, weights, v, grid):
        out = near.queries(grid.maps(weights)) @ near.keys(grid.maps(v))
        return rearrange(near.place(out, grid), "(B n) H W d -> B n (H W) d", n=self.num_heads)

    def weights(self, q, k, grid):
        prefix, (height, width), (down, right) = grid.prefix_of(q.shape[2]), grid, self.windows
        y, x = (c.flatten() for c in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        window = torch.div(y * down, height, rounding_mode="floor") * right + torch.div(
            x * right, width, rounding_mode="floor"
        )
        used = window.unique()  # windows with pixels; smaller images have fewer
        member = (used[:, None] == window).to(q)
        share = torch.cat([member.new_zeros(len(used), prefix), member / member.sum(dim=1, keepdim=True)], dim=1)

        def label(number, of, to):
            rows, columns = to // right - of[:, None] // right, to % right - of[:, None] % right
            return self.of_windows[number].to(q.dtype)[:, rows + down - 1, columns + right - 1]

        form = self.forms.to(q.dtype)
        asks = share @ q
        among = torch.einsum("bnid,nde,bnje->bnij", asks, form[0], share @ k) + label(0, used, used)
        below = torch.einsum("bnid,nde,bnje->bnij", asks, form[1], k)
        below = below + F.pad(label(1, used, window), (prefix, 0))
        reads = (torch.cat([among, below], dim=-1) * self.scale).softmax(dim=-1)
        reads = reads[..., : len(used)] @ share + reads[..., len(used) :]  # (B, heads, windows, tokens)

        pixels, (radius_y, radius_x) = q[:, :, prefix:], self.near.radius
        above = torch.einsum("bnid,nde,bnje->bnij", pixels, form[2], reads @ k) + label(2, window, used)
        dy, dx = y - y[:, None], x - x[:, None]
        near = (dy.abs() <= radius_y) & (dx.abs() <= radius_x)
        labels = self.of_pixels.to(q.dtype)[
            :, dy.clamp(-radius_y, radius_y) + radius_y, dx.clamp(-radius_x, radius_x) + radius_x
        ]
        beside = torch.einsum("bnid,bnjd->bnij", pixels, k[:, :, prefix:]) + labels
        scores = [above, pixels @ k[:, :, :prefix].mT, beside.masked_fill(~near.to(q.device), -torch.inf)]
        weights = (torch.cat(scores, dim=-1) * self.scale).softmax(dim=-1)
        rest = weights[..., : len(used)] @ reads + torch.cat(
            [weights[..., len(used) : len(used) + prefix], weights[..., len(used) + prefix :]], dim=-1
        )
        first = (q[:, :, :prefix] @ k.mT * self.scale).softmax(dim=-1)
        return torch.cat([first, rest], dim=2)


def labels_of_all(radius: tuple[int, int], grid: Grid, device) -> tuple[Int[Tensor, "N N"]]:
    """Where in a flat table of labels that of each pixel for each is; behind its end where it is not near."""
    y, x = rows_and_columns(torch.arange(grid.size, device=device), grid.width)
    (down, right), (rows, columns) = (c - c[:, None] for c in (y, x)), (2 * r + 1 for r in radius)
    near = (down.abs() <= radius[0]) & (right.abs() <= radius[1])
    return (torch.where(near, (down + radius[0]) * columns + right + radius[1], rows * columns),)
