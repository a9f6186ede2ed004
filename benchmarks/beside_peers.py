"""Time and memory of blocks beside other packages' layers of the same mechanism, each pair in turn, all in one run.

    python benchmarks/beside_peers.py
    python benchmarks/beside_peers.py --blocks '[cbam, window]' --packages '[timm]' --sizes '[[56, 56, 2]]'
    python benchmarks/beside_peers.py --resume results/FILE.csv

timm and torchvision are there; of the other packages any, all or none may be installed: a row says what is missing.
Times are medians of processor time on one thread, forward (eval, no gradients) and forward + backward (train, to inputs
and weights); memory is the peak beyond inputs and weights. The column "answers" is `same` where both had equal weights
and their answers were compared: they differ by rounding. Otherwise it says what is different, and the ratio compares
two readings of one paper. Machines are noisy: trust the ratios, and take those within 5 % as equal. Packages for text
get a grid of one row where the block can have the same line. Writes a CSV, anew after each pair.
"""

import difflib
import inspect
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module, metadata
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from tqdm import tqdm

from training.results import read, write
from vision_attn import Grid, Mixer, create_block
from vision_attn.cost import peak_memory, times
from vision_attn.layout import OnMap


class Pair(NamedTuple):
    block: str
    package: str  # as pip has it
    path: str  # of the peer, a class or function
    input: str  # "map" (B, C, H, W), "tokens" (B, N, C) or "heads": q, k and v (B, heads, N, d)
    line: bool  # whether the grid is one row
    make: Callable  # (create, Peer, dim, heads, grid) → the block that `create` makes, and the peer, of equal weights

    @property
    def differs(self) -> str:
        """What is not the same mathematics, which the maker says; empty: answers are the same."""
        return (inspect.getdoc(self.make) or "").partition("Differs: ")[2].rstrip(".")

    @property
    def peer(self) -> str:
        return self.path.rpartition(".")[2]


class Called(nn.Module):
    """A call that is more than ``peer(*inputs)``, as a module, with the modules whose weights it uses."""

    def __init__(self, call: Callable[..., Tensor], *modules: nn.Module):
        super().__init__()
        self.call, self.used = call, nn.ModuleList(modules)

    def forward(self, *inputs):
        return self.call(*inputs)


PAIRS: list[Pair] = []


def pair(block: str, package: str, path: str, input: str, line: bool = False) -> Callable[[Callable], None]:
    return lambda make: PAIRS.append(Pair(block, package, path, input, line, make))


def copy(source: nn.Module, *targets: nn.Module) -> None:
    """Shares out the outputs of a linear layer among others, linear or 1×1 convolutions, in this order."""
    rows = [len(target.weight) for target in targets]
    for target, weight in zip(targets, source.weight.split(rows)):
        target.weight.copy_(weight.reshape(target.weight.shape))
    for target, bias in zip(targets, () if source.bias is None else source.bias.split(rows)):
        target.bias.copy_(bias)


def bare(block: Mixer) -> Mixer:
    """The block without its last projection, where the peer leaves it to another layer."""
    block.proj = nn.Identity()
    return block


