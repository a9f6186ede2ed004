"""Adds a layer behind stages or blocks of a model that exists already.

Every original parameter keeps its name, and the function stays the same bit for bit until the layer is trained.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from vision_attn import Gate, Grid, OnTokens, create_block, create_layer
from vision_attn.zoo import block_class, name_of

from .added import spare_tables
from .grids import GridSource, carry, grid_source
from .hosts import input_size_of, last_of, options_within, resolve, stages
from .places import places


class Behind:
    """Forward hook that sends a module's output through its own child ``name``."""

    def __init__(self, name: str, channels_last: bool = False, source: GridSource | None = None):
        self.name, self.channels_last, self.source = name, channels_last, source

    def __call__(self, module: nn.Module, args, output: Tensor) -> Tensor:
        layer = getattr(module, self.name)
        if self.source is not None:
            tokens, grid = self.source.with_grid(output)
            out = layer(tokens, grid)
            carry(out, grid)
            return out
        if self.channels_last:
            return layer(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return layer(output)


def insert(
    model: nn.Module,
    block: str | type,
    at: str | Iterable[str] | None = None,
    *,
    init_gain: float = 0.0,
    input_size: tuple[int, int, int] | None = None,
    **options,
) -> nn.Module:
    """Adds ``block`` behind modules of ``model`` and returns the model.

    With ``init_gain=0`` the model stays the same function, bit for bit, until trained. The layer at ``layer3``
    becomes the parameters ``layer3.<last block>.attn_<block>.*``; all others keep their names. The model is run
    on zeros, in eval mode, to learn the shapes: once where it lists its stages, else on wide and tall images too.

    Args:
        block: one of `vision_attn.list_blocks`, or a class of blocks.
        at: names of modules, with wildcards that do not cross dots ("layer3.*"), or several; None: after every
            stage of a convolutional network that timm lists in ``feature_info``, every block of a ViT. A gate leaves
            out the last of several blocks where a class token is read: it changes patch tokens, and nothing would
            read them.
        init_gain: 0 starts as identity, 1 as the block was published.
        input_size: (channels, height, width) of an image the model takes; None: what the model says.
        options: of the block, whose device and type are the model's.

    Raises:
        ValueError: ``at`` matches nothing (what could match is listed) or a place where no layer can be (one that works
            is named): its output is neither a feature map nor tokens, or its channels can't be told; it is used in
            several places, runs all its children, or goes when the model is fused. A block of this name is already
            there; an option is out of range; the model takes no image of ``input_size``.
    """
    could = stages(model)
    if at is None and issubclass(block_class(block), Gate) and getattr(model, "global_pool", None) == "token":
        could = could[:-1] or could
    found = resolve(model, at, could, dict(model.named_modules(remove_duplicate=False)))
    names = list(dict.fromkeys(last_of(model, name) for name in found))  # "layer3" and "layer3.1" may be the same place
    size = input_size or input_size_of(model)
    child, ready, options = f"attn_{name_of(block)}", [], options_within(model, options)
    for name in names:
        if hasattr(model.get_submodule(name), child):
            raise ValueError(f"at={at!r}: {name} already has a {name_of(block)}")
    met = places(model, names, size)
    maps = ", ".join(name for name, place in met.items() if len(place.shape) == 4)
    for name, (shape, channel_axis) in met.items():
        target = model.get_submodule(name)
        if len(shape) == 3 and maps and not hasattr(model, "patch_embed"):
            raise ValueError(f"at={name!r}: gives tokens, and no patch_embed tells their grid; try {maps}")
        if len(shape) == 3:
            source = grid_source(model)
            grid = Grid(*model.patch_embed.dynamic_feat_size(size[1:]))
            if shape[1] != source.num_prefix_tokens + grid.size:
                raise ValueError(
                    f"at={at!r}: {name} gives {shape[1]} tokens, but a block of this ViT must give "
                    f"{source.num_prefix_tokens} + {grid.height}×{grid.width}"
                )
            layer = OnTokens(create_block(block, shape[-1], **options), init_gain)
            source.follow(target)
            ready.append((target, layer, Behind(child, source=source)))
        else:
            layer = create_layer(block, shape[channel_axis], init_gain=init_gain, **options)
            ready.append((target, layer, Behind(child, channels_last=channel_axis == 3)))
    for target, layer, behind in ready:  # all of them or, where one can't be made, none
        target.add_module(child, layer.train(model.training))
        target.register_forward_hook(behind)
    return spare_tables(model)
