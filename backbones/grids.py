"""The grid of a ViT's tokens: recorded where patches are made, handed to the layers that need it."""

import torch
from torch import Tensor, nn

from vision_attn import Grid


class RememberGrid(torch.autograd.Function):
    """The identity on tokens. Saves an empty tensor of the grid's shape, by which torch's gradient checkpointing
    notices that it recomputes on another grid."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, grid):
        return x.view_as(x), x.new_empty(*grid, 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, slope, _):
        return slope, None


class GridSource:
    """Knows the grid of the patch embedding's latest call, and hands it to the layers behind it."""

    def __init__(self, num_prefix_tokens: int):
        self.num_prefix_tokens = num_prefix_tokens
        self.grid = None

    def record(self, patch_embed: nn.Module, args, output) -> None:
        """Forward hook of the patch embedding."""
        self.grid = Grid(*patch_embed.dynamic_feat_size(args[0].shape[-2:]))

    def give(self, mixer: nn.Module, args, kwargs):
        """Forward pre-hook of a mixer that stands where a ViT calls ``attn(x, attn_mask=…, is_causal=…)``."""
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError(f"attn_mask and is_causal: {type(mixer).__module__} takes neither, its pattern is its own")
        return self.with_grid(args[0]), {}

    def grid_of(self, x: Tensor) -> Grid:
        """The grid of tokens ``x``; ValueError if they are not those of the latest patch embedding."""
        if self.grid is None:
            raise ValueError("grid: the patch embedding has not run, so the grid of these tokens is unknown")
        if x.shape[1] != self.num_prefix_tokens + self.grid.size:
            raise ValueError(
                f"x has {x.shape[1]} tokens, but the latest patch embedding made {self.num_prefix_tokens} + "
                f"{self.grid.height}×{self.grid.width}: dropped patches, or a checkpointed backward of another size"
            )
        return self.grid

    def with_grid(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Tokens ``x`` and their grid, which a checkpointed backward must find again or torch's CheckpointError."""
        grid = self.grid_of(x)
        if x.requires_grad and not torch.compiler.is_compiling():
            x, _ = RememberGrid.apply(x, grid)
        return x, grid

    def __getstate__(self):
        return {**self.__dict__, "grid": None}  # a copy or a saved model waits for its own patch embedding


def grid_source(model: nn.Module) -> GridSource:
    """The model's one source of grids, made at first use; ValueError if there can be none."""
    patch_embed = getattr(model, "patch_embed", None)
    if not hasattr(patch_embed, "dynamic_feat_size"):
        raise ValueError(f"model={type(model).__name__}: gives tokens, but has no patch_embed that tells their grid")
    for hook in patch_embed._forward_hooks.values():
        if isinstance(getattr(hook, "__self__", None), GridSource):
            return hook.__self__
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        raise ValueError("patch_drop_rate: must be 0 beside a block, which needs every patch in its place in the grid")
    source = GridSource(getattr(model, "num_prefix_tokens", 0))
    patch_embed.register_forward_hook(source.record)
    return source
