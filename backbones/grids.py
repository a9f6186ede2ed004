"""The grid of a ViT's tokens: known where patches are made, handed to the layers that need it.

The host passes on tokens alone, and two grids may have as many, so the grid goes another way. In a forward pass it is
noted for the thread. The tokens that a block takes and gives also carry it, as an attribute of their memory: gradient
checkpointing runs a block again in backward, whatever was noted since, and does so on the same memory. What runs in
backward is noted for the step of the backward pass that asked for it.
"""

import threading

import torch
from torch import Tensor, fx, nn

from vision_attn import Grid
from vision_attn.traced import fixed


class Notes(threading.local):
    """Of a thread, or of one step of a backward pass."""

    grid: Grid | None = None  # of the tokens that are being run
    waiting: tuple[Grid, ...] = ()  # embedded, and no block has begun with their tokens; the oldest first
    before: tuple[Grid, ...] = ()  # what was waiting when the forward of the whole model began


class GridSource:
    """Knows the grids that a patch embedding makes, and hands each to the layers that its tokens come to.

    A copy, or a saved model, waits for its own patch embedding.
    """

    def __init__(self, num_prefix_tokens: int):
        self.num_prefix_tokens = num_prefix_tokens
        self.thread = Notes()
        self.only: dict[int, Grid | None] = {}  # the one grid that ever had so many positions, None if there were more
        self.sole: Grid | None = None  # the latest, while no two had as many

    def __reduce__(self):
        return GridSource, (self.num_prefix_tokens,)

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

    def record(self, patch_embed: nn.Module, args, output) -> None:
        """Forward hook of the patch embedding."""
        grid, notes = Grid(*map(fixed, patch_embed.dynamic_feat_size(args[0].shape[-2:]))), self.notes
        notes.grid = grid
        if not in_graph(grid.height):
            notes.waiting = (*(other for other in notes.waiting if other != grid), grid)
            if self.only.setdefault(grid.size, grid) != grid:
                self.only[grid.size] = None
            self.sole = None if None in self.only.values() else grid

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
        if args and is_tokens(args[0]) and is_tokens(output):
            carry(output, carried(args[0], self.positions(output)))

    def give(self, mixer: nn.Module, args, kwargs):
        """Forward pre-hook of a mixer that stands where a ViT calls ``attn(x, attn_mask=…, is_causal=…)``."""
        if len(args) > 1 and isinstance(args[1], Grid):
            return None  # graphs of torch.fx have it in them
        masks = kwargs.get("attn_mask"), kwargs.get("is_causal")
        return self.with_grid(without_masks(args[0], *masks, type(mixer).__module__)), {}

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
def without_masks(x: Tensor, attn_mask, is_causal, block: str) -> Tensor:
    """``x``; ValueError if a mask comes with it."""
    if attn_mask is not None or is_causal:
        raise ValueError(f"attn_mask and is_causal: {block} takes neither, its pattern is its own")
    return x


def one_size(patch_embed: nn.Module, args):
    """Forward pre-hook of the patch embedding. A trace of torch.jit holds for one size: it refuses any other."""
    if torch.jit.is_tracing():
        return (args[0].expand(-1, -1, *map(int, args[0].shape[-2:])), *args[1:])


def source_at(module: nn.Module) -> GridSource | None:
    """The source that a module's forward hooks belong to."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, GridSource)), None)


def grid_source(model: nn.Module) -> GridSource:
    """The model's one source of grids, made at first use; ValueError if there can be none."""
    patch_embed = getattr(model, "patch_embed", None)
    if not hasattr(patch_embed, "dynamic_feat_size"):
        raise ValueError(f"model={type(model).__name__}: gives tokens, but has no patch_embed that tells their grid")
    if (source := source_at(patch_embed)) is not None:
        return source
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        raise ValueError("patch_drop_rate: must be 0 beside a block, which needs every patch in its place in the grid")
    source = GridSource(getattr(model, "num_prefix_tokens", 0))
    model.register_forward_pre_hook(source.begin)
    model.register_forward_hook(source.end, always_call=True)
    patch_embed.register_forward_pre_hook(one_size)
    patch_embed.register_forward_hook(source.record)
    for chain in model.children():
        if isinstance(chain, (nn.ModuleList, nn.Sequential)) and chain is not patch_embed:
            for block in chain:
                source.follow(block)
    return source
