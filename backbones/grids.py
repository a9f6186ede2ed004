"""Where the grid of a host's tokens comes from: what makes its patches, found or told.

timm's ViTs say it. Of others it is seen: where a change at one position of a map is a change of one token, before
tokens are mixed, and the positions come in raster order behind the prefix tokens, that map is the grid.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vision_attn import Grid
from vision_attn.hooks import GridSource, one_size, source_at

from .hosts import given, holders, like, observe


def grid_source(
    model: nn.Module,
    tokens: dict[str, int | None],
    grid: str | Callable[[Tensor], tuple[int, int]] | None = None,
    size: tuple[int, int, int] | None = None,
) -> GridSource:
    """The model's one source of grids, made at first use.

    Args:
        tokens: how many there are at the places of layers, for an image of ``size``; None: not looked at.
        grid: the name of the module that gives the patches as a map (B, C, height, width), or a function of the
            images (B, channels, H, W) that gives (height, width); None: timm's patch embedding, or such a module where
            one is seen.
        size: (channels, height, width) of an image the model takes.

    Raises:
        ValueError: no grid is found, ``grid`` tells none, or there are other tokens than prefix tokens and positions.
    """
    source = next(filter(None, map(source_at, model.modules())), None)
    if source is None:
        source = _new_source(model, tokens, grid, size)
    elif grid not in (None, source.told_by):
        raise ValueError(f"grid={grid!r}: this model's grids come from {source.told_by!r} already")
    embeds = embeddings(model)
    if None not in tokens.values():
        if len(embeds) == 1:
            there = Grid(*model.get_submodule(embeds[0]).dynamic_feat_size(size[1:]))
        else:
            there = source.told_in(lambda: observe(model, [], _zeros(model, 1, size)))
        for name, count in tokens.items():
            if count != source.num_prefix_tokens + there.size:
                raise ValueError(
                    f"at={name!r}: {name} gives {count} tokens, but a block of this ViT must give "
                    f"{source.num_prefix_tokens} + {there.height}×{there.width}"
                )
    for holder in dict.fromkeys(holder for name in tokens for holder in (*holders(name), "")):
        if isinstance(chain := model.get_submodule(holder), (nn.ModuleList, nn.Sequential)):
            for block in chain:
                for part in [block] if embeds else [block, *block.children()]:  # others may checkpoint its forward
                    source.follow(part)
    return source


def embeddings(model: nn.Module) -> list[str]:
    """Names of timm's patch embeddings, which tell the grid."""
    parts = model.named_modules()
    return [name for name, part in parts if name.endswith("patch_embed") and hasattr(part, "dynamic_feat_size")]


def is_told(model: nn.Module, tokens: dict[str, int], size: tuple[int, int, int]) -> bool:
    """Whether the grid of the tokens, of which there are so many at the named places, is said or seen."""
    return bool(embeddings(model) or _found(model, *next(iter(tokens.items())), size))


def _new_source(model: nn.Module, tokens: dict, grid, size) -> GridSource:
    at, count = next(iter(tokens.items()))
    embeds = embeddings(model)
    if callable(grid):
        source = _by_images(model, at, count, grid, size)
    elif grid in embeds or (grid is None and len(embeds) == 1):
        (grid,) = embeds if grid is None else (grid,)
        vit = model.get_submodule(grid.rpartition(".")[0])
        if not isinstance(getattr(vit, "patch_drop", None), (nn.Identity, type(None))):
            raise ValueError(
                "patch_drop_rate: must be 0 beside a block, which needs every patch in its place in the grid"
            )
        source = GridSource(getattr(vit, "num_prefix_tokens", 0), grid)
    else:
        source = _by_name(model, at, count, grid, size) if grid else _found(model, at, count, size)
    if source is None:
        raise ValueError(
            f"at={at!r}: gives tokens, and no part of {type(model).__name__} is seen to make them of a map, position "
            "by position; give grid, a function of the images that gives (height, width)"
        )
    model.register_forward_pre_hook(source.begin)
    model.register_forward_hook(source.end, always_call=True)
    if callable(source.told_by):
        model.register_forward_pre_hook(one_size)
        model.register_forward_pre_hook(source.record_images, with_kwargs=True)
    else:
        patches = model.get_submodule(source.told_by)
        patches.register_forward_pre_hook(one_size)
        patches.register_forward_hook(source.record)
    return source


