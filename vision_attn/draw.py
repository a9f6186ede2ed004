"""What one pixel looks at: as characters, and as a picture, for which alone matplotlib is needed.

Blocks that choose by content are random until trained. Those that compare queries with queries (`lsh`, `routing`,
`clustered`) put like with like all the same; what the others choose is as random as the weights they start with.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .gate import Gate
from .grid import Grid
from .mixer import Mixer, PatternMixer
from .pyramid import PyramidMixer

SHADES = ".:-=+*%#"  # light to dark
HEADS = 4  # of a block that chooses, each of which is a look of its own


class Look(NamedTuple):
    """What the query sees through one step, or one share of the heads, of a block."""

    title: str
    weights: Float[Tensor, "H W"]  # of a pattern: 1 is seen, 0 is not
    text: str  # the same in characters


@torch.no_grad()
def looks(
    block: Mixer | Gate,
    grid: Grid,
    query: tuple[int, int],
    seed: int = 0,
    image: Float[Tensor, "3 h w"] | None = None,
) -> list[Look]:
    """Where the pixel ``query`` = (y, x) looks; puts the block into eval mode.

    Without ``image``, of attention over a pattern: what it may see, for each share of the heads. Of any other mixer:
    its weights for a random image, heads averaged. Of a gate, which has no query: its weight of every position.

    With ``image``, of a block that chooses by content (one with ``choose``): what each of its first 4 heads chose for
    the query in that image, all rounds together (`of_choice`). Of any other mixer or gate: its weights for it.

    Raises:
        ValueError: ``query`` is outside the grid, or ``image`` is not (3, h, w), floating point, within [0, 1].
    """
    if not all(0 <= at < size for at, size in zip(query, grid)):
        raise ValueError(f"query={query}: must be (y, x) on a {grid.height}×{grid.width} grid, counted from 0")
    dim, given = block.eval().dim, image is not None
    shown = lifted(image, dim, grid, seed) if given else random_image(dim, grid, seed)
    title = f"weights for {'the' if given else 'a random'} image"
    if isinstance(block, Gate):
        weights = block.attention_map(shown)[0]
        return [Look(f"{title}, {spread(weights)}", weights, shade(weights))]
    found, tokens, steps = [], shown.flatten(2).mT, block.steps or (block,)
    for number, step in enumerate(steps, start=1):
        which = f"step {number} of {len(steps)}, " if len(steps) > 1 else ""
        if not given and tells_by_pattern(step):
            seen = of_pattern(step, grid, query)
        elif given and hasattr(step, "choose"):
            seen = of_choice(step.attention(tokens, grid)[0], grid, query)
        else:
            weights = step.attention(tokens, grid)[0, :, query[0] * grid.width + query[1]].mean(dim=0)
            weights = weights.unflatten(0, tuple(grid))
            seen = [Look(f"{title}, {spread(weights)}", weights, shade(weights, query))]
        found += [look._replace(title=which + look.title) for look in seen]
        if number < len(steps):
            tokens = step(tokens, grid)
    return found


def tells_by_pattern(step: Mixer) -> bool:
    """Whether its pattern says what is seen; elsewhere weights tell more: cells, spans, bells."""
    alone = isinstance(step, PatternMixer) or "q" not in step.projects
    return hasattr(step, "pattern") and alone and not isinstance(step, PyramidMixer)


def of_pattern(step: Mixer, grid: Grid, query: tuple[int, int]) -> Iterator[Look]:
    """What each share of the heads may see."""
    last, parts = 0, step.pattern.by_head()
    for part, heads in zip(parts, step.pattern.shares(step.num_heads)):
        first, last = last + 1, last + heads
        which = "" if len(parts) == 1 else f"head {first}, " if heads == 1 else f"heads {first} to {last}, "
        text = part.draw(grid, *query)
        seen = torch.tensor([[float(sign in "#@") for sign in line] for line in text.splitlines()])
        yield Look(f"{which}sees {int(seen.sum())} of {grid.size}", seen, text)


def of_choice(weights: Float[Tensor, "heads N N"], grid: Grid, query: tuple[int, int]) -> Iterator[Look]:
    """What each of the first heads chose: whom the query sees, its weight being > 0.

    Where it sees everything: who is answered alike, by the same weights (its cluster, or all that take the mean); if
    that is nobody else, its weights.
    """
    at = query[0] * grid.width + query[1]
    for head, of_head in enumerate(weights[:HEADS], start=1):
        which, own = f"head {head} of {len(weights)}", of_head[at]
        chosen, what = own > 0, "sees"
        if chosen.all():
            chosen, what = torch.isclose(of_head, own).all(dim=1), "answered alike:"
            if chosen.sum() == 1:
                own = own.unflatten(0, tuple(grid))
                yield Look(f"{which}, sees all, weights {spread(own)}", own, shade(own, query))
                continue
        signs = ["-#"[c] for c in chosen.tolist()]
        signs[at] = "@" if chosen[at] else "o"
        rows = ("".join(signs[row : row + grid.width]) for row in range(0, grid.size, grid.width))
        seen = chosen.to(own.dtype).unflatten(0, tuple(grid))
        yield Look(f"{which}, {what} {int(chosen.sum())} of {grid.size}", seen, "\n".join(rows))


def read_image(path: str | Path) -> Float[Tensor, "3 h w"]:
    """An image file as RGB in [0, 1], turned as its camera noted.

    Raises:
        ValueError: the file is missing, or holds no image that can be read.
        ImportError: Pillow is missing; the message says how to install it.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("reading an image needs Pillow: pip install pillow") from None
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image={str(path)!r}: must be an image file: {error}") from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(image.height, image.width, 3)
    return pixels.permute(2, 0, 1) / 255