def divisor(n: int, most: int) -> int:
    """The largest divisor of ``n`` up to ``most``: peers want windows and buckets that divide their input."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)


# Packages that are there


@pair("cbam", "timm", "timm.layers.cbam.CbamModule", "map")
def cbam(create, Peer, dim, heads, grid):
    block, peer = create(rd_channels=16), Peer(dim, rd_channels=16, mlp_bias=True)
    copy(block.mlp[0], peer.channel.fc1)
    copy(block.mlp[2], peer.channel.fc2)
    peer.spatial.conv.conv.weight.copy_(block.spatial[0].weight.flip(1))  # ours has the maximum first
    return block, peer


@pair("global_context", "timm", "timm.layers.GlobalContext", "map")
def global_context(create, Peer, dim, heads, grid):
    block, peer = create(fusion="multiply", rd_channels=16), Peer(dim, rd_channels=16)
    for source, target in ((0, "fc1"), (1, "norm"), (3, "fc2")):
        copy(block.multiply[source], getattr(peer.mlp_scale, target))
    peer.mlp_scale.norm.eps = block.multiply[1].eps
    copy(block.key, peer.conv_attn)
    return block, peer


@pair("dense", "timm", "timm.layers.Attention", "tokens")
def dense(create, Peer, dim, heads, grid):
    block, peer = create(num_heads=heads), Peer(dim, heads, qkv_bias=True)
    copy(block.qkv, peer.qkv)
    copy(block.proj, peer.proj)
    return block, peer


@pair("talking_heads", "timm", "timm.models.cait.TalkingHeadAttn", "tokens")
def talking_heads(create, Peer, dim, heads, grid):
    block, peer = create(num_heads=heads, mixing_bias=True), Peer(dim, heads, qkv_bias=True)
    copy(block.qkv, peer.qkv)
    copy(block.proj, peer.proj)
    block.p_l.copy_(peer.proj_l.weight.T)  # without its bias, one number for a whole softmax
    block.p_w.copy_(peer.proj_w.weight.T)
    block.b_w.copy_(peer.proj_w.bias)
    return block, peer


@pair("memory_compressed", "timm", "timm.models.pvt_v2.Attention", "tokens")
def pyramid(create, Peer, dim, heads, grid):
    """Differs: convolves what keys and values are made of."""
    peer = Peer(dim, heads, sr_ratio=4)
    return create(num_heads=heads, stride=4), Called(lambda x: peer(x, grid), peer)


@pair("window", "timm", "timm.layers.halo_attn.HaloAttn", "map")
def halo(create, Peer, dim, heads, grid):
    """Differs: each tile sees itself and its rim, zeros and relative positions too."""
    peer = Peer(dim, num_heads=heads, block_size=divisor(grid.height, 8), halo_size=3)
    return bare(create(num_heads=heads, kernel_size=7)), peer


@pair("interlaced_sparse", "torchvision", "torchvision.models.swin_transformer.ShiftedWindowAttention", "tokens")
def tiles(create, Peer, dim, heads, grid):
    """The short-range step alone, beside Swin's attention without shift and with relative positions of zero."""
    size = tuple(divisor(side, 8) for side in grid)  # with another the peer attends to padding
    block, peer = create(num_heads=heads, factor=size).steps[1], Peer(dim, list(size), [0, 0], heads)
    copy(block.qkv, peer.qkv)
    copy(block.proj, peer.proj)
    peer.relative_position_bias_table.zero_()
    return block, Called(lambda x: peer(x.unflatten(1, grid)).flatten(1, 2), peer)


# Packages for images, or for text as wide as the image