def _by_images(model: nn.Module, at: str, count: int, grid: Callable, size) -> GridSource:
    told, found = Grid.of(tuple(map(int, grid(_zeros(model, 1, size))))), _found(model, at, count, size)
    prefix = count - told.size
    if prefix < 0 or (found and prefix != found.num_prefix_tokens):
        made = f", of which {found.told_by} makes {count - found.num_prefix_tokens}" if found else ""
        raise ValueError(
            f"grid={grid!r}: gives {told.height}×{told.width} positions, but there are {count} tokens at {at}{made}"
        )
    return GridSource(prefix, grid)


def _by_name(model: nn.Module, at: str, count: int, grid: str, size) -> GridSource:
    maps = _maps(model, count, size)
    if grid not in maps:
        raise ValueError(
            f"grid={grid!r}: must be a function of the images, or the name of a module that gives a map (B, C, height, "
            f"width) of at most {count} positions: {', '.join(maps) or 'there is none'}"
        )
    there = maps[grid]
    if not _is_meta(model) and not _become_tokens(model, grid, there, at, count, size):
        raise ValueError(
            f"grid={grid!r}: its map of {there.height}×{there.width} positions does not become the last of the {count} "
            f"tokens at {at}, row by row"
        )
    return GridSource(count - there.size, grid)


def _found(model: nn.Module, at: str, count: int, size) -> GridSource | None:
    """The source of grids at the first module that is seen to make the patches."""
    if _is_meta(model):
        return None
    for name, there in _maps(model, count, size).items():
        if _become_tokens(model, name, there, at, count, size):
            return GridSource(count - there.size, name)
    return None


def _is_meta(model: nn.Module) -> bool:
    return like(model)["device"].type == "meta"  # no numbers tell: a name is believed, none is found


def _maps(model: nn.Module, most: int, size) -> dict[str, Grid]:
    """The grids of maps with at most so many positions, by the modules that give them, in the order of their calls."""
    met: list[tuple[str, tuple[int, ...]]] = []
    hooks = [
        part.register_forward_hook(lambda module, args, output, n=n: met.append((n, getattr(output, "shape", ()))))
        for n, part in model.named_modules()
        if n
    ]
    _run(model, 1, size, hooks)
    names = Counter(name for name, _ in met)
    maps = {name: Grid(*shape[2:]) for name, shape in met if len(shape) == 4 and names[name] == 1}
    return {name: grid for name, grid in maps.items() if grid.size <= most}


def _become_tokens(model: nn.Module, name: str, grid: Grid, at: str, count: int, size) -> bool:
    """Whether the positions of the map that ``name`` gives are the last of ``count`` tokens ``at``, in raster order."""
    prefix, corners = count - grid.size, [(0, 0), (0, grid.width - 1), (grid.height - 1, grid.width - 1)]
    wanted, seen, over = [[prefix + y * grid.width + x] for y, x in corners], [], []
    generator = torch.Generator().manual_seed(0)

    def change(module, args, output):
        output, most = output.clone(), output.abs().max().clamp(min=1)
        for image, (y, x) in enumerate(corners):  # and none in the last
            output[image, :, y, x] += most * torch.randn(output.shape[1], generator=generator).to(output)
        return output

    def look(module, args):
        if not over and args and isinstance(args[0], Tensor) and args[0].shape[:2] == (len(corners) + 1, count):
            tokens = args[0].flatten(2)
            far = (tokens[:-1] - tokens[-1:]).abs().amax(dim=2) > 1e-3 * tokens.abs().max()
            seen.append([row.nonzero().flatten().tolist() for row in far])

    def end(module, args, output):
        look(module, (given(output),))
        over.append(True)

    hooks = [part.register_forward_pre_hook(look) for part in model.modules()]
    hooks.append(model.get_submodule(at).register_forward_hook(end))
    hooks.append(model.get_submodule(name).register_forward_hook(change))
    _run(model, len(corners) + 1, size, hooks)
    return wanted in seen


def _run(model: nn.Module, images: int, size, hooks: list) -> None:
    """Runs the model on so many images of zeros, and takes the hooks away."""
    try:
        observe(model, [], _zeros(model, images, size))
    finally:
        for hook in hooks:
            hook.remove()


def _zeros(model: nn.Module, images: int, size: tuple[int, int, int]) -> Tensor:
    return torch.zeros(images, *size, **like(model))