def lifted(image: Float[Tensor, "3 h w"], dim: int, grid: Grid, seed: int) -> Float[Tensor, "1 C H W"]:
    """``image`` as a map of ``dim`` channels: the mean colour of each cell, projected at random, by ``seed``.

    Colours are whitened first, so that hue, which varies least, tells as much as brightness. Nothing tells where a cell
    stands: what is seen together is alike in colour alone, however far apart.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel() or not image.is_floating_point():
        raise ValueError(f"image of shape {tuple(image.shape)}, {image.dtype}: must be (3, h, w), floating point")
    if not 0 <= image.min() <= image.max() <= 1:
        raise ValueError(f"image with values {spread(image)}: must be within [0, 1]")
    colours = cells(image, grid).flatten(1)
    colours = colours - colours.mean(dim=1, keepdim=True)
    covariance = colours @ colours.mT / grid.size + 1e-3 * torch.eye(3)  # what is of one colour stays nearly so
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), colours, upper=False)
    projection = torch.randn(dim, 3, generator=torch.Generator().manual_seed(seed))
    return (projection @ white.clamp(-3, 3))[None].unflatten(2, tuple(grid))  # further, all weight goes to few pixels


def cells(image: Float[Tensor, "3 h w"], grid: Grid) -> Float[Tensor, "3 H W"]:
    """The mean colour of each cell."""
    return F.adaptive_avg_pool2d(image.float(), tuple(grid))


def random_image(dim: int, grid: Grid, seed: int) -> Float[Tensor, "1 C H W"]:
    """Smooth noise, so that there are regions to look at, of high contrast, so that weights differ."""
    coarse = torch.randn(1, dim, *(-(-n // 4) + 1 for n in grid), generator=torch.Generator().manual_seed(seed))
    return 3 * F.interpolate(coarse, tuple(grid), mode="bilinear", align_corners=True)


def shade(weights: Float[Tensor, "H W"], query: tuple[int, int] | None = None) -> str:
    """The darker, the nearer to the largest, signs aside; ``@`` is the query.

    >>> print(shade(torch.tensor([[0, 1, 2], [3, 4, 8]]), (0, 2)))
    ..@
    -=#
    """
    share = weights.abs().double() / weights.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    signs = [[SHADES[int(level)] for level in row] for row in (share * (len(SHADES) - 1)).tolist()]
    if query is not None:
        signs[query[0]][query[1]] = "@"
    return "\n".join(map("".join, signs))


def spread(weights: Tensor) -> str:
    """Smallest and largest, for a title."""
    return f"{weights.min().item():.2g} to {weights.max().item():.2g}"


def picture(
    found: list[Look],
    title: str,
    path: str | Path,
    query: tuple[int, int] | None = None,
    image: Float[Tensor, "3 h w"] | None = None,
) -> Path:
    """Writes a PNG with a panel for each look, the query marked; folders are made. Returns its path, ending in .png.

    With ``image``, that of `looks`, it comes first, and what is seen is shown in its own colours.

    Raises:
        ValueError: the path is a folder.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install 'vision-attn[train]'") from None
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path={str(path)!r}: is a folder, must be a file")
    path = path if path.suffix.lower() == ".png" else path.with_name(f"{path.name}.png")
    height, width = found[0].weights.shape
    high, wide = (4 * n / max(height, width) for n in (height, width))  # inches of a panel
    panels = found if image is None else [None, *found]  # None: the image itself
    across = min(4 if image is None else 1 + HEADS, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=((wide + 1) * across + 1, (high + 0.5) * down + 0.5), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a file may be called anything
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if image is not None:
        image = image.detach().float().cpu()
        pixels, colours = (t.permute(1, 2, 0) for t in (image, cells(image, Grid(height, width))))
    for axis, look in zip(axes, panels):
        if look is None:
            axis.imshow(pixels.numpy(), extent=(0, width, height, 0))
        elif (look.weights * (1 - look.weights) == 0).all():  # a pattern
            if image is None:
                axis.pcolormesh(look.weights, cmap="Blues", vmin=0, vmax=1.6, edgecolors="0.85", linewidth=0.4)
            else:
                seen = colours.where(look.weights[..., None] > 0, 0.7 + 0.15 * colours)
                axis.imshow(seen.numpy(), extent=(0, width, height, 0))
        else:
            weights, most = look.weights, look.weights.abs().max().item()
            signed = (weights < 0).any().item()
            axis.set_facecolor("0.85")  # where nothing is seen
            shown = axis.pcolormesh(
                weights.where(weights != 0, torch.nan),
                cmap="RdBu_r" if signed else "viridis",
                vmin=-most * signed,
                vmax=most,
            )
            figure.colorbar(shown, ax=axis, shrink=0.8)
        if query is not None:
            at, size = (query[1] + 0.5, query[0] + 0.5), max(7, min(13, 60 * high / height))
            size = size if image is None else 15  # on a photo a small one is lost
            axis.plot(*at, "*", color="tab:red", markersize=size, markeredgecolor="white", markeredgewidth=size / 13)
        axis.set(aspect="equal", xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
        axis.set_title("the image" if look is None else look.title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path
