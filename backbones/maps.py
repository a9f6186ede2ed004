"""What a model attends to: the attention map of every block in it, as numbers and as a picture."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from textwrap import wrap
from threading import get_ident

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_attn import Gate, Grid, Mixer


@torch.no_grad()
def attention_maps(model: nn.Module, images: Tensor, at: str = "*") -> dict[str, Tensor]:
    """Where each block of the zoo inside ``model`` looks.

    Args:
        model: put into eval mode for the call, then every part back into its own.
        images: (B, C, H, W) as the model takes them.
        at: wildcard of the blocks' module names.

    Returns:
        For each block's name, a map (B, h, w): a gate's weight of every position; for a mixer the share of
        attention that a position receives from all others, heads averaged, times the number of positions (1 is
        average). Cost of a mixer's: N².

    Raises:
        ValueError: there is no block of the zoo in the model, or none that ``at`` matches.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, (Gate, Mixer))}
    blocks = {n: m for n, m in blocks.items() if not any(n.startswith(f"{o}.") for o in blocks)}  # not the steps of one
    if not blocks:
        raise ValueError(f"model={type(model).__name__}: has no block of vision_attn in it")
    chosen = {name: module for name, module in blocks.items() if fnmatchcase(name, at)}
    if not chosen:
        raise ValueError(f"at={at!r}: matches none of {', '.join(blocks)}")
    maps, was_training, caller = {}, {module: module.training for module in model.modules()}, get_ident()

    def keep(name):
        def hook(module, args, output):
            if get_ident() == caller:  # other threads may be running the model
                maps[name] = module.attention_map(args[0]) if isinstance(module, Gate) else _received(module, *args)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in chosen.items()]
    try:
        model.eval()(images)
    finally:
        for module, training in was_training.items():  # one by one: parts may be frozen in eval mode
            module.training = training
        for handle in handles:
            handle.remove()
    return maps


def _received(mixer: Mixer, x: Tensor, grid: Grid) -> Tensor:
    """Attention that each position of the grid receives, signs aside, (B, H, W)."""
    matrix = mixer.attention(x, grid)[..., x.shape[1] - grid.size :].abs()
    return matrix.mean(dim=1).sum(dim=1).unflatten(1, tuple(grid))


def draw_maps(images: Tensor, maps: dict[str, Tensor], path: str | Path, titles: Sequence[str] | None = None) -> Path:
    """Writes a PNG: a row for each image, a column for the image and for each map laid over it.

    Args:
        images: (B, 1 or 3, H, W), values in [0, 1].
        maps: (B, h, w) by name, as from `attention_maps`.
        path: where to write; folders are made.
        titles: one for each image; long lines are wrapped, as are names of maps.
    """
    import matplotlib.pyplot as plt  # of the extra "train"

    rows, columns = len(images), 1 + len(maps)
    size = 1.3 * (columns + (titles is not None)), 1.35 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    pixels = images.detach().float().cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).clamp(0, 1).numpy()
    for row, (line, image) in enumerate(zip(axes, pixels)):
        for axis in line:
            axis.imshow(image)
            axis.set(xticks=[], yticks=[])
        for axis, (name, values) in zip(line[1:], maps.items()):
            shown = F.interpolate(values[row][None, None].float(), image.shape[:2], mode="bilinear")[0, 0].cpu().numpy()
            middle, half = (shown.max() + shown.min()) / 2, max(1e-6, (shown.max() - shown.min()) / 2)
            axis.imshow(shown, cmap="inferno", alpha=0.7, vmin=middle - half, vmax=middle + half)  # even: in the middle
            if row == 0:
                axis.set_title("\n".join(wrap(name.removesuffix(".block"), 18)), fontsize=7)
        if titles is not None:
            told = "\n".join(chain.from_iterable(wrap(part, 20) for part in titles[row].splitlines()))
            line[0].set_ylabel(told, fontsize=7, rotation=0, ha="right", va="center")  # beside it, so long names fit
    figure.supxlabel("brightest: looked at most, of each map", fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
