"""The permutohedral lattice: a Gaussian mean over points of d features, at a cost that grows with points, not pairs.

The lattice are the integer points of d + 1 coordinates, all alike modulo d + 1, that sum to 0. A point of features lies
in a simplex of d + 1 of them. Values are given to these (splat), spread along the d + 1 axes of the lattice (blur) and
read again (slice). A vertex is known by its key, the sum of its coordinates times odd numbers modulo 2⁶⁴: a neighbour's
key is a constant away, and there is no range to leave. That any two of T vertices meet has a chance of T² / 2⁶⁵.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..traced import fixed, is_passing, is_traced

LIMIT = 1e5  # of features: beyond, neighbours in float32 are further apart than vertices


def filtered(f: Float[Tensor, "b N d"], v: Float[Tensor, "b N c"]) -> Float[Tensor, "b N c"]:
    """S B_d … B_0 Sᵀ v of each of b images: splat, blur, slice. In the type of ``v``, which is to be float32 or wider.

    Where numbers are known the table holds the vertices there are, and only its size waits for the device; in graphs,
    and under torch.func, it has room for N (d + 1).
    """
    weights, keys, steps = simplex(f)
    values = v.flatten(0, 1)
    if not is_traced() and f.numel() == 0:
        return v * f.sum()  # nothing
    if is_passing(f.device) or f.is_meta:
        out = _of_any_size(values, weights, keys, steps)
    else:
        out = Filter.apply(values, weights.t().contiguous(), *_vertices(keys, steps))
    return out.reshape(v.shape)


def simplex(
    f: Float[Tensor, "b N d"],
) -> tuple[Float[Tensor, "vertices bN"], Int[Tensor, "vertices bN"], list[int]]:
    """Barycentric weights and keys of the d + 1 vertices around each point, and the key of a step along each axis."""
    b, n, d = f.shape[0], f.shape[1], fixed(f.shape[2])
    u = embedding(f)
    with torch.no_grad():
        near = (u / (d + 1)).round()  # of a point whose coordinates are 0 modulo d + 1, but need not sum to 0
        rest = u - near * (d + 1)
        rank = [torch.zeros_like(rest[0], dtype=torch.long) for _ in range(d + 1)]  # 0: of the largest
        for i in range(d + 1):
            for j in range(i):
                later = (rest[i] > rest[j]).to(torch.long)
                rank[i], rank[j] = rank[i] + (1 - later), rank[j] + later
        near = near.to(torch.long)
        rank = torch.stack(rank) + _total(near)
        around = (rank > d).to(torch.long) - (rank < 0).to(torch.long)  # those that move, to make the sum 0
        rank, near = rank - (d + 1) * around, near - around
    y = u / (d + 1) - near.to(u.dtype)
    y = torch.zeros_like(y).scatter(0, rank, y)  # the largest first
    weights = torch.cat([1 - (y[:1] - y[-1:]), (y[:-1] - y[1:]).flip(0)])
    with torch.no_grad():
        odd = [multiplier(i) for i in range(d)]  # the last coordinate follows from the others
        image = torch.arange(b, device=f.device)[:, None].expand(b, n).reshape(-1)
        key = image * multiplier(d)  # one more coordinate: tables of images and heads are apart
        for i in range(d):
            key = key + near[i] * signed(odd[i] * (d + 1))
        keys = [key]
        for r in range(d, 0, -1):  # from vertex to vertex all coordinates grow by 1, but that of rank r falls by d
            back = sum((rank[i] == r).to(torch.long) * signed(odd[i] * (d + 1)) for i in range(d))
            keys.append(keys[-1] + signed(sum(odd)) - back)
    steps = [signed((d + 1) * (odd[j] if j < d else 0) - sum(odd)) for j in range(d + 1)]
    return weights, torch.stack(keys), steps


def embedding(f: Float[Tensor, "b N d"]) -> Float[Tensor, "coordinates bN"]:
    """Points of the plane of sum 0, scaled so that splat, blur and slice together have a deviation of 1 feature."""
    d = fixed(f.shape[-1])
    scale = math.sqrt(2 / 3) * (d + 1)
    f = f.clamp(-LIMIT, LIMIT).nan_to_num(0.0)  # what is no number would be nowhere, ranks out of range
    f = [f[..., i].flatten() * (scale / math.sqrt((i + 1) * (i + 2))) for i in range(d)]
    after = 0.0
    u = []
    for i in range(d, 0, -1):  # coordinate i: -i of its own feature, and all the later ones
        u.append(after - i * f[i - 1])
        after = after + f[i - 1]
    return torch.stack([after, *u[::-1]])


def _total(x: Int[Tensor, "coordinates bN"]) -> Int[Tensor, "bN"]:
    """Their sum, one after the other: onnxruntime adds up integers of 64 bits as floats."""
    total = x[0]
    for i in range(1, x.shape[0]):
        total = total + x[i]
    return total


def multiplier(i: int) -> int:
    """The i-th of some odd numbers that look random, as a signed integer of 64 bits."""
    z = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of SplitMix64
        z = (z ^ z >> shift) * factor % 2**64
    return signed(z ^ z >> 31 | 1)


def signed(x: int) -> int:
    """x modulo 2⁶⁴, between -2⁶³ and 2⁶³."""
    return (x + 2**63) % 2**64 - 2**63


# Where numbers are known


def _vertices(keys, steps):
    """What `Filter` needs to know of M vertices; the row behind them is nobody's, and 0."""
    points = keys.shape[1]
    keys, order = keys.flatten().sort(stable=True)  # sums are taken in this order
    new = torch.cat([torch.ones_like(keys[:1], dtype=torch.bool), keys[1:] != keys[:-1]])
    slot = torch.empty_like(order).scatter(0, order, new.cumsum(0) - 1)
    first = new.nonzero()[:, 0]
    keys, count, own = keys[first], len(first), torch.arange(len(first) + 1, device=keys.device)
    beside = []
    for step in steps:
        wanted = keys + step
        at = torch.searchsorted(keys, wanted).clamp(max=count - 1)
        up = F.pad(torch.where(keys[at] == wanted, at, count), (0, 1), value=count)
        down = torch.full_like(own, count).scatter(0, up, own)
        down[count] = count  # where those have come that have none above
        beside.append(torch.stack([own, up, down], dim=1))
    ends = torch.cat([first, torch.full_like(first[:1], len(order))])
    return slot.reshape(-1, points).t().contiguous(), order, order % points, ends, torch.stack(beside)