@pair(
    "criss_cross",
    "fightingcv-attention",
    "fightingcv_attention.attention.CrissCrossAttention.CrissCrossAttention",
    "map",
)
def criss_cross(create, Peer, dim, heads, grid):
    options = dict(num_heads=1, key_dim=dim // 8, scale=1.0, out_proj=False, recurrence=1)
    layer, peer = OnMap(create(**options), 1.0), Peer(dim)
    copy(layer.block.qkv, peer.query_conv, peer.key_conv, peer.value_conv)
    peer.gamma.fill_(1)
    return layer, peer


@pair("global_filter", "fightingcv-attention", "fightingcv_attention.attention.gfnet.GlobalFilter", "tokens")
def global_filter(create, Peer, dim, heads, grid):
    block = create(num_heads=dim, length=tuple(grid), projections=False)
    peer = Peer(dim, grid.height, grid.width // 2 + 1)
    peer.complex_weight.copy_(block.filter.permute(1, 2, 0, 3))
    return block, Called(lambda x: peer(x, grid), peer)


@pair("axial", "axial-attention", "axial_attention.AxialAttention", "tokens")
def axial(create, Peer, dim, heads, grid):
    block, peer = create(num_heads=heads, mode="sum", qkv_bias=False), Peer(dim, heads=heads)
    for own, other in zip(block.steps, peer.axial_attentions):
        copy(own.qkv, other.fn.to_q, other.fn.to_kv)
        copy(own.proj, other.fn.to_out)
    return block, Called(lambda x: peer(x.unflatten(1, grid)).flatten(1, 2), peer)


@pair("linformer", "linformer", "linformer.LinformerSelfAttention", "tokens")
def linformer(create, Peer, dim, heads, grid):
    """The peer's matrices, N × 64, are products of ours for rows and columns."""
    block = create(num_heads=heads, rank=8, length=tuple(grid), qkv_bias=False)
    peer = Peer(dim, grid.size, k=64, heads=heads)
    copy(block.qkv, peer.to_q, peer.to_k, peer.to_v)
    copy(block.proj, peer.to_out)
    for place, table in enumerate((peer.proj_k, peer.proj_v)):
        table.copy_(torch.kron(block.rows[place, 0], block.columns[place, 0]).T)
    return block, peer


@pair("spatial_gating", "g-mlp-pytorch", "g_mlp_pytorch.g_mlp_pytorch.gMLPBlock", "tokens")
def spatial_gating(create, Peer, dim, heads, grid):
    """The peer's matrix, N × N, is a product of ours for rows and columns."""
    block, peer = create(num_heads=1, length=tuple(grid)), Peer(dim=dim, dim_ff=2 * dim, seq_len=grid.size)
    copy(block.qkv, peer.proj_in[0])
    copy(block.proj, peer.proj_out)
    peer.sgu.weight.copy_(torch.kron(block.rows[0], block.columns[0]))
    peer.sgu.bias.copy_(block.bias.flatten(1))
    return block, peer


@pair("attention_free", "aft-pytorch", "aft_pytorch.AFTFull", "tokens")
def attention_free(create, Peer, dim, heads, grid):
    """The peer's matrix, N × N, holds the weights of our window, and all channels of its keys are alike."""
    block, peer = create(num_heads=1, kernel_size=11), Peer(grid.size, dim, hidden_dim=dim)
    copy(block.qkv, peer.to_q, key := nn.Linear(dim, 1), peer.to_v)
    copy(block.proj, peer.project)
    peer.to_k.weight.copy_(key.weight.expand(dim, -1))
    peer.to_k.bias.copy_(key.bias.expand(dim))
    y, x = (t.flatten() for t in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    down, right = (t - t[:, None] + 5 for t in (y, x))
    near = block.near[0, down.clamp(0, 10), right.clamp(0, 10)]
    peer.wbias.copy_(near.where((down >= 0) & (down <= 10) & (right >= 0) & (right <= 10), 0))
    return block, peer


@pair("product_keys", "product-key-memory", "product_key_memory.PKM", "tokens")
def product_keys(create, Peer, dim, heads, grid):
    """Differs: norms each half of a query."""
    memory = create(num_heads=4, keys=64, nearest=16, key_dim=dim // 2).memory
    return memory, Peer(dim, heads=4, num_keys=64, topk=16, dim_head=dim // 4)


@pair("inducing_points", "isab-pytorch", "isab_pytorch.ISAB", "tokens")
def inducing_points(create, Peer, dim, heads, grid):
    """Differs: points have no residual, no second layer."""
    peer = Peer(dim=dim, heads=heads, num_latents=32)
    return create(num_heads=heads, points=32), Called(lambda x: peer(x)[0], peer)


# Kernels: the order of tokens does not matter


@pair(
    "efficient",
    "linear-attention-transformer",
    "linear_attention_transformer.linear_attention_transformer.linear_attn",
    "heads",
)
def efficient(create, linear_attn, dim, heads, grid):
    """Differs: answers times d^-½."""
    return create(num_heads=heads), Called(linear_attn)


@pair("linear", "pytorch-fast-transformers", "fast_transformers.attention.LinearAttention", "heads")
def linear(create, Peer, dim, heads, grid):
    from fast_transformers.masking import FullMask, LengthMask

    peer, everything = Peer(dim // heads), FullMask(grid.size)

    def call(*heads):
        length = LengthMask(torch.full((len(heads[0]),), grid.size))
        return peer(*(t.transpose(1, 2) for t in heads), everything, length, length).transpose(1, 2)

    return create(num_heads=heads), Called(call, peer)


@pair("performer", "performer-pytorch", "performer_pytorch.FastAttention", "heads")
def performer(create, Peer, dim, heads, grid):
    """Differs: adds 10⁻⁴ to features."""
    block = create(num_heads=heads)
    return block, Peer(dim // heads, nb_features=len(block.omega))


# Packages for text, on a line


@pair("window", "local-attention", "local_attention.LocalAttention", "heads", line=True)
def local(create, Peer, dim, heads, grid):
    size = divisor(grid.size, 32)  # to each side
    return create(num_heads=heads, kernel_size=(1, 2 * size + 1)), Peer(size, exact_windowsize=True)


def sliding(tokens, create, Peer, dim, heads, grid):
    from transformers import LongformerConfig

    size = divisor(grid.size // 2, 32)  # to each side
    options = dict(hidden_size=dim, num_attention_heads=heads, attention_probs_dropout_prob=0.0)
    peer = Peer(LongformerConfig(attention_window=[2 * size], **options), 0)
    options = dict(dilation=(1,), tokens=tokens) if tokens else {}
    block = bare(create(num_heads=heads, kernel_size=(1, 2 * size + 1), **options))
    copy(block.qkv, peer.query, peer.key, peer.value)
    if tokens:
        copy(block.qkv_global, peer.query_global, peer.key_global, peer.value_global)

    def call(x):
        first = (torch.arange(grid.size) < tokens).expand(len(x), -1)
        return peer(x, 1e4 * first, torch.zeros_like(first), first, tokens > 0)[0]

    return block, Called(call, peer)


SLIDING = "transformers", "transformers.models.longformer.modeling_longformer.LongformerSelfAttention", "tokens"
pair("window", *SLIDING, line=True)(partial(sliding, 0))
pair("longformer", *SLIDING, line=True)(partial(sliding, 8))


@pair(
    "big_bird", "transformers", "transformers.models.big_bird.modeling_big_bird.BigBirdBlockSparseAttention", "tokens"
)
def big_bird(create, Peer, dim, heads, grid):
    """Differs: runs on a line, of which two see all."""
    from transformers import BigBirdConfig, BigBirdModel

    run = divisor(grid.size, 16)
    options = dict(hidden_size=dim, num_attention_heads=heads, block_size=run, num_random_blocks=3)
    peer = Peer(BigBirdConfig(**options), seed=0)

    def call(x):
        blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(x.new_ones(x.shape[:2]), run)
        return peer(x, band, rows, columns, blocked, blocked)[0]

    return bare(create(num_heads=heads, tile=4, drawn=3)), Called(call, peer)


@pair("nystrom", "nystrom-attention", "nystrom_attention.NystromAttention", "tokens")
def nystrom(create, Peer, dim, heads, grid):
    """Differs: landmarks on a line; the inverse starts from the whole batch."""
    cells = tuple(divisor(size, 8) for size in grid)
    options = dict(heads=heads, dim_head=dim // heads, num_landmarks=cells[0] * cells[1], residual=False)
    return create(num_heads=heads, cells=cells, qkv_bias=False), Peer(dim, **options)


@pair(
    "memory_compressed",
    "memory-compressed-attention",
    "memory_compressed_attention.MemoryCompressedAttention",
    "tokens",
)
def memory_compressed(create, Peer, dim, heads, grid):
    """Differs: values convolved as keys are, a null pair, another scale."""
    return create(num_heads=heads, stride=3, qkv_bias=False), Peer(dim, heads, compression_factor=9)


@pair("lsh", "reformer-pytorch", "reformer_pytorch.LSHAttention", "heads")
def lsh(create, Peer, dim, heads, grid):
    """Differs: chunks of all tokens by bucket, smaller buckets, drawn anew."""
    chunk = divisor(grid.size // 2, 64)
    peer = Peer(bucket_size=chunk, n_hashes=1)
    call = Called(lambda q, k, v: peer(q.flatten(0, 1), v.flatten(0, 1))[0].unflatten(0, q.shape[:2]), peer)
    return create(num_heads=heads, chunk=max(1, chunk // 16) * 16), call  # others are padded to a multiple of 16


@pair("routing", "routing-transformer", "routing_transformer.routing_transformer.KmeansAttention", "heads")
def routing(create, Peer, dim, heads, grid):
    """Differs: queries of unit length, no self."""
    peer = Peer(8, -(-grid.size // 8), heads, dim // heads, shared_qk=True)
    return create(num_heads=heads, clusters=8), Called(lambda q, k, v: peer(q, q, v)[0], peer)


@pair("sinkhorn", "sinkhorn-transformer", "sinkhorn_transformer.sinkhorn_transformer.SinkhornAttention", "heads")
def sinkhorn(create, Peer, dim, heads, grid):
    """Differs: runs on a line, noise, sorted keys as values."""
    tile = divisor(grid.height, 8)
    return create(num_heads=heads, tile=tile), Peer(tile**2, dim, dim // heads, heads, grid.size, non_permutative=False)


def call_of(block: nn.Module, input: str, grid: Grid) -> Callable[..., Tensor]:
    """What computes the block's answer to such inputs."""
    if not isinstance(block, Mixer):
        return block
    on_map = OnMap(block, 1.0).update  # without a residual
    return {"map": on_map, "tokens": lambda x: block(x, grid), "heads": lambda *qkv: block.mix(*qkv, grid)}[input]


@torch.no_grad()
def forward(call: Callable, inputs: list[Tensor], weights: list[Tensor]) -> None:
    call(*inputs)


def step(call: Callable, inputs: list[Tensor], weights: list[Tensor]) -> None:
    out = call(*inputs)
    torch.autograd.grad(out, [*inputs, *weights], torch.ones_like(out), allow_unused=True)


def busy(call: Callable, device: str) -> float:
    """Milliseconds of processor time of one call, whatever else the machine does."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


COLUMNS = "block", "options", "peer", "package", "grid", "batch", "kind", "ours ms", "peer ms", "peer / ours"
COLUMNS += "ours MiB", "peer MiB", "answers"
KINDS = {"forward": forward, "forward + backward": step}


def measure(pair: Pair, grid: Grid, batch: int, heads: int, channels: int, seconds: float) -> list[dict]:
    """A row of the table for each kind, or one that says why there is nothing to measure."""
    torch.manual_seed(0)
    dim, options = heads * channels, {}

    def create(**some):
        options.update(some)
        return create_block(pair.block, dim, **some)

    def row(**found):
        found |= titles(pair, grid, batch) | {"options": " ".join(f"{key}={value}" for key, value in options.items())}
        return {column: found.get(column, "") for column in COLUMNS}

    if not (version := version_of(pair.package)):
        return [row(package=pair.package, answers=f"not installed: pip install {pair.package}")]
    package = f"{pair.package} {version}"
    shape = {"map": (batch, dim, *grid), "tokens": (batch, grid.size, dim)}
    sizes = [shape[pair.input]] if pair.input in shape else [(batch, heads, grid.size, channels)] * 3
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    try:
        with torch.no_grad(), redirect_stdout(None), warnings.catch_warnings(action="ignore"):
            Peer = getattr(import_module(pair.path.rpartition(".")[0]), pair.peer)
            block, peer = pair.make(create, Peer, dim, heads, grid)
            theirs = peer.eval()(*inputs)
        step(peer.train(), inputs, list(peer.parameters()))
    except Exception as failure:  # they raise anything, for want of another package or at a size that they refuse
        said = f"failed: {type(failure).__name__}: {' '.join(str(failure).split())[:80]}"
        return [row(package=package, answers=said)]
    calls = {"ours": call_of(block, pair.input, grid), "peer": peer}
    answers = f"differs: {pair.differs}"
    if not pair.differs:
        block.eval()
        with torch.no_grad():
            error = ((calls["ours"](*inputs) - theirs).abs().max() / theirs.abs().max()).item()
        answers = "same" if error < 1e-4 else f"not the same: {error:.1e} apart"
    rows = []
    for kind, run in KINDS.items():
        runs = {}
        for name, module in (("ours", block), ("peer", peer)):
            module.train(run is step)
            runs[name] = partial(run, calls[name], inputs, list(module.parameters()))
        taken = times(runs, "cpu", seconds, least=4, clock=busy)
        # the first turn builds what later ones keep
        ms = {name: statistics.median(some[1:]) for name, some in taken.items()}
        measured = {f"{name} ms": f"{some:.3f}" for name, some in ms.items()}
        measured |= {f"{name} MiB": f"{peak_memory(run, 'cpu'):.3f}" for name, run in runs.items()}
        measured["peer / ours"] = f"{ms['peer'] / ms['ours']:.2f}"
        rows.append(row(package=package, kind=kind, answers=answers, **measured))
    return rows


def titles(pair: Pair, grid: Grid, batch: int) -> dict[str, str]:
    """The columns that say what a row is about."""
    return dict(block=pair.block, peer=pair.peer, grid=f"{grid.height}×{grid.width}", batch=str(batch))


def version_of(package: str) -> str:
    """Of what is installed; empty if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def chosen(title: str, names: list[str] | None, known: list[str]) -> list[str]:
    """The names, or all that are known; ValueError for one that is not."""
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
            said = "there are" if near is known else "nearest"
            raise ValueError(f"{title}={name!r}: no pair has it; {said}: {', '.join(near)}")
    return known if names is None else names


def benchmark(
    blocks: list[str] | None = None,
    packages: list[str] | None = None,
    sizes: tuple[tuple[int, int, int], ...] = ((14, 14, 8), (28, 28, 4), (64, 64, 1)),
    heads: int = 4,
    channels: int = 64,
    seconds: float = 1.0,
    path: str | None = None,
    resume: str | None = None,
) -> None:
    """Writes a CSV of times and memory.

    Args:
        blocks: names of blocks that have peers; null: all.
        packages: names of packages, as pip has them; null: all.
        sizes: (height, width, batch).
        heads: of the blocks that have heads.
        channels: of a head.
        seconds: that the turns of a pair and kind take, or three turns, if those take longer.
        path: of the CSV; null names it by torch version and date under results/.
        resume: instead, the CSV of a stopped run, to measure the pairs and sizes it has no times of.
    """
    torch.set_num_threads(1)
    blocks = chosen("blocks", blocks, sorted({pair.block for pair in PAIRS}))
    packages = chosen("packages", packages, sorted({pair.package for pair in PAIRS}))
    pairs = [pair for pair in PAIRS if pair.block in blocks and pair.package in packages]
    if not pairs:
        raise ValueError(f"packages={packages!r}: no pair of {', '.join(blocks)}")
    rows, path = [], resume or path
    if resume:
        rows = [row for row in read(resume) if row["kind"]]  # what was not installed may be now
    left = []
    for pair, (height, width, batch) in itertools.product(pairs, sizes):
        grid = Grid(1, height * width) if pair.line else Grid(height, width)
        about = titles(pair, grid, batch)
        if not any(row.items() >= about.items() for row in rows):
            left.append((pair, grid, batch))
    for what in tqdm(left, unit=" pairs"):
        rows += measure(*what, heads, channels, seconds)
        with redirect_stdout(None):  # the path, each time
            path = write(path, "peers", rows)
    print(path)


if __name__ == "__main__":
    sys.exit(auto_cli(benchmark))
