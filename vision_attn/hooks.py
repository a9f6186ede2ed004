"""What layers leave in a host, and a saved host keeps: hooks that run them, and bring them the grid of its tokens.

A ViT passes on tokens alone, and two grids may have as many, so the grid goes another way: it is known where patches
are made, and handed to the layers that need it. In a forward pass it is noted for the thread. The tokens that a block
takes and gives also carry it, as an attribute of their memory: gradient checkpointing runs a block again in backward,
whatever was noted since, and does so on the same memory. What runs in backward is noted for the step of the backward
pass that asked for it.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from .grid import Grid
from .traced import fixed


class Behind:
    """Forward hook that sends a module's output through its own child ``name``; of a tuple, its first part."""

    def __init__(self, name: str, channels_last: bool = False, source: "GridSource | None" = None):
        self.name, self.channels_last, self.source = name, channels_last, source

    def __call__(self, module: nn.Module, args, output):
        layer = getattr(module, self.name)
        if isinstance(output, tuple):
            return (self(module, args, output[0]), *output[1:])
        if self.source is not None:
            tokens, grid = self.source.with_grid(output)
            out = layer(tokens, grid)
            carry(out, grid)
            return out
        if self.channels_last:
            return layer(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return layer(output)


class InTuple:
    """Forward hook of a mixer that stands for an attention which gives ``length`` things, what it mixed first."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, mixer: nn.Module, args, output: Tensor) -> tuple:
        return (output, *[None] * (self.length - 1))


class Notes(threading.local):
    """Of a thread, or of one step of a backward pass."""

    grid: Grid | None = None  # of the tokens that are being run
    waiting: tuple[Grid, ...] = ()  # embedded, and no block has begun with their tokens; the oldest first
    before: tuple[Grid, ...] = ()  # what was waiting when the forward of the whole model began


class GridSource:
    """Knows the grids that a patch embedding makes, and hands each to the layers that its tokens come to.

    A copy, or a saved model, waits for its own patch embedding.

    Args:
        num_prefix_tokens: how many tokens precede those of the grid.
        told_by: the name of the module that makes patches, or a function of the images that gives (height, width).
    """

    def __init__(self, num_prefix_tokens: int, told_by: str | Callable):
        self.num_prefix_tokens, self.told_by = num_prefix_tokens, told_by
        self.thread = Notes()
        self.only: dict[int, Grid | None] = {}  # the one grid that ever had so many positions, None if there were more
        self.sole: Grid | None = None  # the latest, while no two had as many

    def __reduce__(self):
        return GridSource, (self.num_prefix_tokens, self.told_by)

    @property
    def notes(self) -> Notes:
        step = None if torch.compiler.is_compiling() else torch._C._current_autograd_node()
        return self.thread if step is None else step.metadata.setdefault(self, Notes())

    def begin(self, model: nn.Module, args) -> None:
        """Forward pre-hook of the model: what was embedded before is not what it runs."""
        if not torch.compiler.is_compiling():
            notes = self.notes
            notes.grid, notes.before, notes.waiting = None, notes.waiting, ()

    def end(self, model: nn.Module, args, output) -> None:
        """Forward hook of the model: what was embedded before waits on, and beside it what it may be mistaken for."""
        if not torch.compiler.is_compiling():
            notes = self.notes
            ran, before, notes.before = notes.grid, notes.before, ()
            alike = ran is not None and any(grid.size == ran.size for grid in before) and ran not in before
            notes.waiting = (*before, ran) if alike else before

    def record(self, patches: nn.Module, args, output) -> None:
        """Forward hook of what makes patches: timm's patch embedding, or any module that gives them as a map."""
        embeds = hasattr(patches, "dynamic_feat_size")
        self.note(*(patches.dynamic_feat_size(args[0].shape[-2:]) if embeds else (output.shape[-2], output.shape[-1])))

    def record_images(self, model: nn.Module, args, kwargs) -> None:
        """Forward pre-hook of a model whose images tell the grid."""
        self.note(*self.told_by(images_of(args, kwargs)))

    def note(self, height, width) -> None:
        grid, notes = Grid(fixed(height), fixed(width)), self.notes
        notes.grid = grid
        if not in_graph(grid.height):
            notes.waiting = (*(other for other in notes.waiting if other != grid), grid)
            if self.only.setdefault(grid.size, grid) != grid:
                self.only[grid.size] = None
            self.sole = None if None in self.only.values() else grid

    def told_in(self, run: Callable[[], object]) -> Grid | None:
        """The grid of the images in ``run()``, of which nothing is kept."""
        kept, self.thread.grid = (dict(self.only), self.sole, self.thread.waiting), None
        try:
            run()
            return self.thread.grid
        finally:
            (self.only, self.sole, self.thread.waiting), self.thread.grid = kept, None

    def follow(self, block: nn.Module) -> None:
        """Lets tokens carry their grid into and out of ``block``, at which a checkpoint may begin."""
        if source_at(block) is None:
            block.register_forward_pre_hook(self.enter)
            block.register_forward_hook(self.leave)

    def enter(self, block: nn.Module, args) -> None:
        """Forward pre-hook of blocks: from here on, the tokens that it takes are those being run."""
        if args and is_tokens(args[0]):
            notes, size = self.notes, self.positions(args[0])
            fit = [grid for grid in notes.waiting if grid.size == size]
            if fit and carried(args[0], size) is None:
                notes.grid = fit[0] if len(fit) == 1 else None
                notes.waiting = notes.waiting[notes.waiting.index(fit[-1]) + 1 :]
            self.find(args[0])

    def leave(self, block: nn.Module, args, output) -> None:
        """Forward hook of blocks: what one gives has the grid of what it took."""
        out = output[0] if isinstance(output, tuple) and output else output
        if args and is_tokens(args[0]) and is_tokens(out):
            carry(out, carried(args[0], self.positions(out)))

    def give(self, mixer: nn.Module, args, kwargs):
        """Forward pre-hook of a mixer in the place of a host's attention: of what that is called with, tokens and grid.

        Hosts call theirs ``attn(x, attn_mask=…, is_causal=…)``, ``attn(x, x, x, need_weights=False)``,
        ``attn(x, attention_mask)``; a mask is refused.
        """
        if len(args) > 1 and isinstance(args[1], Grid):
            return None  # graphs of torch.fx have it in them
        named = {**dict(enumerate(args)), **kwargs}
        x = next(iter(named.values()))
        others = {name: value for name, value in named.items() if value is not x}
        masks = [
            value
            for name, value in others.items()
            if (hasattr(value, "shape") if isinstance(name, int) else "mask" in name or name == "is_causal")
        ]
        return self.with_grid(without_masks(x, masks, type(mixer).__module__)), {}

    def with_grid(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Tokens ``x`` and their grid; ValueError where it is not known."""
        # a compiled block can't see whether it runs in backward, where autograd may have a thread of its own
        grid = self.thread.grid or self.sole if in_graph(x.shape[1]) else self.find(x)
        if grid is None or isinstance(x, fx.Proxy) != isinstance(grid.height, fx.Proxy):
            raise ValueError(
                f"grid: the patch embedding has not run before these {x.shape[1]} tokens in this thread, or several "
                "grids may be theirs, as where one of as many was embedded and never run"
            )
        return of_grid(x, self.num_prefix_tokens, grid), grid

    def find(self, x: Tensor) -> Grid | None:
        """The grid of tokens ``x``, which is noted and which they carry from here on, or one that they do not fit."""
        notes, size = self.notes, self.positions(x)
        grid, noted = carried(x, size), notes.grid
        if noted is not None and in_graph(noted.height):  # left over from a graph
            noted = None
        if grid is not None and version_of(x) is None and noted not in (None, grid) and noted.size == size:
            raise ValueError(
                f"grid: these {x.shape[1]} tokens were {grid.height}×{grid.width}, the latest are {noted.height}×"
                f"{noted.width}; inference_mode does not tell whether their memory was written to, torch.no_grad does"
            )
        grid = grid or noted
        if notes is not self.thread and grid is None:  # they passed here in forward, so they do fit what was embedded
            grid = self.only.get(size)
        if grid is not None and grid.size == size:
            notes.grid = grid
            carry(x, grid)
        return grid

    def positions(self, x: Tensor) -> int:
        return fixed(x.shape[1]) - self.num_prefix_tokens


def in_graph(n) -> bool:
    """Whether the number ``n`` stands for others too, in a graph that is being made."""
    return torch.compiler.is_compiling() or not isinstance(n, (int, Tensor))


def is_tokens(x) -> bool:
    return isinstance(x, Tensor) and x.ndim == 3 and not in_graph(x.shape[1])


def carry(x: Tensor, grid: Grid | None) -> None:
    """Notes the grid of tokens ``x`` on their memory, as long as that is and until it is written to."""
    if grid is not None and is_tokens(x) and (memory := memory_of(x)) is not None:
        memory.vision_attn_grid = grid, version_of(x)


def carried(x: Tensor, size: int) -> Grid | None:
    """The grid of ``size`` positions that tokens ``x`` carry, if they do."""
    grid, version = getattr(memory_of(x), "vision_attn_grid", (None, None))
    return grid if grid is not None and grid.size == size and version == version_of(x) else None


def memory_of(x: Tensor) -> torch.UntypedStorage | None:
    try:
        return x.untyped_storage()
    except NotImplementedError:  # tensors of torch.func have none
        return None


def version_of(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


@fx.wrap
def of_grid(x: Tensor, prefix: int, grid: Grid) -> Tensor:
    """Tokens ``x``; ValueError if they are not ``prefix`` tokens and those of ``grid``."""
    if fixed(x.shape[1]) != prefix + grid.size:
        raise ValueError(
            f"x has {x.shape[1]} tokens, but the latest patch embedding made {prefix} + {grid.height}×{grid.width}: "
            "tokens were dropped or joined, or are not of that image"
        )
    return x


@fx.wrap
def without_masks(x: Tensor, masks: list, block: str) -> Tensor:
    """``x``; ValueError if a mask comes with it."""
    if any(mask is not None and mask is not False for mask in masks):
        raise ValueError(f"attention_mask, attn_mask and is_causal: {block} takes none of them, its pattern is its own")
    return x


def images_of(args, kwargs) -> Tensor:
    """Of what a model is called with, the images (B, C, H, W)."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 4), args[0])


def one_size(patches: nn.Module, args):
    """Forward pre-hook of what takes the images. A trace of torch.jit holds for one size: it refuses any other."""
    if torch.jit.is_tracing():
        return (args[0].expand(-1, -1, *map(int, args[0].shape[-2:])), *args[1:])


def source_at(module: nn.Module) -> GridSource | None:
    """The source that a module's forward hooks belong to."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, GridSource)), None)