class Filter(torch.autograd.Function):
    """Splat, blur, slice, each a weighted sum of rows; keeps values, weights and the blurred table."""

    @staticmethod
    def forward(ctx, v, weights, slots, order, token, ends, beside):
        table = _blurred(_splat(v, weights, order, token, ends), beside)
        ctx.save_for_backward(v, weights, table, slots, order, token, ends, beside)
        return _slice(table, weights, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        v, weights, table, slots, order, token, ends, beside = ctx.saved_tensors
        slope = slope.contiguous()
        back = _blurred(_splat(slope, weights, order, token, ends), beside.flip(0))
        with torch.enable_grad():  # torch has the dot products of rows, as the gradient of a sum's weights
            weights = weights.detach().requires_grad_()
            of_v, again = _slice(back, weights, slots), _slice(table, weights, slots)
            (of_weights,) = torch.autograd.grad([of_v, again], weights, [v, slope])
        return of_v.detach(), of_weights, None, None, None, None, None


def _splat(v, weights, order, token, ends):
    return F.embedding_bag(token, v, ends, per_sample_weights=weights.t().reshape(-1)[order], mode="sum")


def _blurred(table, beside):
    some = table.new_tensor([1, 0.5, 0.5]).expand(len(table), 3).contiguous()
    for rows in beside:
        table = F.embedding_bag(rows, table, per_sample_weights=some, mode="sum")
    return table


def _slice(table, weights, slots):
    return F.embedding_bag(slots, table, per_sample_weights=weights, mode="sum")


# In graphs


def _of_any_size(v, weights, keys, steps):
    """The same by a table of as many rows as there could be vertices, and one that is nobody's."""
    vertices, points = fixed(keys.shape[0]), keys.shape[1]
    with torch.no_grad():
        keys, order = keys.flatten().sort()
        new = torch.cat([torch.ones_like(keys[:1]), (keys[1:] != keys[:-1]).to(torch.long)])
        number = new.cumsum(0) - 1
        slots = torch.zeros_like(order).scatter(0, order, number)
        own = torch.ones_like(keys).cumsum(0) - 1
        count, nobody = number[-1:] + 1, own[-1:] + 1
        keys = torch.zeros_like(keys).scatter(0, number, keys)
        there = own < count
        beside = []
        for step in steps:
            up = torch.where(there, _places(keys, keys + step, there, own), nobody)
            up = torch.cat([up, nobody])
            down = (up * 0 + nobody).scatter(0, up, torch.cat([own, nobody]))
            beside += [(up, torch.where(torch.cat([own, nobody]) < nobody, down, nobody))]
    each = (v * weights[..., None]).flatten(0, 1)
    if torch.jit.is_tracing():  # ONNX before opset 16 scatters without summing, and does not say so
        first = torch.zeros_like(torch.cat([own, nobody])).scatter(0, torch.where(new > 0, number, nobody), own)
        table = _sums_of_runs(each[order], number)[first] * F.pad(there.to(v.dtype), (0, 1))[:, None]
    else:
        rows = slots[:, None].expand(-1, fixed(v.shape[1]))
        table = torch.zeros_like(torch.cat([each, v[:1]])).scatter_add(0, rows, each)
    for up, down in beside:
        table = table + 0.5 * (table[up] + table[down])
        table = table * F.pad(there.to(v.dtype), (0, 1))[:, None]
    out = table[slots].reshape(vertices, points, fixed(v.shape[1]))
    return (out * weights[..., None]).sum(dim=0)


def _sums_of_runs(x, number):
    """At the first of neighbours with the same number, the sum of all of them; runs of at most 2²⁰, a pixel each."""
    for step in (2**i for i in range(20)):
        further, same = (F.pad(t, (*(0, 0) * (t.ndim - 1), 0, step), value=-1)[step:] for t in (x, number))
        x = x + further.masked_fill((same != number)[:, None], 0)
    return x


def _places(keys, wanted, there, own):
    """Where in ``keys``, sorted as far as they are ``there``, each of those ``wanted`` is; else the last place and one.

    By one sort of both, for what searches sorted numbers has no counterpart in ONNX: keys become even, what is wanted
    odd, once halved three times to make room; so many keys as come before it, less one, is the place of the last.
    """
    last = torch.full_like(keys[:1], 2**60)  # behind all that is there
    short, want = (torch.where(there, torch.div(t, 8, rounding_mode="floor"), last) for t in (keys, wanted))
    both, order = torch.cat([2 * short, 2 * want + 1]).sort()
    nobody = own[-1:] + 1
    before = ((order < nobody).to(torch.long).cumsum(0) - 1).clamp(min=0)
    place = torch.cat([own, own]).scatter(0, order, before)[keys.shape[0] :]
    return torch.where(keys[place] == wanted, place, nobody)
