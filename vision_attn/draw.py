"""What one pixel looks at: as characters, and as a picture, for which alone matplotlib is needed."""

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


class Look(NamedTuple):
    """What the query sees through one step, or one share of the heads, of a block."""

    title: str
    weights: Float[Tensor, "H W"]  # of a pattern: 1 is seen, 0 is not
    text: str  # the same in characters


@torch.no_grad()
def looks(block: Mixer | Gate, grid: Grid, query: tuple[int, int], seed: int = 0) -> list[Look]:
    """Where the pixel ``query`` = (y, x) looks; puts the block into eval mode.

    Of attention over a pattern: what it may see, for each share of the heads. Of any other mixer: its weights for a
    random image, heads averaged. Of a gate, which has no query: its weight of every position of that image.

    Raises:
        ValueError: ``query`` is outside the grid.
    """
    if not all(0 <= at < size for at, size in zip(query, grid)):
        raise ValueError(f"query={query}: must be (y, x) on a {grid.height}×{grid.width} grid, counted from 0")
    image = random_image(block.eval().dim, grid, seed)
    if isinstance(block, Gate):
        weights = block.attention_map(image)[0]
        return [Look(f"weights for a random image, {spread(weights)}", weights, shade(weights))]
    found, tokens, steps = [], image.flatten(2).mT, block.steps or (block,)
    for number, step in enumerate(steps, start=1):
        which = f"step {number} of {len(steps)}, " if len(steps) > 1 else ""
        if tells_by_pattern(step):
            seen = of_pattern(step, grid, query)
        else:
            weights = step.attention(tokens, grid)[0, :, query[0] * grid.width + query[1]].mean(dim=0)
            weights = weights.unflatten(0, tuple(grid))
            seen = [Look(f"weights for a random image, {spread(weights)}", weights, shade(weights, query))]
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


def picture(found: list[Look], title: str, path: str | Path, query: tuple[int, int] | None = None) -> Path:
    """Writes a PNG with a panel for each look, the query marked; folders are made. Returns its path, ending in .png.

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
    across = min(4, len(found))
    down = math.ceil(len(found) / across)
    figure = Figure(figsize=((wide + 1) * across + 1, (high + 0.5) * down + 0.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    for axis, look in zip(axes, found):
        weights, most = look.weights, look.weights.abs().max().item()
        if (weights * (1 - weights) == 0).all():  # a pattern
            axis.pcolormesh(weights, cmap="Blues", vmin=0, vmax=1.6, edgecolors="0.85", linewidth=0.4)
        else:
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
            axis.plot(*at, "*", color="tab:red", markersize=size, markeredgecolor="white", markeredgewidth=size / 13)
        axis.set(aspect="equal", xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
        axis.set_title(look.title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path
